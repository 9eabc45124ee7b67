"""The code in the docs does what the docs say."""

import re
import sys
from importlib import import_module
from math import inf
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from broker import Config

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"


def codes(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL)


async def test_the_tutorials_broker_passes_the_test_of_the_how_to(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    hello = ModuleType("hello")
    exec(codes("tutorial.md")[0], vars(hello))
    monkeypatch.setitem(sys.modules, "hello", hello)
    code, _ = codes("howto/test.md")
    await its_test(code)(autojump_clock)


async def test_the_client_passes_the_other_test_of_the_how_to(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    _, code = codes("howto/test.md")
    await its_test(code)(nursery, autojump_clock)


def its_test(code: str) -> Any:
    page: dict[str, Any] = {}
    exec(code, page)
    (test,) = [value for name, value in page.items() if name.startswith("test_")]
    return test


# the table of budgets

BUDGETS = (DOCS / "design" / "budgets.md").read_text("utf-8")


def in_words(name: str, value: object) -> str:
    """A bound as the page says it."""
    if value is None:
        return "unset"
    assert isinstance(value, int | float)
    if value == inf:
        return "off"
    if "_seconds" in name.lower():
        return f"{value:g} s"
    if name.lower().endswith("_bytes"):
        return f"{value / 2**20:g} MiB" if value >= 2**20 else f"{value / 2**10:g} KiB"
    return f"{value:,g}"


def bound_of(name: str) -> object:
    """The default of a setting, or a constant as `core.memory.FREE_BYTES`."""
    place, _, last = name.rpartition(".")
    if last.isupper():
        return getattr(import_module(f"broker.{place}"), last)
    config: object = Config()
    for part in name.split("."):
        config = getattr(config, part)
    return config


def test_the_bounds_that_are_named_are_those_that_hold() -> None:
    named = re.findall(r"`([a-z_.]+(?:\.[A-Z_]+)?)` \(([^)]+)\)", BUDGETS)
    assert len(named) > 50
    wrong = [(name, said) for name, said in named if in_words(name, bound_of(name)) != said]
    assert wrong == []


def test_the_tests_that_prove_a_bound_are_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", BUDGETS))
    assert len(named) > 80
    sources = "\n".join(path.read_text("utf-8") for path in TESTS.rglob("test_*.py"))
    assert named - set(re.findall(r"^ *(?:async )?def (test_\w+)", sources, re.MULTILINE)) == set()


def test_every_bound_has_a_test() -> None:
    rows = [line for line in BUDGETS.splitlines() if line.startswith("| ") and "---" not in line]
    bare = [row for row in rows if "`test_" not in row and not row.endswith("| tests |")]
    assert bare == []
