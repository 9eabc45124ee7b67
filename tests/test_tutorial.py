"""Each page of the tutorial, and each for those who come from elsewhere, has a program, and below it what that
prints: both are held to it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from broker import Config, TopicRules

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
ELSEWHERE = sorted((DOCS / "coming-from").glob("*.md"))
PAGES = [*sorted((DOCS / "tutorial").glob("*.md")), *ELSEWHERE]
PROGRAMS = [*PAGES, DOCS / "howto" / "nodes.md"]
EXAMPLE = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)


def test_there_is_a_page_for_each_of_our_own_features() -> None:
    assert {page.stem for page in PAGES} >= {
        *("queue-groups", "requests", "publishing", "users"),
        *("retained", "wills", "connections", "http-api"),
    }


@pytest.mark.parametrize("page", ELSEWHERE, ids=[page.stem for page in ELSEWHERE])
def test_a_line_that_stands_for_another_s_is_one_that_runs(page: Path) -> None:
    """In the tables of a page the second column has lines of its program, settings, or what Trio has."""
    text = page.read_text("utf-8")
    example = EXAMPLE.search(text)
    assert example is not None
    program = example[1]
    settings = {field.name for field in (*attrs.fields(Config), *attrs.fields(TopicRules))}
    lines = 0
    for row in re.findall(r"^\| .* \|$", text, re.MULTILINE):
        for code in re.findall(r"`([^`]+)`", row.split(" | ")[1]):
            if not re.match(r"@|await |broker\.|[A-Za-z]+\(|[a-z_]+=", code) or "…" in code:
                continue
            if code == "broker.run()" or code.partition(" ")[0] in settings:
                continue
            lines += 1
            assert all(part in program for part in code.split(", broker.")), code
    assert lines > 1


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
