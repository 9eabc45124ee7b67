"""The memory engine: histories in virtual time, kept for as long as its block."""

import pytest
import trio
from trio.testing import MockClock, assert_no_checkpoints

from broker.config.settings import TopicRules
from broker.core.history import EXPIRED_AT_ONCE, UnrecoverablePosition
from broker.core.messages import Position, Publication
from broker.engines.memory import MemoryEngine, open_memory

RULES = TopicRules(history_size=3, history_ttl=60)


def publish(engine: MemoryEngine, topic: str, *data: bytes, rules: TopicRules = RULES) -> list[int]:
    """Publish, and return the offsets."""
    publications = [Publication(topic, each) for each in data]
    return [each.offset for each in engine.publish(topic, publications, rules, trio.current_time())]


def read(engine: MemoryEngine, topic: str) -> list[bytes]:
    publications, _ = engine.history(topic, None, -1, False)
    return [each.data for each in publications]


async def test_a_topic_keeps_as_much_as_its_rules_say(autojump_clock: MockClock) -> None:
    async with open_memory(2**20) as engine:
        assert publish(engine, "a", b"1", b"2") == [1, 2]
        assert publish(engine, "a", b"3", b"4") == [3, 4]
        assert read(engine, "a") == [b"2", b"3", b"4"]
        assert engine.position("a").offset == 4
        assert engine.position("b").offset == 0


async def test_old_publications_go_by_themselves(autojump_clock: MockClock) -> None:
    async with open_memory(2**20) as engine:
        publish(engine, "a", b"1")
        await trio.sleep(30)
        publish(engine, "a", b"2")
        assert engine.statistics().history.publications == 2
        await trio.sleep(32)
        assert engine.statistics().history.publications == 1  # and nobody had to ask for it
        assert read(engine, "a") == [b"2"]
        await trio.sleep(30)
        assert engine.statistics().history.publications == 0
        assert engine.position("a").offset == 2


async def test_a_client_recovers_what_it_missed_or_is_told_that_it_cannot(
    autojump_clock: MockClock,
) -> None:
    async with open_memory(2**20) as engine:
        publish(engine, "a", b"1", b"2", b"3", b"4")
        epoch = engine.position("a").epoch
        view = engine.view("a", Position(2, epoch))
        assert ([each.data for each in view.missed], view.recovered) == ([b"3", b"4"], True)
        assert view.top == Position(4, epoch)
        assert engine.view("a", Position(0, epoch)).recovered is False  # the first is gone
        assert engine.view("a", Position(2, "other")).recovered is False
        with pytest.raises(UnrecoverablePosition):
            engine.history("a", Position(2, "other"), -1, False)


async def test_others_run_while_much_expires(autojump_clock: MockClock) -> None:
    left = set()

    class Look(trio.abc.Instrument):
        def before_io_wait(self, timeout: float) -> None:
            left.add(engine.statistics().history.topics)

    async with open_memory(2**22) as engine:
        for number in range(3 * EXPIRED_AT_ONCE):
            publish(engine, f"t{number}", b"1")
        trio.lowlevel.add_instrument(Look())
        await trio.sleep(RULES.history_ttl + 2)
    assert left == {0, EXPIRED_AT_ONCE, 2 * EXPIRED_AT_ONCE, 3 * EXPIRED_AT_ONCE}


async def test_others_run_while_much_is_forgotten(autojump_clock: MockClock) -> None:
    asked = rounds = most = 0

    def is_over(topic: str) -> bool:
        nonlocal asked
        asked += 1
        return True

    class Look(trio.abc.Instrument):
        def before_io_wait(self, timeout: float) -> None:
            nonlocal asked, rounds, most
            rounds, most, asked = rounds + bool(asked), max(most, asked), 0

    async with open_memory(2**22) as engine:
        for number in range(3 * EXPIRED_AT_ONCE):
            publish(engine, f"t{number}", b"1")
        trio.lowlevel.add_instrument(Look())
        engine.forget(is_over)
        assert read(engine, "t7") == []
        await trio.sleep(2)
        assert engine.statistics().history.topics == 0
    assert rounds >= 3
    assert most <= EXPIRED_AT_ONCE


async def test_an_epoch_is_known_to_no_other_engine(autojump_clock: MockClock) -> None:
    epochs = set()
    for _ in range(5):
        async with open_memory(2**20) as engine:
            publish(engine, "a", b"1")
            epochs.add(engine.position("a").epoch)
    assert len(epochs) == 5


async def test_a_topic_that_is_removed_keeps_its_position_and_one_that_is_forgotten_does_not(
    autojump_clock: MockClock,
) -> None:
    async with open_memory(2**20) as engine:
        for topic in ("a", "b"):
            publish(engine, topic, b"1")
        before = engine.position("a")
        await engine.remove("a")
        assert (read(engine, "a"), engine.position("a")) == ([], before)
        engine.forget(lambda topic: topic == "a")
        assert engine.position("a").epoch != before.epoch
        assert read(engine, "b") == [b"1"]


async def test_nothing_that_an_engine_does_waits(autojump_clock: MockClock) -> None:
    async with open_memory(2**20) as engine:
        with assert_no_checkpoints():
            publish(engine, "a", b"1")
            engine.view("a", engine.position("a"))
            read(engine, "a")
            engine.forget(lambda topic: True)
            engine.statistics()


async def test_an_engine_ends_with_its_block_also_when_that_fails(
    autojump_clock: MockClock,
) -> None:
    tasks = len(trio.lowlevel.current_task().child_nurseries)
    with pytest.raises(ExceptionGroup) as failed:  # noqa: PT012
        async with open_memory(2**20):
            assert len(trio.lowlevel.current_task().child_nurseries) == tasks + 1
            raise ZeroDivisionError
    assert failed.group_contains(ZeroDivisionError)
    assert len(trio.lowlevel.current_task().child_nurseries) == tasks
