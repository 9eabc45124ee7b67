"""The code in the docs does what the docs say."""

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from trio.testing import MockClock

DOCS = Path(__file__).parent.parent / "docs"


def first_code(page: str) -> str:
    found = re.search(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


async def test_the_tutorials_broker_passes_the_test_of_the_how_to(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    hello = ModuleType("hello")
    exec(first_code("tutorial.md"), vars(hello))
    monkeypatch.setitem(sys.modules, "hello", hello)
    page: dict[str, Any] = {}
    exec(first_code("howto/test.md"), page)
    (test,) = [value for name, value in page.items() if name.startswith("test_")]
    await test(autojump_clock)
