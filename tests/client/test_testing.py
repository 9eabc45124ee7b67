"""The fake broker does what the how-to says."""

import re
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from broker.client.testing import FakeBroker

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "test.md"


async def test_the_how_to_says_what_is_true(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    (code,) = [
        code
        for code in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
        if "broker.client.testing" in code
    ]
    page: dict[str, Any] = {}
    exec(code, page)
    await page["test_a_lost_line_costs_nothing"](nursery, autojump_clock)


async def test_another_command_than_expected_is_an_assertion_error(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        await client.send("hello")
        with pytest.raises(AssertionError, match="expected publish, got"):
            await peer.expect("publish")
