"""Counters of connections, and the bounds of their labels."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.messages import Close, Initiator
from broker.errors import CloseCode, ErrorCode
from broker.session.counts import Counts, code_label


@pytest.mark.parametrize(
    "code, label",
    [
        *((int(code), str(int(code))) for code in CloseCode),
        (1005, "1005"),
        (3007, "3000-3499"),
        (3999, "3500-3999"),
        (4000, "4000-4499"),
        (4999, "4500-4999"),
        (5000, "other"),
        (2000, "other"),
        (0, "other"),
    ],
)
def test_a_code_has_a_label(code: int, label: str) -> None:
    assert code_label(code) == label


@given(st.lists(st.integers(0, 70_000)), st.lists(st.integers(-1, 10_000)))
def test_whatever_peers_say_there_are_few_labels(codes: list[int], errors: list[int]) -> None:
    counts = Counts()
    for code in codes:
        counts.note_closed(Close(code, "x", Initiator.CLIENT))
    for error in errors:
        counts.note_error(error)
    statistics = counts.statistics()
    most = len(CloseCode) + 10
    assert len([key for key in statistics.closed if key[1] == "client"]) <= most
    assert len(statistics.errors) <= len(ErrorCode) + 1
    assert sum(statistics.closed.values()) == len(codes)
    assert sum(statistics.errors.values()) == len(errors)


def test_what_can_be_is_there_from_the_start() -> None:
    statistics = Counts().statistics()
    assert statistics.closed == {("3008", "slow"): 0, ("1006", "slow"): 0}
    assert set(statistics.opened) == {"websocket", "http_stream", "sse", "uni_sse"}
    assert {"no_place", "page", "gave_way", "shutting_down"} <= set(statistics.refused)
    assert not any(statistics.refused.values())
