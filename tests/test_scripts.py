"""The client and the sample scripts against the real broker.

In memory and on virtual time where only our own code takes part; the scripts run as processes of
their own, over a real socket.
"""

import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from broker import Broker, Config
from broker.cli.default_app import create
from broker.client import Client, Join, Leave, PresenceStats, open_client
from broker.core.messages import Publication
from broker.errors import ErrorCode, RequestFailed, Unavailable
from broker.testing import Network, open_test_broker
from broker.transport.listeners import open_listeners

ROOT = Path(__file__).parent.parent


@asynccontextmanager
async def client_of(net: Network) -> AsyncIterator[Client]:
    async def open_stream(host: str, port: int) -> trio.abc.Stream:
        return await net.listener.connect()

    async with open_client("ws://test", open_stream=open_stream) as client:
        yield client


# The client and the broker, in memory.


async def test_publish_reaches_topic_and_pattern(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net, client_of(net) as a, client_of(net) as b:
        assert (a.fd, b.fd) == (1, 2)
        async with b.subscribe("news") as exact, b.subscribe(">") as everything:
            await a.publish("news", {"text": "你好"})
            await a.publish("news", 2, reply=False)
            got = [await anext(exact), await anext(exact)]
            assert [each.value for each in got] == [{"text": "你好"}, 2]
            assert [each.offset for each in got] == [1, 2]
            assert got[0].info is not None
            assert got[0].info.client == "1"
            assert (await anext(everything)).topic == "news"
            assert everything.position is None


async def test_a_direct_message_reaches_one_fd_and_says_who_sent_it(
    autojump_clock: MockClock,
) -> None:
    broker = Broker()
    async with open_test_broker(broker) as net, client_of(net) as a, client_of(net) as b:
        await a.push(b.fd, "hello")
        message = await anext(b.messages)
        assert (message.topic, message.value) == ("fd:2", "hello")
        assert message.info is not None
        assert message.info.client == "1"
        broker.push(b.fd, {"from": "the app"})
        assert await anext(b.messages) == Publication("fd:2", b'{"from":"the app"}')
        with pytest.raises(RequestFailed) as caught:
            await a.push(99, "hello")
        assert caught.value.code == ErrorCode.UNKNOWN_CHANNEL


async def test_presence_join_leave_history_and_rpc(autojump_clock: MockClock) -> None:
    broker = Broker()

    @broker.on_rpc
    async def answer(connection: object, method: str, data: object) -> object:
        return [method, data]

    async with open_test_broker(broker) as net, client_of(net) as a:
        async with a.subscribe("news", join_leave=True) as watching:
            async with client_of(net) as b, b.subscribe("news"):
                assert set(await a.presence("news")) == {"1", "2"}
                assert (await a.presence_stats("news")).num_clients == 2
                await b.publish("news", 1)
            seen = [await anext(watching) for _ in range(3)]
            while isinstance(seen[0], Join) and seen[0].info.client == "1":
                seen = [*seen[1:], await anext(watching)]
        assert isinstance(seen[0], Join)
        assert isinstance(seen[1], Publication)
        assert isinstance(seen[2], Leave)
        assert seen[0].info.client == seen[2].info.client == "2"
        assert await a.presence_stats("news") == PresenceStats(0, 0)
        await a.publish("news", 2)
        page = await a.history("news")
        assert [each.value for each in page.publications] == [1, 2]
        assert page.position.offset == 2
        newest = await a.history("news", limit=1, reverse=True)
        assert [each.value for each in newest.publications] == [2]
        assert await a.rpc("add", [1]) == ["add", [1]]


async def test_publications_missed_while_away_arrive_once(autojump_clock: MockClock) -> None:
    broker = Broker()
    async with open_test_broker(broker) as net, client_of(net) as a:
        async with a.subscribe("news") as subscription:
            broker.publish_nowait("news", 1)
            broker.disconnect(a.fd, 3011, "force reconnect")
            broker.publish_nowait("news", 2)
            await wait_all_tasks_blocked()
            broker.publish_nowait("news", 3)
            await a.publish("news", 4)
            assert [(await anext(subscription)).value for _ in range(4)] == [1, 2, 3, 4]
            assert subscription.gaps == 0
            assert subscription.recovered
            position = subscription.position
            assert a.fd == 2
        await a.publish("news", 5)
        async with a.subscribe("news", since=position) as subscription:
            assert (await anext(subscription)).value == 5


async def test_missing_more_than_is_kept_is_a_gap(autojump_clock: MockClock) -> None:
    broker = Broker()
    async with open_test_broker(broker) as net, client_of(net) as a:
        async with a.subscribe("news") as subscription:
            broker.disconnect(a.fd, 3011, "force reconnect")
            await wait_all_tasks_blocked()
            for number in range(150):
                broker.publish_nowait("news", number)
            await trio.sleep(30)
            broker.publish_nowait("news", "last")
            assert (await anext(subscription)).value == "last"
            assert subscription.gaps == 1


async def test_a_client_that_says_nothing_stays_connected(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net, client_of(net) as a:
        await trio.sleep(3600)
        assert a.fd == 1
        assert a.connected


async def test_sent_away_for_good_the_client_stays_away(autojump_clock: MockClock) -> None:
    broker = Broker()
    async with open_test_broker(broker) as net, client_of(net) as a:
        broker.disconnect(a.fd)
        with pytest.raises(Unavailable, match="3503"):
            await anext(a.messages)
        await trio.sleep(60)
        assert broker.connections() == []


async def test_leaving_is_a_normal_close(autojump_clock: MockClock) -> None:
    broker = Broker()
    closes: list[int] = []

    @broker.on_close
    async def closed(connection: object, close: object) -> None:
        closes.append(close.code)  # type: ignore[attr-defined]

    async with open_test_broker(broker) as net:
        async with client_of(net):
            began = trio.current_time()
        assert trio.current_time() == began
        await wait_all_tasks_blocked()
    assert closes == [1000]


# The scripts.


@asynccontextmanager
async def served(broker: Broker | None = None) -> AsyncIterator[str]:
    """A broker on a port of its own, by default the built-in one; its URL."""
    config = Config(host="127.0.0.1", port=0)
    broker = broker or create(config)
    broker.config = config
    listeners = await open_listeners(broker.config)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            [url] = await nursery.start(partial(broker.serve, listeners=listeners))
            yield url
            broker.stop()


class Script:
    """A sample script that runs."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self._seen = b""

    async def line(self) -> str:
        assert self.process.stdout is not None
        while b"\n" not in self._seen:
            data = await self.process.stdout.receive_some()
            assert data, f"ended after {self._seen!r}"
            self._seen += data
        line, self._seen = self._seen.split(b"\n", 1)
        return line.decode()

    async def type(self, line: str) -> None:
        assert self.process.stdin is not None
        await self.process.stdin.send_all(line.encode() + b"\n")


@asynccontextmanager
async def running(name: str, url: str, *args: str) -> AsyncIterator[Script]:
    async with trio.open_nursery() as nursery:
        process = await nursery.start(
            partial(
                trio.run_process,
                [sys.executable, str(ROOT / "clients" / name), "--url", url, *args],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                check=False,
                env={"PYTHONPATH": str(ROOT)},
            )
        )
        async with process.stdin, process.stdout:
            yield Script(process)
            nursery.cancel_scope.cancel()


async def run(name: str, url: str, *args: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a script that ends by itself."""
    done = await trio.run_process(
        [sys.executable, str(ROOT / "clients" / name), "--url", url, *args],
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        env={"PYTHONPATH": str(ROOT)},
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


async def test_article_prints_the_three_lines() -> None:
    async with served() as url:
        assert await run("article.py", url, "--wait", "0") == (
            0,
            "client：打开连接\nclient：接收到服务端的消息 this is server\nclient：关闭连接\n",
            "",
        )


async def test_article_closes_5_s_after_the_answer(
    mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    from clients import article

    mock_clock.rate = 50  # there are real sockets, so time must pass, but it may hurry
    broker = create(Config())
    times: list[float] = []

    @broker.on_open
    async def opened(connection: object) -> None:
        times.append(trio.current_time())

    async with served(broker) as url:
        await article.main(url)
        times.append(trio.current_time())
    assert 5 <= times[1] - times[0] < 20
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("client：")]
    assert lines == [
        "client：打开连接",
        "client：接收到服务端的消息 this is server",
        "client：关闭连接",
    ]


async def test_publish_and_subscribe_print_topic_offset_data() -> None:
    async with served() as url:
        assert await run("publish.py", url, "news", "你好") == (0, "", "")
        async with running("subscribe.py", url, "news", "--history") as script:
            assert await script.line() == 'news 1 "你好"'
            assert (await run("publish.py", url, "news", '{"a":[1,2]}'))[0] == 0
            assert await script.line() == 'news 2 {"a":[1,2]}'


async def test_subscribe_takes_a_pattern() -> None:
    broker = Broker()
    async with served(broker) as url, running("subscribe.py", url, "news.*") as script:
        while not any("news.*" in info.topics for info in broker.connections()):  # noqa: ASYNC110
            await trio.sleep(0.01)  # another process: nothing here tells when it is ready
        broker.publish_nowait("news.sport", 1)
        assert await script.line() == "news.sport 1 1"


async def test_direct_prints_its_fd_and_what_is_sent_to_it() -> None:
    async with served() as url, running("direct.py", url) as script:
        found = re.fullmatch(r"fd (\d+)", await script.line())
        assert found
        assert await run("direct.py", url, found[1], "hello") == (0, "", "")
        assert await script.line() == f'from {int(found[1]) + 1}: "hello"'


async def test_direct_to_nobody_is_one_line_and_status_1() -> None:
    async with served() as url:
        refusal = "direct: 102: no connection has fd 99\n"
        assert await run("direct.py", url, "99", "hi") == (1, "", refusal)


async def test_two_people_chat() -> None:
    async with (
        served() as url,
        running("chat.py", url, "--name", "Alice") as alice,
        running("chat.py", url, "--name", "张三") as bob,
    ):

        async def skip_to(script: Script, wanted: str) -> None:
            while await script.line() != wanted:
                pass

        found = [
            re.fullmatch(r"you are (Alice|张三)\((\d+)\) in lobby", await script.line())
            for script in (alice, bob)
        ]
        assert found[0]
        assert found[1]
        a, b = found[0][2], found[1][2]
        await alice.type("hi")
        await skip_to(alice, f"[lobby] Alice({a}): hi")
        await bob.type("你好")
        await skip_to(alice, f"[lobby] 张三({b}): 你好")
        await alice.type(f"/to {b} just for you")
        await skip_to(bob, f"(direct from {a}) just for you")
        await alice.type("/to 99 anybody?")
        await skip_to(alice, "(refused: no connection has fd 99)")
        await alice.type("/who")
        await skip_to(alice, f"here: {' '.join(sorted([a, b]))}")
        await bob.type("/quit")
        assert await bob.process.wait() == 0
        await skip_to(alice, f"[lobby] {b} left")
        assert alice.process.stdin is not None
        await alice.process.stdin.aclose()
        assert await alice.process.wait() == 0


SLIPS = {
    "/to bob secret": "(not sent: /to needs the number of one person: /to FD TEXT; /who)",
    "/to": "(not sent: /to needs the number of one person: /to FD TEXT; /who)",
    "/to 7": "(not sent: the text for 7 is missing: /to 7 TEXT)",
    "  /to 7  ": "(not sent: the text for 7 is missing: /to 7 TEXT)",
    "/to -7 secret": "(not sent: /to needs the number of one person: /to FD TEXT; /who)",
    "/to fd:7 secret": "(not sent: /to needs the number of one person: /to FD TEXT; /who)",
    "/to 7: secret": "(not sent: /to needs the number of one person: /to FD TEXT; /who)",
    f"/to {'9' * 5000} secret": "(not sent: /to needs the number of one person: /to FD TEXT; /who)",
    "/to 999 secret": "(refused: no connection has fd 999)",
    "/to 0 secret": "(not sent: /to needs the number of one person: /to FD TEXT; /who)",
    **{
        line: f"(not sent: {word} is no command: /to FD TEXT, /who or /quit; "
        "begin with // to say it to the room)"
        for line, word in {
            "/tо 7 secret": r"'/t\u043e'",  # a Cyrillic o
            "/To 7 secret": "'/To'",
            "/to7 secret": "'/to7'",
            "/msg 7 secret": "'/msg'",
            "/ to 7 secret": "'/'",
            "/": "'/'",
            "／to 7 secret": r"'\uff0fto'",
            "\ufeff/msg secret": "'/msg'",
            " \u200b /msg secret": "'/msg'",
            "/quit now, secret": "'/quit'",
            "/who is secret": "'/who'",
            "/\x1b[2J secret": r"'/\x1b[2J'",
        }.items()
    },
}
"""Lines of people who mean one person or a command, and the answers to them."""


async def test_a_slip_never_goes_to_the_room_and_the_error_names_what_would_be_right(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    from clients import chat

    async with (
        open_test_broker(Broker()) as net,
        client_of(net) as alice,
        client_of(net) as bob,
        bob.subscribe("room.lobby") as room,
    ):
        for line, answer in SLIPS.items():
            await chat.try_to_obey(line, alice, "room.lobby", "Alice")
            assert capsys.readouterr().out == f"{answer}\n", line
        said = {"hi": "hi", "//to bob": "/to bob", "//": "/", " a/b ": " a/b ", "1/2": "1/2"}
        for line, text in said.items():
            await chat.try_to_obey(line, alice, "room.lobby", "Alice")
            assert (await anext(room)).value == {"name": "Alice", "text": text}
        for line in (
            f"/to {bob.fd} for  you ",
            f" /to\t{bob.fd} for  you",
            f"/to 0{bob.fd} for  you",
        ):
            await chat.try_to_obey(line, alice, "room.lobby", "Alice")
            assert (await anext(bob.messages)).value == {"name": "Alice", "text": "for  you"}
        for line in ("", "   ", "\ufeff", "\u200b"):
            await chat.try_to_obey(line, alice, "room.lobby", "Alice")
        await chat.try_to_obey("/who", alice, "room.lobby", "Alice")
        assert capsys.readouterr().out == f"here: {bob.fd}\n"
        page = await alice.history("room.lobby")
        assert [each.value["text"] for each in page.publications] == [*said.values()]  # type: ignore[index]


NASTY = "\x1b[2J\x9b31m\u2028\u202e\r\n[lobby] Bob(1): forged \ud83d"


async def test_a_publication_of_others_is_printed_as_text_of_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    from clients import chat, subscribe

    nasty = Publication(NASTY[:9], msgspec.json.encode({"name": NASTY[:-1], "text": NASTY[:-1]}))
    half = Publication("room", b'{"text":"\\ud83d"}')
    deep = Publication("room", b"[" * 5000 + b"]" * 5000)
    other = Publication("room", b'{"name":{"a":1},"text":["\\u001b"]}')
    for each in (nasty, half, deep, other):
        line = chat.said(each, "{name}({fd}): {text}")
        assert not any(sign in line for sign in "\x1b\x9b\u2028\u202e\r\n")
    assert "cannot be shown" in chat.said(deep, "{text}")
    subscribe.show(nasty)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "\x1b" not in out
    assert "\x9b" not in out


async def test_two_people_chat_with_half_a_surrogate_pair_and_a_last_line_without_its_end() -> None:
    broker = Broker()
    async with served(broker) as url, running("chat.py", url, "--name", "Alice") as alice:
        await alice.line()
        broker.publish_nowait("room.lobby", msgspec.Raw(rb'"half \ud83d \u001b[2J"'))
        while (line := await alice.line()).endswith("joined"):
            pass
        assert line == "[lobby] somebody(server): half \ufffd \\x1b[2J"
        assert alice.process.stdin is not None
        await alice.process.stdin.send_all(b"/to bob secret")
        await alice.process.stdin.aclose()
        while not (line := await alice.line()).startswith("(not sent: /to needs"):
            assert "secret" not in line
        assert await alice.process.wait() == 0


@pytest.mark.parametrize(
    "name, args", [("publish.py", ["a", "\udcff"]), ("direct.py", ["1", "\udcff"])]
)
async def test_data_that_is_no_text_is_one_line(name: str, args: list[str]) -> None:
    status, out, err = await run(name, "ws://127.0.0.1:1", *args)
    assert (status, out) == (2, "")
    assert "invalid value value" in err


async def test_chat_ends_with_one_line_when_sent_away(capfd: pytest.CaptureFixture[str]) -> None:
    broker = Broker()
    async with served(broker) as url, running("chat.py", url, "--name", "Alice") as alice:
        await alice.line()
        broker.disconnect(1, 3503, "out")
        assert await alice.process.wait() == 1
    lines = capfd.readouterr().err.splitlines()  # the broker's own log is among them
    assert [line for line in lines if line.startswith("chat")] == ["chat: 3503: out"]


@pytest.mark.parametrize(
    "name, args",
    [
        ("article.py", []),
        ("chat.py", []),
        ("publish.py", ["news", "1"]),
        ("subscribe.py", ["news"]),
        ("direct.py", []),
    ],
)
async def test_a_broker_that_is_not_there_is_one_line_and_status_1(
    name: str, args: list[str]
) -> None:
    with trio.socket.socket() as taken:
        await taken.bind(("127.0.0.1", 0))  # bound and not listening
        url = f"ws://127.0.0.1:{taken.getsockname()[1]}"
        status, out, err = await run(name, url, *args)
    assert (status, out) == (1, "")
    assert re.fullmatch(rf"(\w+: )?cannot connect to {url}: .*refused\n", err), err
