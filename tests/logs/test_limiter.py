"""`broker.logs.limiter`: how many lines of one name pass, and that each other one is counted."""

from typing import Any

import pytest
import structlog

from broker.logs.limiter import LINES_A_SECOND, MAX_NAMES, UNLIMITED, Limiter, Swallowed


class Lines:
    """A limiter with a clock in hand, and what it lets through."""

    def __init__(self) -> None:
        self.now = 100.0
        self.told: list[Swallowed] = []
        self.limiter = Limiter(self.told.append, clock=lambda: self.now)

    def log(self, name: str, level: str = "info", **fields: Any) -> int | None:
        """The number of lines that the line says were swallowed before it; None if it is one."""
        try:
            swallowed: int = self.limiter(None, level, {"event": name, **fields}).get(
                "swallowed", 0
            )
        except structlog.DropEvent:
            return None
        return swallowed


@pytest.fixture
def lines() -> Lines:
    return Lines()


@pytest.mark.parametrize("level", ["warning", "error", "critical"])
def test_one_warning_of_a_name_passes_a_second_and_the_next_says_how_many_did_not(
    lines: Lines, level: str
) -> None:
    assert [lines.log("accept_failed", level) for _ in range(5)] == [0, *[None] * 4]
    lines.now += 0.999
    assert lines.log("accept_failed", level) is None
    lines.now += 0.001
    assert [lines.log("accept_failed", level) for _ in range(2)] == [5, None]
    lines.now += 1
    assert lines.log("accept_failed", level) == 1
    assert lines.told == []


@pytest.mark.parametrize(
    "name, limit",
    [
        ("open", 5),
        ("connected", 5),
        ("close", 5),
        ("refused", 1),
        ("tls_failed", 1),
        ("token_refused", 1),
        ("no_pattern", 1),
        ("will_refused", 1),
    ],
)
def test_events_that_strangers_cause_are_limited_at_any_level(
    lines: Lines, name: str, limit: int
) -> None:
    for _ in range(3):
        passed = [lines.log(name) for _ in range(100)]
        assert len([each for each in passed if each is not None]) == limit
        lines.now += 1
    assert set(LINES_A_SECOND) == {
        "open",
        "connected",
        "close",
        "refused",
        "tls_failed",
        "token_refused",
        "no_pattern",
        "will_refused",
    }


def test_a_quiet_broker_logs_each_connection(lines: Lines) -> None:
    for _ in range(50):
        assert lines.log("open") == 0
        assert lines.log("close") == 0
        lines.now += 0.25


def test_other_events_below_a_warning_are_not_limited(lines: Lines) -> None:
    assert [lines.log("reloaded") for _ in range(100)] == [0] * 100
    assert [lines.log("message", "debug") for _ in range(100)] == [0] * 100


def test_a_first_error_waits_behind_nothing(lines: Lines) -> None:
    for fd in range(5000):
        lines.log("open", fd=fd)
        lines.log("refused")
    assert lines.log("hook_failed", "error", hook="message") == 0
    assert lines.log("hook_failed", "error", hook="close") == 0
    assert lines.log("hook_failed", "error", hook="close") is None


def test_other_libraries_are_told_apart_by_logger_and_not_by_text(lines: Lines) -> None:
    assert lines.log("one", "error", logger="a") == 0
    assert lines.log("two", "error", logger="a") is None
    assert lines.log("three", "error", logger="b") == 0


def test_a_count_that_no_line_of_its_name_says_is_told_with_any_line(lines: Lines) -> None:
    for _ in range(10):
        lines.log("open")
        lines.log("hook_failed", "error", hook="message")
        lines.log("x", "warning", logger="a.library")
    lines.now += 0.5
    assert lines.log("reloaded") == 0
    assert lines.told == []
    lines.now += 0.5
    assert lines.log("reloaded") == 0
    assert [(each.level, each.fields) for each in lines.told] == [
        ("info", {"name": "open", "count": 5}),
        ("error", {"name": "hook_failed", "hook": "message", "count": 9}),
        ("warning", {"logger": "a.library", "count": 9}),
    ]
    lines.log("reloaded")
    assert len(lines.told) == 3
    assert lines.log("open") == 0  # it was told


def test_all_counts_are_told_before_an_end(lines: Lines) -> None:
    for _ in range(3):
        lines.log("refused")
    lines.limiter.notify_due()
    assert lines.told == []
    lines.limiter.notify_due(all_of_them=True)
    lines.limiter.notify_due(all_of_them=True)
    assert [each.count for each in lines.told] == [2]
    assert lines.log("refused") is None  # the second is not over


def test_lines_about_lines_and_about_settings_are_never_swallowed(lines: Lines) -> None:
    for name in UNLIMITED:
        assert [lines.log(name, "warning") for _ in range(10)] == [0] * 10


def test_names_that_an_app_makes_of_a_peers_text_cost_bounded_memory(lines: Lines) -> None:
    lines.log("kept", "warning")
    lines.log("kept", "warning")
    for number in range(3 * MAX_NAMES):
        assert lines.log(f"made of {number}", "warning") == 0
    lines.limiter.notify_due(all_of_them=True)
    assert [(each.name, each.count) for each in lines.told] == [("kept", 1)]
    # Forgotten at the next round: the second of this name is not over, and yet it passes.
    assert lines.log("made of 0", "warning") == 0
