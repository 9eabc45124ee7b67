"""Pages that list what the source has: every close code and status, every bound with its value, every setting by its name."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from broker import CloseCode, Config, TokenRules, TopicRules, WebhookRules
from broker.session.counts import REASONS

DOCS = Path(__file__).parent.parent / "docs"
SETTINGS = {
    field.name
    for rules in (Config, TopicRules, TokenRules, WebhookRules)
    for field in attrs.fields(rules)
}


def page(name: str) -> str:
    return (DOCS / name).read_text("utf-8")


def rows(text: str) -> list[list[str]]:
    """The cells of all tables, without their heads."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_each_close_code_has_a_row_that_says_whether_clients_come_back() -> None:
    closed = page("howto/troubleshooting.md").partition("## It was closed")[2]
    closed = closed.partition("\n## ")[0]
    found: dict[int, str] = {}
    for codes, meaning, *_ in rows(closed)[1:]:
        for code in re.findall(r"\b\d{4}\b", codes):
            found[int(code)] = meaning
    assert {int(code) for code in CloseCode} <= found.keys()
    for code, meaning in found.items():
        if 3500 <= code <= 3999 or code == 1009:
            assert meaning.endswith("Stays away"), code
        elif 3000 <= code < 3500 and "never sent" not in meaning:
            assert "Comes back" in meaning, code


def test_each_status_of_a_refusal_that_a_peer_may_meet_is_named() -> None:
    text = page("howto/troubleshooting.md").partition("## It was closed")[0]
    rare = {400, 405, 411, 413, 415, 501, 505}  # of clients that are none
    assert {
        status for status in REASONS if re.search(rf"\b{status}\b", text)
    } == REASONS.keys() - rare


@pytest.mark.parametrize(
    "name", ["howto/troubleshooting.md", "howto/security.md", "reference/limits.md"]
)
def test_what_looks_like_a_setting_is_one(name: str) -> None:
    others = {"wasRecovering", "recovered", "max_events"}
    words = set(re.findall(r"`(?:webhooks\.)?([a-z]+_[a-z_]+)`", page(name)))
    known = SETTINGS | others
    strangers = {word for word in words - known if not word.startswith(("on_", "tls_failed"))}
    assert strangers <= {
        *("hook_failed", "node_lapsed", "no_pattern", "too_few_files", "broker_loop_lag_seconds"),
        *("add_subscription", "declare_plain", "max_memory_bytes"),
    }


def shown(name: str, value: Any) -> str:
    if value is None or value == float("inf"):
        return ""
    if name.endswith("_bytes") and name != "max_topic_bytes":
        return f"{value / 2**20:g} MiB" if value >= 2**20 else f"{value / 2**10:g} KiB"
    if name.endswith("_seconds") or name == "history_ttl":
        return f"{value:g} s"
    return f"{value:,g}"


def test_each_limit_is_what_the_setting_has_by_default() -> None:
    compared = 0
    for _, most, setting, *_ in rows(page("reference/limits.md"))[1:]:
        names = re.findall(r"`([a-z_.]+)`", setting)
        for name in names:
            value: Any = Config()
            for part in name.split("."):
                value = (
                    getattr(value, part) if hasattr(value, part) else getattr(TopicRules(), part)
                )
            text = shown(name, value)
            if text:
                assert text in most, (name, text)
                compared += 1
            else:
                assert not re.search(r"\d", most), name
    assert compared > 25


def logged_events() -> Iterator[str]:
    """The names of all lines that the broker's own loggers write."""
    for path in (DOCS.parent / "broker").rglob("*.py"):
        if path.parent.name == "client":  # a library in another program, with lines of its own
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if not ast.unparse(node.func.value).endswith("log") or not node.args:
                continue
            if node.func.attr in {"debug", "info", "warning", "error", "critical", "exception"}:
                names = re.findall(r"'([a-z]+(?:_[a-z]+)*)'", ast.unparse(node.args[0]))
                yield from names


def test_each_line_of_the_log_has_a_row_and_each_row_a_line() -> None:
    listed: set[str] = set()
    for name in ("reference/command-line.md", "howto/logs.md"):
        for table in re.findall(
            r"^\| (?:event|line) \|.*\n\| -.*\n((?:\|.*\n)+)", page(name), re.MULTILINE
        ):
            for cells in rows(table):
                listed |= set(re.findall(r"`(\w+)`", cells[0]))
    logged = set(logged_events())
    assert len(logged) > 60
    assert logged - listed == set()
    # Some have their name from elsewhere, as a text in the source all the same.
    source = "".join(p.read_text("utf-8") for p in (DOCS.parent / "broker").rglob("*.py"))
    assert {name for name in listed if f'"{name}"' not in source} == set()
