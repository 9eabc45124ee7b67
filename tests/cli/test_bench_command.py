"""The command `bench`: the table that it prints."""

import sys

import trio

from tests.cli.conftest import serving


async def test_the_table_says_what_was_asked_and_what_was_seen() -> None:
    async with serving() as url:
        process = await trio.run_process(
            [sys.executable, "-m", "broker", "bench", "--url", url, "--messages", "10"],
            capture_stdout=True,
            capture_stderr=True,
        )
    assert process.stderr == b""
    lines = process.stdout.decode().splitlines()
    assert lines[0].startswith("1 → 1, 64 B, as fast as delivered: ")
    assert lines[2].split()[:2] == ["delivered", "10"]
    assert lines[3].startswith("latency, ms  p50 ")
