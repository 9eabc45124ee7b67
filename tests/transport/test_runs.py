"""Runs: joined once, shared by all, and counted once for as long as anybody holds them."""

import tracemalloc

import pytest

from broker.core.memory import Ledger
from broker.transport.runs import GONE, LateRun, Rest, Run, SharedData, share_of


def test_the_frames_of_a_run_are_joined_and_counted() -> None:
    run = Run((b"ab", b"cde"), "t", "latest")
    assert (run.data, run.messages, run.topic, run.rule) == (b"abcde", 2, "t", "latest")


def test_a_single_frame_is_not_copied() -> None:
    frame = bytes(1000)
    assert Run((frame,)).data is frame


def test_control_frames_are_no_messages() -> None:
    assert Run((b"ping",), messages=0).messages == 0
    assert (GONE.messages, GONE.data) == (0, b"")


@pytest.mark.parametrize("frames", [5, (1,)], ids=["no sequence", "no bytes"])
def test_no_run_of_what_are_no_frames(frames: object) -> None:
    with pytest.raises(TypeError):
        Run((*frames, b"") if isinstance(frames, tuple) else frames)  # type: ignore[arg-type]


def test_a_run_is_in_a_ledger_once_and_until_nobody_holds_it() -> None:
    ledger, other = Ledger(), Ledger()
    run = Run((bytes(1000),))
    run.enter(ledger)
    run.enter(ledger)
    run.enter(other)
    holders = [run] * 1000
    assert other.bytes_held == 0
    assert 1000 < ledger.bytes_held == run.bytes_held < 1300
    del run, holders[1:]
    assert ledger.bytes_held > 1000
    holders.clear()
    assert ledger.bytes_held == 0


def test_several_frames_are_held_twice_and_each_costs_something() -> None:
    frames = [bytes(10) for _ in range(100)]
    assert 2 * 1000 + 100 * 33 < Run(frames).bytes_held < 2 * 1000 + 100 * 60


def test_a_rest_is_what_has_not_been_dropped_and_shares_its_bytes() -> None:
    ledger = Ledger()
    whole = Run([b"a", b"bb", b"ccc", b"dddd"], "t", "drop_oldest")
    whole.enter(ledger)
    rest = Rest(whole)
    rest.drop_front(1, 1)
    rest.drop_front(2, 5)
    assert (bytes(rest.data), rest.messages, rest.first) == (b"dddd", 1, 3)
    assert (rest.topic, rest.rule) == ("t", "drop_oldest")
    assert (whole.data, whole.messages) == (b"abbcccdddd", 4)
    held = ledger.bytes_held
    del whole
    assert ledger.bytes_held == held > 0
    del rest
    assert ledger.bytes_held == 0


def late(data: bytes, number: int = 0, shared: object = None) -> LateRun:
    return LateRun((b"%d" % number, data, b"tail"), "t", "latest", shared)


def test_a_late_run_is_put_together_when_it_is_needed_and_once() -> None:
    data = bytes(1_000_000)
    tracemalloc.start()
    try:
        runs = [late(data, number) for number in range(100)]
        assert [run.size for run in runs] == [1_000_005] * 10 + [1_000_006] * 90
        assert [(run.last_size, run.messages) for run in runs] == [(run.size, 1) for run in runs]
        _, peak = tracemalloc.get_traced_memory()
        assert peak < 100_000
        assert runs[7].data is runs[7].data is runs[7].frames[0]
        _, peak = tracemalloc.get_traced_memory()
        assert 1_000_000 < peak < 1_100_000
    finally:
        tracemalloc.stop()
    assert runs[7].data == b"7" + data + b"tail"
    with pytest.raises(AttributeError):
        runs[7].nothing  # noqa: B018


def test_what_late_runs_share_is_counted_once_until_they_are_put_together() -> None:
    ledger, data = Ledger(), bytes(1_000_000)
    shared = SharedData(data, ledger)
    runs = [late(data, number, shared) for number in range(100)]
    del shared
    for run in runs:
        run.enter(ledger)
    assert 1_000_000 < ledger.bytes_held < 1_050_000
    assert len(runs[0].data) == len(runs[1].data) == 1_000_005
    assert 3_000_000 < ledger.bytes_held < 3_050_000
    del run, runs[1:]
    assert 2_000_000 < ledger.bytes_held < 2_001_000
    runs.clear()
    assert ledger.bytes_held == 0
    lonely = late(data)
    assert len(lonely.data) == 1_000_005 < lonely.bytes_held


@pytest.mark.parametrize("as_rest", [False, True])
def test_some_frames_of_a_run_make_a_run_of_the_same_kind(as_rest: bool) -> None:
    ledger = Ledger()
    whole = Run([b"a", b"bb", b"ccc"], "t", "latest")
    whole.enter(ledger)
    held = ledger.bytes_held
    part = (Rest(whole) if as_rest else whole).only(1, 3)
    assert (part.data, part.messages, part.topic, part.rule) == (b"bbccc", 2, "t", "latest")
    assert ledger.bytes_held == held + part.bytes_held
    assert Run((b"ping",), messages=0).only(0, 1).messages == 0


def test_what_many_hold_belongs_to_each_by_a_share() -> None:
    own, shared = Run((bytes(10_000),)), Run((bytes(30_000),))
    mine = [own, shared, GONE]
    others = [[shared] for _ in range(9)]
    # Also in the variables of this test, which are one more holder each.
    assert share_of([GONE, shared], 0, 1) == pytest.approx(1 / 12, rel=0.01)
    del own, shared
    expected = (10_168 + 30_168 / 10) / (10_168 + 30_168)
    assert share_of(mine, 0, 1) == pytest.approx(expected, rel=0.02)
    del others[1:]
    assert share_of(mine, 1, 1) == pytest.approx(1 / 2, rel=0.01)
    assert share_of([], 0, 1) == share_of([GONE], 0, 1) == 0


def test_of_many_runs_some_are_looked_at() -> None:
    runs = [Run((bytes(100),)) for _ in range(1000)]
    other = runs[:500]
    assert share_of(runs, 0, 1) == pytest.approx(0.75, rel=0.01)
    assert share_of(runs, 0, 100) == pytest.approx(0.75, rel=0.01)
    assert len(other) == 500
