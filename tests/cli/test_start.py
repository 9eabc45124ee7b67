"""`broker.cli.start`: standard streams that are closed, and files that hide a module."""

import os
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pytest
import trio

from broker.cli import start

if TYPE_CHECKING:
    from tests.cli.conftest import Running

    Runner: TypeAlias = Callable[..., AbstractAsyncContextManager[Running]]


@pytest.mark.parametrize(
    "file, text",
    [
        ("token.py", ""),
        ("click.py", ""),
        ("structlog.py", "x = 1"),
        ("trio/__init__.py", ""),
        ("queue.py", "class Empty(Exception): pass"),
        ("msgspec.py", "raise AttributeError('of its own')"),
        ("attrs.py", "raise ValueError('of its own')"),
    ],
)
async def test_a_file_that_hides_a_module_is_named_in_one_line(
    running: "Runner", tmp_path: Path, file: str, text: str
) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    async with running("--version", cwd=tmp_path) as it:
        assert await it.process.wait() == 2
        line = await it.wait_for("Error: ")
    name = file.partition("/")[0]
    shown = name + "/" if "/" in file else name
    assert line.startswith(f"Error: {shown} in this directory hides the module ")
    assert it.stderr.count(b"\n") == 1


async def test_a_file_that_hides_nothing_is_left_alone(running: "Runner", tmp_path: Path) -> None:
    for name in ("chat.py", "broker.txt", "antigravity.py"):
        (tmp_path / name).write_text("raise AttributeError")
    async with running("--version", cwd=tmp_path) as it:
        assert await it.process.wait() == 0


@pytest.mark.parametrize("name", ["broker.py", "broker/__init__.py"])
async def test_an_app_of_our_own_name_is_told_so(
    running: "Runner", tmp_path: Path, name: str
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("app = 1")
    # As the installed script does it: the working directory is not looked in first.
    async with running("broker:app", cwd=tmp_path, command=SAFE) as it:
        assert await it.process.wait() == 2
        line = await it.wait_for("Error: ")
    shown = name.removesuffix("__init__.py")
    assert line == (
        f"Error: 'broker:app': {shown} has the name of this package, which hides it; rename it\n"
    )


async def test_an_app_with_the_name_of_a_loaded_module_is_told_so(
    running: "Runner", tmp_path: Path
) -> None:
    (tmp_path / "token.py").write_text("broker = 1")
    async with running("token:broker", cwd=tmp_path, command=SAFE) as it:
        assert await it.process.wait() == 2
        line = await it.wait_for("Error: ")
    assert line.startswith("Error: 'token:broker': token.py has the name of the module at /")


SAFE = (sys.executable, "-P", "-m", "broker")


def test_the_working_directory_of_ourselves_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(start.__file__).parents[2])
    error = ImportError("x", name="broker.cli.main", path=start.__file__)
    assert start.hiding_file(error) is None


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
async def test_a_closed_standard_stream_is_dev_null(closed: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = (
        "from broker.cli.start import open_standard_streams\n"
        "import os, sys\n"
        "open_standard_streams()\n"
        "first = os.open('/dev/null', os.O_RDONLY)\n"
        "print('lost', file=sys.stderr)\n"
        "sys.stdout.write('lost')\n"
        "streams = [sys.stdin, sys.stdout, sys.stderr]\n"
        f"open({str(out)!r}, 'w').write(repr([first, *[s.fileno() for s in streams]]))\n"
    )
    process = await trio.run_process(
        ["sh", "-c", f'exec {sys.executable} -c "$0" {closed}', code],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_stdout=True,
        capture_stderr=True,
    )
    assert out.read_text() == "[3, 0, 1, 2]"
    assert process.stderr in (b"", b"lost\n")
