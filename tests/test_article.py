"""The article, retold: both of its programs, in both languages, print what its page says."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PATIENCE
from tests.ports import free_port

ROOT = Path(__file__).parent.parent
PAGES = ["article.md", "article.zh.md"]


def program(page: str, language: str) -> str:
    text = (ROOT / "docs" / page).read_text("utf-8")
    found = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


def printed(page: str) -> tuple[list[str], list[str]]:
    """The lines of server and page, as the table has them; on both sides the same."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    table = re.findall(r"^\| (.+?) \| `(.+?)` \| `(.+?)` \|$", text, re.MULTILINE)
    assert len(table) == 7
    assert all(theirs == ours for _, theirs, ours in table)
    server = [line for who, line, _ in table if who.startswith(("server", "服务器"))]
    return server, [line for _, line, _ in table if line not in server]


def test_both_languages_have_the_same_programs_and_lines() -> None:
    for language in ("python", "javascript"):
        assert len({program(page, language) for page in PAGES}) == 1
    assert printed(PAGES[0]) == printed(PAGES[1])


@pytest.mark.sdk
@pytest.mark.parametrize("page", PAGES)
def test_server_and_page_print_the_lines_of_the_table(
    page: str, node: list[str], tmp_path: Path
) -> None:
    port = free_port()

    def written(language: str, name: str) -> Path:
        code = program(page, language).replace("9501", str(port)).replace("5000", "50")
        (tmp_path / name).write_text(code, "utf-8")
        return tmp_path / name

    server = subprocess.Popen(
        [sys.executable, str(written("python", "article.py"))],
        env={"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", "PATH": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    try:
        assert server.stderr is not None
        for line in server.stderr:  # it ends where the process does
            if "ready on" in line:
                break
        client = subprocess.run(
            [*node, str(written("javascript", "page.mjs"))],
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=3 * PATIENCE,
            check=False,
        )
        server.send_signal(signal.SIGINT)
        output, errors = server.communicate(timeout=PATIENCE)
    finally:
        server.kill()
        server.wait()
    lines, said = printed(page)
    assert client.stdout.splitlines() == said, client.stderr
    assert output.splitlines() == lines
    assert server.returncode == 0
    assert "Traceback" not in errors
