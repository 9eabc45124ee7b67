"""The contract of an engine finds an engine that breaks it."""

from collections.abc import Callable

import pytest
from trio.testing import MockClock

from broker.core.messages import Position, Publication
from broker.engines.engine import View
from broker.engines.memory import MemoryEngine, open_memory
from broker.testing import ENGINE_CONTRACT

Method = Callable[..., object]

view, history, position = MemoryEngine.view, MemoryEngine.history, MemoryEngine.position


def view_of_any_epoch(self: MemoryEngine, topic: str, since: Position) -> View:
    return view(self, topic, Position(since.offset, self.position(topic).epoch))


def history_without_the_last(
    self: MemoryEngine, topic: str, since: Position | None, limit: int, reverse: bool
) -> tuple[list[Publication], Position]:
    found, top = history(self, topic, since, limit, reverse)
    return found[:-1], top


def position_ahead(self: MemoryEngine, topic: str) -> Position:
    found = position(self, topic)
    return Position(found.offset + 1, found.epoch)


async def remove_nothing(self: MemoryEngine, topic: str) -> None:
    pass


BROKEN = [
    ("order", "position", position_ahead),
    ("order", "history", history_without_the_last),
    ("views", "view", view_of_any_epoch),
    ("removal", "remove", remove_nothing),
]


@pytest.mark.parametrize(("check", "name", "broken"), BROKEN)
async def test_a_check_fails_for_an_engine_that_breaks_it(
    check: str,
    name: str,
    broken: Method,
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(MemoryEngine, name, broken)
    with pytest.RaisesGroup(AssertionError, allow_unwrapped=True, flatten_subgroups=True):
        await ENGINE_CONTRACT[check](lambda: open_memory(2**24, 2**24))
