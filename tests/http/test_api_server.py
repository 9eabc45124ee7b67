"""Backends keep their connection: requests under `/api` one after another, and how that ends."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import structlog
import trio
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from trio.testing import (
    MockClock,
    lockstep_stream_pair,
    memory_stream_pair,
    wait_all_tasks_blocked,
)

from broker import Broker, Config, TopicRules
from broker.core.memory import MemoryBudget, Part
from broker.engines import memory
from broker.http import api_server
from broker.http.api import Api, ApiResponse
from broker.http.api_server import IDLE_SECONDS, IDLE_SLACK, SEND_BYTES, SMALL, BackendServer
from broker.routing.turns import Share
from broker.testing import MakePair, Network, open_test_broker
from broker.transport.sockets import write_now

KEY = "s3cret"
INFO = b"{}"


class Backend:
    """One connection, and a parser of its own for what comes back."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._buffer = b""

    async def send(
        self, target: str, body: bytes = INFO, key: str = KEY, *fields: str, method: str = "POST"
    ) -> None:
        await self.stream.send_all(request(target, body, key, *fields, method=method))

    async def receive(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the next answer."""
        while b"\r\n\r\n" not in self._buffer:
            await self._more()
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        length = int(headers["content-length"])
        while len(self._buffer) < length:
            await self._more()
        body, self._buffer = self._buffer[:length], self._buffer[length:]
        return int(first.split()[1]), headers, body

    async def is_over(self) -> bool:
        """Whether the other side ends the connection, with nothing more to say."""
        return not self._buffer and not await self.stream.receive_some()

    async def _more(self) -> None:
        data = await self.stream.receive_some()
        assert data, "the connection ended"
        self._buffer += data


def request(target: str, body: bytes, key: str, *fields: str, method: str = "POST") -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "Host: test", f"X-API-Key: {key}"]
    lines += [f"Content-Length: {len(body)}", *fields]
    return "\r\n".join([*lines, "", ""]).encode() + body


@asynccontextmanager
async def connected(
    broker: Broker | None = None, make_pair: MakePair = memory_stream_pair
) -> AsyncIterator[tuple[Network, Backend]]:
    broker = broker or Broker(Config(api_key=KEY))
    async with open_test_broker(broker) as net, await net.listener.connect(make_pair) as stream:
        yield net, Backend(stream)


def socket_pair() -> tuple[trio.abc.Stream, trio.abc.Stream]:
    """Bare sockets: what is written to one can be read from the other at once."""
    one, other = trio.socket.socketpair()
    return trio.SocketStream(one), trio.SocketStream(other)


def publish(data: object) -> bytes:
    return msgspec.json.encode({"channel": "t", "data": data})


async def test_requests_follow_each_other_on_one_connection(autojump_clock: MockClock) -> None:
    async with connected() as (net, backend):
        for number in (1, 2, 3):
            await backend.send("/api/publish", publish(number))
            status, headers, body = await backend.receive()
            assert (status, headers["content-type"]) == (200, "application/json")
            assert "connection" not in headers
            assert headers["date"].endswith(" gmt")
            assert msgspec.json.decode(body)["result"]["offset"] == number
        assert net.streams == 1


async def test_a_head_that_comes_again_is_judged_again(autojump_clock: MockClock) -> None:
    async with connected() as (net, backend):
        for key, status in ((KEY, 200), ("another", 401)):
            net.broker.reload(Config(api_key=key))
            await backend.send("/api/publish", publish(1))
            assert (await backend.receive())[0] == status


async def test_two_heads_by_turns_are_told_apart(autojump_clock: MockClock) -> None:
    async with connected() as (net, backend):
        for size in (1, 100_000, 2, 100_000, 3):
            await backend.send("/api/publish", publish("x" * size))
            assert (await backend.receive())[0] == 200
            await backend.send("/api/info")
            _, _, body = await backend.receive()
            assert "nodes" in msgspec.json.decode(body)["result"]
        publications, _ = await net.broker.history("t")
        assert [len(str(each.value)) for each in publications] == [1, 100_000, 2, 100_000, 3]


async def test_pipelined_requests_are_answered_in_order(autojump_clock: MockClock) -> None:
    async with connected() as (net, backend):
        both = b"".join(request("/api/publish", publish(n), KEY) for n in (1, 2))
        for size in (1, len(both)):  # a byte at a time, then all at once
            for start in range(0, len(both), size):
                await backend.stream.send_all(both[start : start + size])
            for _ in (1, 2):
                assert (await backend.receive())[0] == 200
        publications, _ = await net.broker.history("t")
        assert [each.value for each in publications] == [1, 2, 1, 2]


@pytest.mark.parametrize(
    "target, body, key, fields, status",
    [
        ("/api/info", INFO, "wrong", (), 401),
        ("/api/nonsense", INFO, KEY, (), 404),
        ("/api/publish", b" " * (2**20 + 1), KEY, (), 413),
        ("/api/info", INFO, KEY, ("Connection: close",), 200),
    ],
)
async def test_the_connection_ends_where_nothing_may_follow(
    autojump_clock: MockClock,
    target: str,
    body: bytes,
    key: str,
    fields: tuple[str, ...],
    status: int,
) -> None:
    async with connected() as (_, backend), trio.open_nursery() as nursery:
        nursery.start_soon(send_ignoring_errors, backend, request(target, body, key, *fields))
        got, headers, _ = await backend.receive()
        assert (got, headers["connection"]) == (status, "close")
        assert await backend.is_over()


async def send_ignoring_errors(backend: Backend, data: bytes) -> None:
    try:
        await backend.stream.send_all(data)
    except trio.BrokenResourceError:
        pass


async def test_a_body_that_is_no_json_does_not_end_it(autojump_clock: MockClock) -> None:
    async with connected() as (_, backend):
        await backend.send("/api/publish", b"{")
        assert (await backend.receive())[0] == 400
        await backend.send("/api/info")
        assert (await backend.receive())[0] == 200


async def test_a_request_that_is_not_for_the_api_is_handed_on_as_the_last(
    autojump_clock: MockClock,
) -> None:
    async with connected() as (_, backend):
        await backend.send("/api/info")
        assert (await backend.receive())[0] == 200
        await backend.send("/healthz", b"", method="GET")
        status, headers, body = await backend.receive()
        assert (status, headers["connection"], body) == (200, "close", b'{"status":"ok"}')
        assert await backend.is_over()


async def test_a_chunked_body_is_read_too(autojump_clock: MockClock) -> None:
    async with connected() as (_, backend):
        await backend.stream.send_all(
            b"POST /api/info HTTP/1.1\r\nHost: test\r\nX-API-Key: s3cret\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
        )
        status, _, body = await backend.receive()
        assert status == 200
        assert b'"nodes"' in body


@pytest.mark.parametrize(
    "second, status",
    [
        (b"POST /api/info HTTP/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01", 400),
        (b"POST /api/info HTTP/3.0\r\nHost: a\r\n\r\n", 505),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 9000, 431),
    ],
)
async def test_a_bad_second_head_is_refused_and_logged_like_a_first(
    autojump_clock: MockClock, second: bytes, status: int
) -> None:
    async with connected() as (net, backend):
        await backend.send("/api/info")
        await backend.receive()
        with structlog.testing.capture_logs() as logs:
            await backend.stream.send_all(second)
            assert (await backend.receive())[0] == status
            assert await backend.is_over()
        [line] = [entry for entry in logs if entry["event"] == "refused"]
        assert (line["status"], line["peer"]) == (status, "memory")
        assert net.broker.stats().refused == 1


@pytest.mark.parametrize("empty", [b"\r\n", b"\r\n\r\n\r\n"])
async def test_empty_lines_between_requests_are_passed_over(
    autojump_clock: MockClock, empty: bytes
) -> None:
    async with connected() as (_, backend):
        whole = request("/api/info", INFO, KEY) + empty
        await backend.stream.send_all(empty + whole + whole)
        for _ in (1, 2):
            assert (await backend.receive())[0] == 200


async def test_a_slash_at_the_end_makes_no_difference(autojump_clock: MockClock) -> None:
    async with connected() as (_, backend):
        await backend.send("/api/info/")
        assert (await backend.receive())[0] == 200
        chunked = "Transfer-Encoding: chunked"
        lines = ["POST /api/info/ HTTP/1.1", "Host: a", f"X-API-Key: {KEY}", chunked, "", ""]
        await backend.stream.send_all("\r\n".join(lines).encode() + b"2\r\n{}\r\n0\r\n\r\n")
        assert (await backend.receive())[0] == 200


async def test_an_idle_connection_ends(autojump_clock: MockClock) -> None:
    async with connected() as (_, backend):
        await backend.send("/api/info")
        await backend.receive()
        before = trio.current_time()
        assert await backend.is_over()
        assert IDLE_SECONDS <= trio.current_time() - before <= IDLE_SECONDS + IDLE_SLACK


async def test_a_busy_connection_is_not_idle(autojump_clock: MockClock) -> None:
    async with connected(None, socket_pair) as (_, backend):
        for pause in (0, 0.5, IDLE_SECONDS - 0.1, 3, IDLE_SECONDS - 0.1):
            await trio.sleep(pause)
            await backend.send("/api/publish", publish(1))
            assert (await backend.receive())[0] == 200
        before = trio.current_time()
        assert await backend.is_over()
        assert IDLE_SECONDS <= trio.current_time() - before <= IDLE_SECONDS + IDLE_SLACK


async def test_a_publish_that_comes_while_the_broker_stops_is_the_last(
    autojump_clock: MockClock,
) -> None:
    async with connected() as (net, backend):
        await backend.send("/api/publish", publish(1))
        assert "connection" not in (await backend.receive())[1]
        net.broker.node.services.draining = True
        await backend.send("/api/publish", publish(2))
        status, headers, _ = await backend.receive()
        assert (status, headers["connection"]) == (200, "close")
        assert await backend.is_over()


@pytest.mark.parametrize("size, charged", [(SMALL - 100, 0), (SMALL + 100, SMALL + 100)])
async def test_a_body_of_some_size_is_charged(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, size: int, charged: int
) -> None:
    most = 0
    charge = MemoryBudget.charge

    def noted(self: MemoryBudget, part: Part, more: int) -> None:
        nonlocal most
        most = max(most, more if part is Part.INCOMING else 0)
        charge(self, part, more)

    monkeypatch.setattr(MemoryBudget, "charge", noted)
    async with connected(None, socket_pair) as (_, backend):
        for _ in range(2):
            most = 0
            await backend.send("/api/publish", publish("x" * (size - len(publish("")))))
            assert (await backend.receive())[0] == 200
            assert most == charged


def plain(body: bytes, key: str = KEY, *fields: str) -> bytes:
    return request("/api/publish", body, key, *fields)


CONNECTIONS: list[list[bytes]] = [
    [plain(publish(1)), plain(publish(2)), plain(publish("x" * 5000)), plain(publish(3))],
    [plain(publish(1)) * 3, plain(publish(1))[:-1], publish(1)[-1:] + plain(publish(2))],
    [
        plain(publish(1)),
        b"\r\n" + plain(publish(1)),
        plain(b"{"),
        plain(b'{"channel":"a.*","data":1}'),
    ],
    [plain(publish(1)), plain(publish(1), "wrong"), plain(publish(1))],
    [plain(publish(1)), plain(publish(1), KEY, "Connection: close"), plain(publish(1))],
    [
        plain(publish(1)),
        request("/api/publish/", publish(1), KEY),
        request("/api/info2", INFO, KEY),
    ],
    [plain(publish(1)), request("/healthz", b"", KEY, method="GET")],
    [plain(publish(1)), plain(publish(1))[:40], b"\r\n\r\n"],
    [plain(publish(1)) * 200],
    [plain(publish(1)) * 2 + request("/api/info2", INFO, KEY) + plain(publish(2)) * 2],
    [plain(publish(1)) * 2 + plain(publish(1), "wrong") + plain(publish(1))],
    [plain(publish(1)) * 2 + b"nonsense\r\n\r\n"],
    [plain(publish(1)) * 2 + request("/healthz", b"", KEY, method="GET")],
    [plain(publish(1)) * 2 + plain(publish("x" * 5000)) + plain(b"{}") * 2],
]


@pytest.mark.parametrize("pieces", CONNECTIONS)
@pytest.mark.parametrize("config", [{}, {"access_log": True}, {"head_bytes": 256}])
async def test_a_short_way_answers_with_the_same_bytes(
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
    pieces: list[bytes],
    config: dict[str, Any],
) -> None:
    monkeypatch.setattr(memory, "new_epoch", lambda topic: "epoch")
    monkeypatch.setattr(api_server, "time", SimpleNamespace(time=lambda: 1e9))
    came, logged = [], []
    for is_short in (True, False):
        if not is_short:
            monkeypatch.setattr(BackendServer, "_answer_now", lambda *_: None)
            monkeypatch.setattr(api_server._Source, "take_again", lambda *_: False)
        broker = Broker(Config(api_key=KEY, **config))
        with structlog.testing.capture_logs() as logs:
            async with connected(broker) as (_, backend):
                answer = bytearray()
                for piece in pieces:
                    await send_ignoring_errors(backend, piece)
                    with trio.move_on_after(1):
                        while data := await backend.stream.receive_some():
                            answer += data
        came.append(re.sub(rb"\r\ndate: [^\r]+", b"", answer))  # hypercorn has a clock of its own
        names = ("request", "refused", "api_key_refused")
        logged.append([each for each in logs if each["event"] in names])
    assert came[0] == came[1]
    assert came[0].startswith(b"HTTP/1.1 200 OK\r\n")
    assert logged[0] == logged[1]


def mutated(head: bytes, random: Random) -> bytes:
    """A request head with a fault in it, or with something that looks like one."""
    lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    place = random.randrange(1, len(lines))
    name, _, value = lines[place].partition(b": ")
    kind = random.randrange(9)
    if kind == 0:  # a byte is another, or one more
        at = random.randrange(len(head) - 4)
        byte = random.choice(b"\x00\t\n\r !,:;A0\x7f\x80\xff")
        return head[:at] + bytes((byte,)) + head[at + random.randrange(2) :]
    if kind == 1:  # one less
        at = random.randrange(len(head))
        return head[:at] + head[at + 1 :]
    if kind == 2:
        lines.insert(place, random.choice(lines))
    elif kind == 3:
        lines[place] = name + random.choice((b":", b" : ", b":\t", b":  ")) + value
    elif kind == 4:
        lines[place] = random.choice((name.upper() + b": " + value, lines[place].upper()))
    elif kind == 5:
        lines[place] = name + b": " + random.choice((b"0" + value, value + b"1", b"", b"-1", b"+2"))
    elif kind == 6:
        lines.insert(place, random.choice((b"Transfer-Encoding: chunked", b"Content-Length: 1")))
    elif kind == 7:
        lines.insert(
            place, random.choice((b" folded", b"Expect: 100-continue", b"Upgrade: x", b"x"))
        )
    else:
        lines[0] = lines[0].replace(
            *random.choice(((b"1.1", b"1.0"), (b"POST", b"GET"), (b"/", b"//")))
        )
    return b"\r\n".join(lines) + random.choice((b"\r\n\r\n", b"\r\n\r\n", b"\n\n", b"\r\n"))


async def test_a_head_that_looks_like_the_last_one_is_read_like_any_other(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "new_epoch", lambda topic: "epoch")
    monkeypatch.setattr(api_server, "time", SimpleNamespace(time=lambda: 1e9))
    usual, came = plain(publish(1)), []
    head, body = usual[: -len(publish(1))], publish(1)
    for is_short in (True, False):
        if not is_short:
            monkeypatch.setattr(BackendServer, "_answer_now", lambda *_: None)
            monkeypatch.setattr(api_server._Source, "take_again", lambda *_: False)
        random, answers = Random(7), []
        async with open_test_broker(Broker(Config(api_key=KEY))) as net:
            for _ in range(400):
                backend = Backend(await net.listener.connect(memory_stream_pair))
                await backend.stream.send_all(usual + mutated(head, random) + body + usual)
                answer = bytearray()
                with trio.move_on_after(40):  # a body that does not come has 30 s
                    while data := await backend.stream.receive_some():
                        answer += data
                await backend.stream.aclose()
                answers.append(re.sub(rb"\r\ndate: [^\r]+", b"", answer))
        came.append(answers)
    assert came[0] == came[1]
    statuses = {status for answer in came[0] for status in re.findall(rb"HTTP/1.1 (\d+)", answer)}
    assert statuses >= {b"200", b"400", b"401", b"404", b"405"}


async def test_requests_that_came_together_are_answered_in_one_write(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[int] = []

    def count(stream: object, data: bytes) -> int:
        writes.append(data.count(b"HTTP/1.1 200"))
        return write_now(stream, data)

    monkeypatch.setattr(api_server, "write_now", count)
    async with connected(None, socket_pair) as (_, backend):
        await backend.stream.send_all(plain(publish(1)) * 8)
        for offset in range(1, 9):
            assert msgspec.json.decode((await backend.receive())[2])["result"]["offset"] == offset
    assert writes == [8]


async def test_the_mail_of_a_backend_that_is_alone_is_out_with_its_answer(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, delivered = BackendServer._answer_together, []

    def watch(self: BackendServer, *args: Any) -> tuple[bool, bytes]:
        result = answer(self, *args)
        delivered.append(net.node.router.office.statistics().messages_delivered)
        return result

    monkeypatch.setattr(BackendServer, "_answer_together", watch)
    async with connected(None, socket_pair) as (net, backend):
        async with await net.open_client(socket_pair) as subscriber:
            await subscriber.request(subscribe={"channel": "t"})
            for number in range(3):
                await backend.send("/api/publish", publish(number))
                assert (await backend.receive())[0] == 200
                assert f'"data":{number}' in await subscriber.receive_text()
            await backend.stream.send_all(plain(publish(3)) * 4)
            for _ in range(4):
                assert (await backend.receive())[0] == 200
                assert '"data":3' in await subscriber.receive_text()
    assert delivered == [0, 2, 3, 7], "the first waits, as nobody knows who else has mail"


async def test_a_body_that_does_not_come_ends_it(autojump_clock: MockClock) -> None:
    async with connected() as (_, backend):
        before = trio.current_time()
        await backend.stream.send_all(request("/api/info", INFO, KEY)[:-1])
        assert await backend.is_over()
        assert trio.current_time() - before == 30


NEW_KEYS = {"another": "another-key", "none any more": None}


@pytest.mark.parametrize("new_key", NEW_KEYS.values(), ids=NEW_KEYS)
@pytest.mark.parametrize("coding", ["Content-Length", "chunked"])
async def test_a_key_that_is_changed_while_a_body_comes_is_no_key(
    autojump_clock: MockClock, new_key: str | None, coding: str
) -> None:
    body = publish("by a key that was revoked")
    if coding == "chunked":
        lines = [f"X-API-Key: {KEY}", "Host: test", "Transfer-Encoding: chunked", "", ""]
        head = "\r\n".join(["POST /api/publish HTTP/1.1", *lines]).encode()
        whole = head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    else:
        whole = request("/api/publish", body, KEY)
    async with connected() as (net, backend):
        await backend.stream.send_all(whole[:-9])
        await trio.sleep(1)
        net.broker.reload(Config(api_key=new_key))
        await backend.stream.send_all(whole[-9:])
        assert b" 401 " in (await backend.stream.receive_some())[:20]
        assert not net.node.router.published


BULK: dict[str, tuple[str, bytes]] = {
    "batch": ("batch", b'{"commands":[%b]}' % b",".join(
        b'{"publish":{"channel":"t%d","data":1}}' % n for n in range(20_000))),
    "batch, no publishes": ("batch", b'{"commands":[%b]}' % b",".join(
        b'{"history":{"channel":"t%d"}}' % n for n in range(20_000))),
    "broadcast": ("broadcast", b'{"data":1,"channels":[%b]}' % b",".join(
        b'"t%d"' % n for n in range(20_000))),
}  # fmt: skip


@pytest.mark.parametrize("bulk", BULK)
async def test_a_key_that_is_changed_in_the_middle_of_a_request_is_no_key(
    autojump_clock: MockClock, bulk: str
) -> None:
    """What it has done is done, and the rest is not."""
    method, body = BULK[bulk]
    async with connected() as (net, backend):
        router = net.node.router
        before = router.meter.done
        await backend.send(f"/api/{method}", body)
        while router.meter.done - before < 10_000:
            await trio.lowlevel.checkpoint()
        net.broker.reload(Config(api_key="another-key"))
        published = router.published
        assert (await backend.receive())[0] == 401
        assert router.published == published < 20_000


async def test_an_answer_that_is_not_taken_ends_it(autojump_clock: MockClock) -> None:
    broker = Broker(Config(api_key=KEY))
    async with open_test_broker(broker) as net:
        stream = await net.listener.connect(lockstep_stream_pair)
        before = trio.current_time()
        await stream.send_all(request("/api/info", INFO, KEY))
        await trio.sleep(29.9)
        assert net.streams == 1
        await trio.sleep(0.2)
        assert net.streams == 0
        assert trio.current_time() - before < 31
        await stream.aclose()


async def test_an_answer_is_charged_until_it_is_taken(autojump_clock: MockClock) -> None:
    broker = Broker(Config(api_key=KEY, topics=TopicRules(history_size=10)))
    async with open_test_broker(broker) as net:
        broker.publish_nowait("t", "x" * 100_000)
        before = broker.stats().memory.parts["outboxes"]
        stream = await net.listener.connect(lockstep_stream_pair)
        await stream.send_all(request("/api/history", b'{"channel":"t","limit":1}', KEY))
        await wait_all_tasks_blocked()
        assert broker.stats().memory.parts["outboxes"] - before > 100_000
        await Backend(stream).receive()
        await wait_all_tasks_blocked()
        assert broker.stats().memory.parts["outboxes"] == before
        await stream.aclose()


async def test_what_a_request_asks_for_is_done_however_long_that_takes(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = Api.answer

    async def slowly(
        self: Api,
        method: str,
        body: bytes,
        share: Share,
        trace: str = "",
        key: str | None = None,
    ) -> ApiResponse:
        await trio.sleep(100)
        return await answer(self, method, body, share, trace, key)

    monkeypatch.setattr(Api, "answer", slowly)
    async with connected(None, socket_pair) as (_, backend):
        for offset in (1, 2):
            await backend.send("/api/batch", b'{"commands":[{"publish":%b}]}' % publish(1))
            status, _, body = await backend.receive()
            assert status == 200
            [reply] = msgspec.json.decode(body)["replies"]
            assert reply["publish"]["offset"] == offset


async def test_a_large_answer_goes_out_in_pieces(autojump_clock: MockClock) -> None:
    sizes: list[int] = []

    def make_pair() -> tuple[trio.abc.Stream, trio.abc.Stream]:
        ours, theirs = memory_stream_pair()
        send_all = theirs.send_all

        async def counted(data: bytes | bytearray | memoryview) -> None:
            sizes.append(len(data))
            await send_all(data)

        theirs.send_all = counted  # type: ignore[method-assign]
        return ours, theirs

    broker = Broker(Config(api_key=KEY, topics=TopicRules(history_size=10)))
    async with open_test_broker(broker) as net, await net.listener.connect(make_pair) as stream:
        for _ in range(3):
            broker.publish_nowait("t", "x" * 100_000)
        backend = Backend(stream)
        await backend.send("/api/history", b'{"channel":"t","limit":-1}')
        _, _, body = await backend.receive()
        assert len(msgspec.json.decode(body)["result"]["publications"]) == 3
        assert max(sizes) == SEND_BYTES
        assert sum(sizes) > 300_000


async def test_a_peer_that_goes_leaves_nothing_behind(autojump_clock: MockClock) -> None:
    async with connected() as (net, backend):
        await backend.stream.send_all(request("/api/info", INFO, KEY)[:-1])
        await wait_all_tasks_blocked()
        await backend.stream.aclose()
        await wait_all_tasks_blocked()
        assert net.streams == 0


async def test_a_stop_waits_for_no_idle_connection(autojump_clock: MockClock) -> None:
    async with connected() as (net, backend):
        await backend.send("/api/info")
        await backend.receive()
        before = trio.current_time()
        net.broker.stop()
        assert await backend.is_over()
        assert trio.current_time() == before


async def test_a_request_under_way_is_answered_before_a_stop(autojump_clock: MockClock) -> None:
    async with connected() as (net, backend):
        whole = request("/api/info", INFO, KEY)
        await backend.stream.send_all(whole[:-1])
        await wait_all_tasks_blocked()
        net.broker.stop()
        await wait_all_tasks_blocked()
        await backend.stream.send_all(whole[-1:])
        status, headers, _ = await backend.receive()
        assert (status, headers["connection"]) == (200, "close")
        assert await backend.is_over()


async def test_the_app_is_asked_first_here_too(autojump_clock: MockClock) -> None:
    broker = Broker(Config(api_key=KEY))

    @broker.on_request
    async def answer(request: Request) -> Response | None:
        return PlainTextResponse("mine") if request.url.path == "/api/mine" else None

    async with connected(broker) as (net, backend):
        await backend.send("/api/mine")
        assert (await backend.receive())[2] == b"mine"
        async with await net.listener.connect() as stream:
            other: Any = Backend(stream)
            await other.send("/api/info")
            assert (await other.receive())[0] == 200
