"""One topic: which of its publications are asked for, by offset, number and direction."""

import pytest

from broker.core.messages import Publication
from broker.core.topic_history import History


@pytest.fixture
def history() -> History:
    """Of ten publications the last four, 7 to 10, published at as many seconds."""
    history = History("t", "e", 10, 60.0, 0.0, bytes=0)
    for number in range(7, 11):
        history.ring.append(Publication("t", b"%d" % number), float(number))
    return history


@pytest.mark.parametrize(
    ("since", "limit", "reverse", "offsets"),
    [
        (None, -1, False, [7, 8, 9, 10]),
        (None, 2, False, [7, 8]),
        (None, 2, True, [10, 9]),
        (8, -1, False, [9, 10]),
        (8, -1, True, [7]),
        (9, 1, True, [8]),
        (3, -1, False, [7, 8, 9, 10]),
        (3, -1, True, []),
        (10, -1, False, []),
        (99, -1, False, []),
        (99, 1, True, [10]),
        (None, 0, False, []),
    ],
)
def test_select(
    history: History, since: int | None, limit: int, reverse: bool, offsets: list[int]
) -> None:
    found = history.select(since, limit, reverse)
    assert [each.offset for each in found] == offsets
    assert [each.data for each in found] == [b"%d" % each for each in offsets]


def test_each_has_the_time_at_which_it_was_published(history: History) -> None:
    assert [(when, each.offset) for when, each in history.dated(1, 3)] == [(8.0, 8), (9.0, 9)]
