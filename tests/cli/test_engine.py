"""`python -m broker engine`, and what `--engine` says about a file that cannot be used."""

import sqlite3
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner, Result

from broker.cli.main import main
from broker.config.engine_url import parse_engine_url
from broker.config.settings import TopicRules
from broker.engines.sqlite import open_sqlite
from broker.testing import Witness

# The command sets up the log of its process, which is that of all tests here.
pytestmark = pytest.mark.usefixtures("logging_restored")

ROOM = 2**24


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["engine", *arguments])


def fill(path: Path) -> None:
    async def publish() -> None:
        url = parse_engine_url(f"sqlite:{path}")
        async with open_sqlite(url, ROOM, ROOM, lambda: trio.current_time() + 1e9, 5) as engine:
            witness = Witness(engine)
            async with engine.running(witness):
                rules = TopicRules(history_size=3, history_ttl=1e12)
                for number in range(40):
                    await witness.published("a", b"%d" % number * 20_000, rules=rules)
                await witness.published("b", b"1", rules=rules, retain=True)

    trio.run(publish)


def test_check_says_what_a_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    fill(path)
    result = run("check", str(path))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(
        f"{path}: whole; 4 publications in 2 topics, 1 retained values, 0 keys; the next fd is 5; "
    )
    assert result.stdout.endswith("closed in good order\n")


def test_compact_gives_back_what_is_not_needed(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    fill(path)
    before = path.stat().st_size
    result = run("compact", str(path))
    assert result.exit_code == 0, result.output
    assert path.stat().st_size < before / 5
    assert "4 publications in 2 topics, 1 retained" in run("check", str(path)).stdout


def test_a_file_that_is_damaged_or_none_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    for command in ("check", "compact"):
        missing = run(command, str(tmp_path / "nowhere.db"))
        assert (missing.exit_code, len(missing.stderr.splitlines())) == (2, 1)
        assert "there is no such file" in missing.stderr
    assert not (tmp_path / "nowhere.db").exists()
    path.write_text("a letter")
    for command in ("check", "compact"):
        assert run(command, str(path)).exit_code == 2
    path.unlink()
    fill(path)
    whole = bytearray(path.read_bytes())
    place = whole.index(b"39" * 100)  # within what was published last
    whole[place : place + 1] = b"4"
    path.write_bytes(whole)
    damaged = run("check", str(path))
    assert damaged.exit_code == 2
    assert "is damaged" in damaged.stderr
    assert len(damaged.stderr.splitlines()) == 1


def test_a_row_that_is_not_ours_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    fill(path)
    db = sqlite3.connect(path)
    db.execute("UPDATE log SET records = x'00000001ff' WHERE seq = 2")
    db.commit()
    db.close()
    result = run("check", str(path))
    assert result.exit_code == 2
    assert "is damaged" in result.stderr


def test_a_broker_whose_file_cannot_be_used_does_not_start(tmp_path: Path) -> None:
    letter = tmp_path / "letter"
    letter.write_text("dear editor, " * 100)
    result = CliRunner().invoke(main, ["--port", "0", "--engine", f"sqlite:{letter}"])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line == f"Error: engine: {letter} is not a database; name another file"


@pytest.mark.parametrize("url", ["redes://x", "sqlite:", "sqlite:x?sync=never", "sqlite"])
def test_what_names_no_engine_is_told_what_would(url: str) -> None:
    result = CliRunner().invoke(main, ["--port", "0", "--engine", url])
    assert result.exit_code == 2
    assert "must be" in result.stderr or "stands sync=" in result.stderr
