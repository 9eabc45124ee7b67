"""Each page of the tutorial has a program, and below it what that prints: both are held to it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "tutorial").glob("*.md"))
PROGRAMS = [*PAGES, ROOT / "docs" / "howto" / "nodes.md"]
EXAMPLE = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)


def test_there_is_a_page_for_each_of_our_own_features() -> None:
    assert {page.stem for page in PAGES} >= {
        *("queue-groups", "requests", "publishing", "users"),
        *("retained", "wills", "connections", "http-api"),
    }


@pytest.mark.parametrize("page", PROGRAMS, ids=[page.stem for page in PROGRAMS])
def test_an_example_prints_what_its_page_says(page: Path) -> None:
    example = EXAMPLE.search(page.read_text("utf-8"))
    assert example is not None, "no program with its output"
    program, output = example.groups()
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (result.stdout, result.stderr) == (output, "")
    assert result.returncode == 0
