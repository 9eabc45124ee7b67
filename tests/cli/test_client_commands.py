"""`broker.cli.client_commands` as processes: what they print, and the exit status."""

import json
import signal
import socket
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pytest
import trio

if TYPE_CHECKING:
    from tests.cli.conftest import Running

    Runner: TypeAlias = Callable[..., AbstractAsyncContextManager[Running]]
    Run: TypeAlias = Callable[..., Awaitable[tuple[int, str, str]]]

SERVE = ("--port", "0", "--log-format", "json")


async def test_pub_reaches_sub_and_ctrl_c_ends_sub_with_130(running: "Runner", run: "Run") -> None:
    async with running(*SERVE) as broker:
        url = await broker.url()
        async with (
            running("sub", "news.*", "--url", url) as text,
            running("sub", "news.a", "--url", url, "--json") as as_json,
        ):
            # Subscribed when the broker says so; until then what is published is not theirs.
            published = 0
            while b"\n" not in text.stdout or b"\n" not in as_json.stdout:
                published += 1
                assert await run("pub", "news.a", '{"n": [1, 2]}', "--url", url) == (0, "", "")
            line = (await text.wait_for("news.a", into="stdout")).split(" ", 2)
            assert line[0] == "news.a"
            assert 1 <= int(line[1]) <= published
            assert line[2] == '{"n":[1,2]}\n'
            fields = json.loads(await as_json.wait_for("news.a", into="stdout"))
            assert fields["topic"] == "news.a"
            assert fields["data"] == {"n": [1, 2]}
            assert await text.stop(signal.SIGINT) == 130
            assert await as_json.stop(signal.SIGTERM) == 130
            assert text.stderr == as_json.stderr == b""


async def test_data_that_is_not_json_goes_as_a_string(running: "Runner", run: "Run") -> None:
    async with running(*SERVE) as broker:
        url = await broker.url()
        async with running("sub", "a", "--url", url) as sub:
            while b"\n" not in sub.stdout:
                assert (await run("pub", "a", "not json\x1b[2J", "--url", url))[0] == 0
            assert (await sub.wait_for("a ", into="stdout")).endswith(' "not json\\u001b[2J"\n')


async def test_a_refusal_of_the_broker_is_one_line_and_status_1(
    running: "Runner", run: "Run"
) -> None:
    async with running(*SERVE) as broker:
        url = await broker.url()
        status, out, err = await run("push", "4711", "hello", "--url", url)
        assert (status, out) == (1, "")
        assert err.startswith("Error: push to fd 4711: the broker refused: ")
        assert err.count("\n") == 1
        status, out, err = await run("pub", "news.*", "hello", "--url", url)
        assert (status, out) == (1, "")
        assert err.startswith("Error: publish to 'news.*': the broker refused: ")


@pytest.mark.parametrize(
    "code, told",
    [
        (100, "the broker refused: not you (100) (trying again may help)"),
        (103, "103: not you"),  # for good: the client has no connection any more
    ],
)
async def test_a_refusal_for_now_says_so_and_not_that_nobody_is_there(
    running: "Runner", run: "Run", tmp_path: Path, code: int, told: str
) -> None:
    (tmp_path / "refusing_app.py").write_text(
        "from broker import Broker, Config, Refused\n"
        "broker = Broker(Config(port=0, log_format='json'))\n"
        "@broker.on_connect\n"
        "async def refuse(event):\n"
        f"    raise Refused({code}, 'not you')\n"
    )
    async with running("refusing_app:broker", cwd=tmp_path) as broker:
        status, out, err = await run("pub", "news", "1", "--url", await broker.url())
    assert (status, out) == (1, "")
    assert err == f"Error: {told}\n"


async def test_a_signal_before_an_answer_ends_a_command_as_shells_have_it(
    running: "Runner",
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"ws://127.0.0.1:{silent.getsockname()[1]}"
        for number in (signal.SIGINT, signal.SIGTERM):
            async with running("pub", "news", "1", "--url", url) as it:
                peer, _ = await trio.to_thread.run_sync(silent.accept)
                with peer:
                    assert await it.stop(number) == 128 + number
                assert it.stderr == it.stdout == b""
