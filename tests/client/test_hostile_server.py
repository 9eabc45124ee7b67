"""The client against a server that means harm, or is none: one error, of one line, and in bounds.

Before it is connected the client gives up with one `ClientError`; afterwards a server that
misbehaves is a lost connection, and the next one works. All on virtual time.
"""

import itertools
import json
import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress

import pytest
import trio
import trio_websocket
from trio.testing import MockClock, lockstep_stream_pair, wait_all_tasks_blocked

from broker.client import CONNECT_SECONDS, open_client
from broker.client.checked_stream import HEAD_BYTES, MAX_FRAGMENTS, MAX_MESSAGE_BYTES
from broker.client.subscription import HELD_BYTES
from broker.client.testing import (
    KEPT,
    URL,
    FakeBroker,
    FakePeer,
    acceptance,
    handshake_by_hand,
    read_key,
    server_frame,
)
from broker.client.wire import MAX_OBJECTS
from broker.errors import (
    CannotConnect,
    ClientError,
    CloseCode,
    ConnectionLost,
    RequestFailed,
    Unavailable,
)

Serve = Callable[[trio.abc.Stream], Awaitable[None]]

MIB = 2**20
ACCEPT = acceptance(b"dGhlIHNhbXBsZSBub25jZQ==")  # of another key
WELCOME = server_frame(b'{"id":1,"connect":{"client":"1"}}')


def text(*objects: object) -> bytes:
    """A frame that holds these, each as JSON; what is bytes already goes as it is."""
    lines = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in objects]
    return server_frame(b"\n".join(lines))


def push(**fields: object) -> bytes:
    return text({"push": {"channel": "news", **fields}})


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def one_line(error: ClientError) -> str:
    line = str(error)
    assert line.isprintable(), line
    assert len(line) < 800
    return line


# In place of a handshake.

NOT_HTTP = "the answer is not HTTP"
NO_HANDSHAKE = "HTTP 101, but no valid WebSocket handshake: "
BAD_LINE = "the answer is not HTTP: a header line is wrong"
TOO_LONG = f"the head of the answer is longer than {HEAD_BYTES:,} bytes"
HANDSHAKES: dict[str, tuple[bytes, str]] = {
    "zeros": (b"\0" * 100, NOT_HTTP),
    "zeros without end": (b"\0" * MIB, NOT_HTTP),
    "another protocol's greeting": (b"SSH-2.0-OpenSSH_9.2\r\n", NOT_HTTP),
    "an alert of TLS": (b"\x15\x03\x01\x00\x02\x02\x46", NOT_HTTP),
    "escapes for a terminal": (b"\x1b[2J\x1b]0;owned\x07", NOT_HTTP),
    "HTTP/2": (b"HTTP/2 101\r\n\r\n", NOT_HTTP),
    "a status that is no number": (b"HTTP/1.1 abc\r\n\r\n", NOT_HTTP),
    "a status of four digits": (b"HTTP/1.1 1010 x\r\n\r\n", NOT_HTTP),
    "404": (b"HTTP/1.1 404 Not Found\r\n\r\n", "HTTP 404, not WebSocket"),
    "200 with a body without end": (
        b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * MIB,
        "HTTP 200, not WebSocket",
    ),
    "a redirect": (
        b"HTTP/1.1 301 Moved\r\nLocation: https://elsewhere\r\n\r\n",
        "HTTP 301, not WebSocket; it points to 'https://elsewhere'$",
    ),
    "a redirect with an escape": (
        b"HTTP/1.1 302 x\r\nLocation: \x1b[2J\r\n\r\n",
        BAD_LINE,
    ),
    "a redirect with another escape, and long": (
        b"HTTP/1.1 302 x\r\nLocation: \x9b2J\xff" + b"y" * 9000 + b"\r\n\r\n",
        r"it points to '\\x9b2Jÿy{196}'$",
    ),
    "a redirect to nowhere": (b"HTTP/1.1 302 x\r\n\r\n", "HTTP 302, not WebSocket$"),
    "hints without end": (b"HTTP/1.1 103 Early Hints\r\n\r\n" * 9999, "HTTP 103, not WebSocket"),
    "a head without end": (b"HTTP/1.1 101 x\r\n" + b"a: b\r\n" * 99_999, TOO_LONG),
    "a line without end": (b"HTTP/1.1 101 " + b"x" * MIB, TOO_LONG),
    "a 101 without fields": (b"HTTP/1.1 101 x\r\n\r\n", NO_HANDSHAKE),
    "a 101 for another key": (ACCEPT, NO_HANDSHAKE),
    "an extension nobody asked for": (
        ACCEPT[:-2] + b"Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n",
        NO_HANDSHAKE,
    ),
    "a protocol nobody asked for": (
        ACCEPT[:-2] + b"Sec-WebSocket-Protocol: chat\r\n\r\n",
        NO_HANDSHAKE,
    ),
    "bytes that are no ASCII": (
        ACCEPT.replace(b"Connection: ", b"Connection: \xff"),
        NO_HANDSHAKE,
    ),
    "a folded field": (ACCEPT[:-2] + b" folded\r\n\r\n", BAD_LINE),
    "a field without a colon": (ACCEPT[:-2] + b"nonsense\r\n\r\n", BAD_LINE),
    "nothing": (b"", "closed before the WebSocket handshake was answered"),
    "half a head": (ACCEPT[:60], "closed before the WebSocket handshake was answered"),
}


async def error_of_opening(fake: FakeBroker, serve: Serve) -> ClientError:
    """The one error that opening ends with; nothing is left running, and nothing tried twice."""
    await wait_all_tasks_blocked()
    tasks = trio.lowlevel.current_statistics().tasks_living
    serving = trio.CancelScope()

    async def run() -> None:
        with serving:
            stream = await fake.stream()
            try:
                await serve(stream)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # the client has gone
            await trio.aclose_forcefully(stream)

    fake.nursery.start_soon(run)
    with trio.fail_after(CONNECT_SECONDS + 0.1), pytest.raises(ClientError) as caught:
        async with open_client(URL, open_stream=fake.open_stream):
            pytest.fail("connected")
    assert len(fake.dials) == 1
    serving.cancel()
    await wait_all_tasks_blocked()
    assert trio.lowlevel.current_statistics().tasks_living == tasks
    return caught.value


@pytest.mark.parametrize("name", HANDSHAKES)
@pytest.mark.parametrize("at_once", [True, False])
async def test_garbage_for_a_handshake_is_one_error_at_once(
    fake: FakeBroker, autojump_clock: MockClock, name: str, at_once: bool
) -> None:
    answer, message = HANDSHAKES[name]
    if not at_once:
        answer = answer[: HEAD_BYTES + 2000]  # byte by byte: the first of a million must do

    async def serve(stream: trio.abc.Stream) -> None:
        await read_key(stream)
        for piece in [answer] if at_once else [answer[at : at + 1] for at in range(len(answer))]:
            await stream.send_all(piece)

    began = trio.current_time()
    error = await error_of_opening(fake, serve)
    assert type(error) is CannotConnect
    with pytest.raises(CannotConnect, match=message):
        raise error
    assert one_line(error).startswith(f"cannot connect to {URL}: ")
    assert trio.current_time() - began < 1


async def test_a_right_handshake_connects_however_it_is_cut(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async def serve() -> None:
        stream = await fake.stream()
        for byte in acceptance(await read_key(stream)) + WELCOME:
            await stream.send_all(bytes((byte,)))

    fake.nursery.start_soon(serve)
    async with open_client(URL, open_stream=fake.open_stream) as client:
        assert client.fd == 1


async def slow(stream: trio.abc.Stream) -> None:
    """Send a field line for ever, a byte a second."""
    await read_key(stream)
    await stream.send_all(b"HTTP/1.1 101 x\r\na: ")
    while True:
        await trio.sleep(1)
        await stream.send_all(b"x")


async def silent(stream: trio.abc.Stream) -> None:
    await trio.sleep_forever()


async def deaf(stream: trio.abc.Stream) -> None:
    await handshake_by_hand(stream)
    await trio.sleep_forever()


async def chatty(stream: trio.abc.Stream) -> None:
    """Ping for ever, and never answer the connect command."""
    await handshake_by_hand(stream)
    while True:
        await stream.send_all(text({}))
        await trio.sleep(0.01)


@pytest.mark.parametrize("serve", [slow, silent, deaf, chatty])
async def test_an_answer_that_never_ends_is_given_up_after_10_s(
    fake: FakeBroker, autojump_clock: MockClock, serve: Serve
) -> None:
    error = await error_of_opening(fake, serve)
    assert type(error) is CannotConnect
    assert one_line(error) == f"cannot connect to {URL}: no answer within 10 s"
    assert trio.current_time() == pytest.approx(fake.dials[0] + CONNECT_SECONDS)


# In place of the connect reply.

PROTOCOL = "the answer is not this broker's protocol"


def connect(**fields: object) -> bytes:
    return text({"id": 1, "connect": {"client": "1", **fields}})


OPENINGS: dict[str, tuple[bytes, type[ClientError], str]] = {
    "a reply to nothing": (text({"id": 7, "connect": {"client": "1"}}), CannotConnect, "request 7"),
    "another reply": (text({"id": 1, "publish": {}}), CannotConnect, "of another kind"),
    "no fd": (text({"id": 1, "connect": {}}), CannotConnect, "gives no fd"),
    "an fd that is no number": (connect(client="a"), CannotConnect, "gives no fd"),
    "a negative fd": (connect(client="-1"), CannotConnect, "gives no fd"),
    "an fd of 5,000 digits": (connect(client="9" * 5000), CannotConnect, "gives no fd"),
    "an fd in other digits": (connect(client="١"), CannotConnect, "gives no fd"),
    "a push": (push(pub={"data": 1}), CannotConnect, "a push before the connect reply"),
    "a message": (text({"push": {"message": {}}}), CannotConnect, "a push before the connect"),
    "ping -1": (connect(ping=-1), CannotConnect, "`int` >= 0"),
    "ping 1e9": (connect(ping=10**9), CannotConnect, "`int` <= 86400"),
    "ping 2^64": (connect(ping=2**64), CannotConnect, "`int` <= 86400"),
    "ping as text": (connect(ping="25"), CannotConnect, "Expected `int`"),
    "subs that are none": (connect(subs=[1]), CannotConnect, "Expected `object`"),
    "100,000 subs": (
        connect(subs={f"t{number}": {} for number in range(100_000)}),
        CannotConnect,
        "subscriptions that nobody asked for",
    ),
    "a sub with a name of 2 MB": (
        connect(subs={"t" * 2 * MIB: {}}),
        CannotConnect,
        "subscriptions that nobody asked for",
    ),
    "JSON nested 10,000 deep": (
        text(b'{"id":1,"connect":{"client":"1","data":' + nested(10_000) + b"}}"),
        CannotConnect,
        "nested too deeply",
    ),
    "text": (server_frame(b"this is server"), CannotConnect, PROTOCOL),
    "a Close": (server_frame(b"\x03\xe8bye", 0x88), CannotConnect, "bye$"),
    "a Close with escapes": (
        server_frame(b"\x0f\xa0\x1b[2J", 0x88),
        RequestFailed,
        "4000: ",
    ),
    "a Close that comes back": (server_frame(b"\x0b\xbcx", 0x88), RequestFailed, "3004: x"),
    "a Close for good": (server_frame(b"\x0d\xacx", 0x88), Unavailable, "3500: x"),
    "a disconnect for good": (push(disconnect={"code": 3500}), Unavailable, "3500"),
    "disconnect 0": (push(disconnect={"code": 0}), CannotConnect, "disconnect with the code 0"),
    "disconnect 999": (push(disconnect={"code": 999}), CannotConnect, "with the code 999"),
    "disconnect 5000": (push(disconnect={"code": 5000}), CannotConnect, "with the code 5000"),
    "disconnect 65535": (push(disconnect={"code": 65535}), CannotConnect, "the code 65535"),
    "disconnect 65536": (push(disconnect={"code": 65536}), CannotConnect, "`int` <= 65535"),
    "disconnect -1": (push(disconnect={"code": -1}), CannotConnect, "`int` >= 0"),
    "a reason of 10 MB": (
        push(disconnect={"code": 4000, "reason": "x" * 10 * MIB}),
        RequestFailed,
        "x…$",
    ),
    "an error": (text({"id": 1, "error": {"code": 109}}), Unavailable, "109: "),
    "an error for now": (
        text({"id": 1, "error": {"code": 100, "temporary": True}}),
        RequestFailed,
        "100: ",
    ),
    "an error without a code": (text({"id": 1, "error": {}}), Unavailable, "0: "),
    "an error that is none": (text({"id": 1, "error": "no"}), CannotConnect, "Expected `object"),
}


@pytest.mark.parametrize("name", OPENINGS)
async def test_garbage_for_a_connect_reply_is_one_error_at_once(
    fake: FakeBroker, autojump_clock: MockClock, name: str
) -> None:
    answer, kind, message = OPENINGS[name]

    async def serve(stream: trio.abc.Stream) -> None:
        await handshake_by_hand(stream, answer)
        await trio.sleep_forever()

    began = trio.current_time()
    error = await error_of_opening(fake, serve)
    assert type(error) is kind
    with pytest.raises(ClientError, match=message):
        raise error
    assert len(str(error)) < 800
    assert trio.current_time() == began


@pytest.mark.parametrize("ping", [0, 1, 86_400])
async def test_a_ping_interval_that_can_be_is_taken(
    fake: FakeBroker, autojump_clock: MockClock, ping: int
) -> None:
    async with fake.client(ping=ping, pong=True) as (client, _):
        await trio.sleep(10)
        assert client.connected
        await trio.sleep(2)
        assert client.connected == (ping != 1)


# Once it is connected, with a publish under way, whose reply would be that to request 2.

CONNECTED: dict[str, tuple[bytes, CloseCode, str]] = {
    # frames
    "a masked frame": (b"\x81\x82abcdxx", CloseCode.PROTOCOL_ERROR, "a masked frame"),
    "a compressed frame": (b"\xc1\x02xx", CloseCode.PROTOCOL_ERROR, "a compressed frame"),
    "a reserved bit": (b"\x91\x02xx", CloseCode.PROTOCOL_ERROR, "a compressed frame"),
    "a frame of kind 3": (b"\x83\x00", CloseCode.PROTOCOL_ERROR, "unknown kind 3"),
    "a control frame of kind 11": (b"\x8b\x00", CloseCode.PROTOCOL_ERROR, "unknown kind 11"),
    "a ping in fragments": (b"\x09\x00", CloseCode.PROTOCOL_ERROR, "fragment control frame"),
    "a ping of 126 bytes": (
        b"\x89\x7e\x00\x7e" + b"x" * 126,
        CloseCode.PROTOCOL_ERROR,
        "ontrol frame",
    ),
    "a continuation of nothing": (b"\x80\x01x", CloseCode.PROTOCOL_ERROR, "unexpected CONT"),
    "a message in a message": (b"\x01\x01x\x81\x01x", CloseCode.PROTOCOL_ERROR, "expected CONT"),
    "a length of 2^63": (b"\x81\x7f" + b"\xff" * 8, CloseCode.TOO_BIG, "the broker sent a message"),
    "a length of 16 MiB and one": (
        b"\x81\x7f" + (MAX_MESSAGE_BYTES + 1).to_bytes(8, "big"),
        CloseCode.TOO_BIG,
        "a message of more than 16,777,216 bytes",
    ),
    "16 MiB and one in two fragments": (
        b"\x01\x7f"
        + MAX_MESSAGE_BYTES.to_bytes(8, "big")
        + b" " * MAX_MESSAGE_BYTES
        + b"\x80\x01x",
        CloseCode.TOO_BIG,
        "a message of more than 16,777,216 bytes",
    ),
    "fragments without end": (
        b"\x01\x00" + b"\x00\x00" * MAX_FRAGMENTS,
        CloseCode.TOO_BIG,
        "in more than 1,024 fragments",
    ),
    "text that is no UTF-8": (server_frame(b'{"a":"\xff"}'), CloseCode.INVALID_DATA, "utf-8"),
    "text that ends in the middle of a character": (
        server_frame(b"\xe4\xbd"),
        CloseCode.INVALID_DATA,
        "utf-8",
    ),
    "a surrogate as UTF-8": (server_frame(b"\xed\xa0\xbd"), CloseCode.INVALID_DATA, "utf-8"),
    "a binary message": (server_frame(b"{}", 0x82), CloseCode.PROTOCOL_ERROR, "a binary message"),
    "an empty message": (server_frame(b""), CloseCode.PROTOCOL_ERROR, "an empty message"),
    "pings without end": (b"\x89\x00" * 200, CloseCode.POLICY_VIOLATION, "control frames a second"),
    "pongs without end": (b"\x8a\x00" * 200, CloseCode.POLICY_VIOLATION, "control frames a second"),
    "Close 999": (server_frame(b"\x03\xe7", 0x88), CloseCode.PROTOCOL_ERROR, "invalid"),
    "Close 0": (server_frame(b"\0\0", 0x88), CloseCode.PROTOCOL_ERROR, "invalid"),
    "Close 65535": (server_frame(b"\xff\xff", 0x88), CloseCode.PROTOCOL_ERROR, "connection lost"),
    "Close with one byte": (
        server_frame(b"\x03", 0x88),
        CloseCode.PROTOCOL_ERROR,
        "connection lost",
    ),
    "Close with a reason that is no UTF-8": (
        server_frame(b"\x03\xe8\xff", 0x88),
        CloseCode.INVALID_DATA,
        "connection lost",
    ),
    "Close 1001": (server_frame(b"\x03\xe9bye", 0x88), CloseCode.GOING_AWAY, "bye"),
    # what the frames hold
    "JSON that breaks off": (text(b"{"), CloseCode.PROTOCOL_ERROR, PROTOCOL),
    "a list": (text([1]), CloseCode.PROTOCOL_ERROR, PROTOCOL),
    "a number": (text(5), CloseCode.PROTOCOL_ERROR, PROTOCOL),
    "null": (text(None), CloseCode.PROTOCOL_ERROR, PROTOCOL),
    "two objects on a line": (text(b"{} {}"), CloseCode.PROTOCOL_ERROR, PROTOCOL),
    "neither reply nor push": (text({"hello": 1}), CloseCode.PROTOCOL_ERROR, "neither a reply"),
    "a push that is null": (text({"push": None}), CloseCode.PROTOCOL_ERROR, "neither a reply"),
    "deep JSON in a payload": (
        text(b'{"push":{"channel":"a","pub":{"data":' + nested(10_000) + b"}}}"),
        CloseCode.PROTOCOL_ERROR,
        "nested too deeply",
    ),
    "deep JSON in an unknown field": (
        text(b'{"x":' + nested(10_000) + b"}"),
        CloseCode.PROTOCOL_ERROR,
        "nested too deeply",
    ),
    "half a pair in a topic": (
        text(b'{"push":{"channel":"\\ud83d","pub":{"data":1}}}'),
        CloseCode.PROTOCOL_ERROR,
        "half a surrogate pair in a name",
    ),
    "too many objects": (
        text(b'{"id":2,"publish":{"a":[' + b"{}," * (MAX_OBJECTS + 1) + b"{}]}}"),
        CloseCode.TOO_BIG,
        "more than 500,000 JSON objects",
    ),
    # replies
    "a reply never asked for": (
        text({"id": 99, "publish": {}}),
        CloseCode.PROTOCOL_ERROR,
        "a reply to request 99, for which none is due",
    ),
    "a second connect reply": (connect(), CloseCode.PROTOCOL_ERROR, "reply to request 1"),
    "two replies": (
        text({"id": 1, "error": {"code": 1}}, {"id": 2, "publish": {}}),
        CloseCode.PROTOCOL_ERROR,
        "reply to request 1",
    ),
    "a reply of another kind": (
        text({"id": 2, "history": {}}),
        CloseCode.PROTOCOL_ERROR,
        "the reply to publish is of another kind",
    ),
    "a reply without a result": (text({"id": 2}), CloseCode.PROTOCOL_ERROR, "of another kind"),
    "reply -1": (text({"id": -1}), CloseCode.PROTOCOL_ERROR, "`int` >= 0"),
    "reply 2^64": (text({"id": 2**64}), CloseCode.PROTOCOL_ERROR, "`int` <= 9223372036854775807"),
    "an error with a code of text": (
        text({"id": 2, "error": {"code": "no"}}),
        CloseCode.PROTOCOL_ERROR,
        "Expected `int`",
    ),
    # pushes
    "offset -1": (push(pub={"offset": -1}), CloseCode.PROTOCOL_ERROR, "`int` >= 0"),
    "offset 2^64": (push(pub={"offset": 2**64}), CloseCode.PROTOCOL_ERROR, "`int` <= 9223372036"),
    "offset 1.5": (push(pub={"offset": 1.5}), CloseCode.PROTOCOL_ERROR, "Expected `int`"),
    "tags that are none": (
        text({"push": {"channel": "fd:1", "pub": {"data": 1, "tags": {"a": 1}}}}),
        CloseCode.PROTOCOL_ERROR,
        "tags: Expected `str`",
    ),
    "tags of more than 1 MiB": (
        text({"push": {"channel": "fd:1", "pub": {"data": 1, "tags": {"a": "x" * MIB}}}}),
        CloseCode.TOO_BIG,
        "tags of more than 1,048,576 bytes",
    ),
    "subscriptions without end": (
        text(*({"push": {"channel": f"t{each}", "subscribe": {}}} for each in range(10_001))),
        CloseCode.PROTOCOL_ERROR,
        "subscriptions that nobody asked for",
    ),
    "disconnect 0": (push(disconnect={"code": 0}), CloseCode.PROTOCOL_ERROR, "the code 0"),
    "disconnect 999": (push(disconnect={"code": 999}), CloseCode.PROTOCOL_ERROR, "the code 999"),
    "disconnect 65535": (
        push(disconnect={"code": 65535}),
        CloseCode.PROTOCOL_ERROR,
        "the code 65535",
    ),
    "disconnect with escapes": (
        push(disconnect={"code": 3001, "reason": "\x1b[2J\n"}),
        CloseCode.SHUTDOWN,
        "connection lost",
    ),
    # the end
    "nothing more": (b"", CloseCode.ABNORMAL, "connection closed"),
    "half a header": (b"\x81", CloseCode.ABNORMAL, "connection closed"),
    "half a frame": (b'\x81\x7e\x10\x00{"id":2', CloseCode.ABNORMAL, "connection closed"),
    "half a message": (b"\x01\x01{", CloseCode.ABNORMAL, "connection closed"),
}


CUTS = [
    (name, byte_by_byte)
    for name, (answer, _, _) in CONNECTED.items()
    for byte_by_byte in (False, True)
    if not byte_by_byte or len(answer) <= 5000  # a byte takes a turn
]


@pytest.mark.parametrize("name, byte_by_byte", CUTS)
async def test_a_server_that_misbehaves_is_a_lost_connection_and_the_next_one_works(
    fake: FakeBroker,
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
    name: str,
    byte_by_byte: bool,
) -> None:
    answer, code, message = CONNECTED[name]
    caplog.set_level(logging.INFO, "broker.client")

    async def serve() -> None:
        stream = await fake.stream()
        await handshake_by_hand(stream, WELCOME)
        while b"\x81" not in await stream.receive_some(1000):
            pass
        await wait_all_tasks_blocked()
        try:
            for at in range(len(answer)) if byte_by_byte else [0]:
                await stream.send_all(answer[at : at + 1] if byte_by_byte else answer)
        except trio.BrokenResourceError:
            pass  # the client has gone already
        if code == CloseCode.ABNORMAL:
            await trio.aclose_forcefully(stream)

    fake.nursery.start_soon(serve)
    with trio.fail_after(60):
        async with open_client(URL, open_stream=fake.open_stream) as client:
            began = trio.current_time()
            with pytest.raises(ConnectionLost, match=message) as caught:
                await client.publish("news", 1)
            assert caught.value.code == code
            assert len(str(caught.value)) < 800
            assert trio.current_time() == began
            peer = await fake.greet()
            peer.soon("publish")
            await client.publish("news", 2)
    assert len(fake.dials) == 2
    lines = [record.getMessage() for record in caplog.records if record.name == "broker.client"]
    assert len(lines) == 1
    assert lines[0].startswith(f"{URL}: connection lost ({code:d}: ")
    assert lines[0].isprintable()


# Odd, and no harm in it.

TOLERATED: dict[str, bytes] = {
    "pings": text({}, b"{ }", {}),
    "lines that are empty": server_frame(b"\n\n{}\n\r\n"),
    "fields of a newer protocol": text({"push": {"channel": "a", "new": {"a": [1]}}, "more": 2}),
    "a push for a topic nobody has": push(pub={"data": 1, "offset": 5}),
    "half a pair in a payload nobody has": push(pub={"data": "\ud83d"}),
    "an unsubscribe nobody knows of": push(unsubscribe={"code": 2500}),
    "a ping of WebSocket": b"\x89\x02hi",
    "a pong nobody asked for": b"\x8a\x00",
    "a text in fragments": b"\x01\x01{\x89\x00\x00\x00\x80\x01}",
}


@pytest.mark.parametrize("name", TOLERATED)
async def test_odd_things_are_no_reason_to_leave(
    fake: FakeBroker, autojump_clock: MockClock, name: str
) -> None:
    async def serve() -> None:
        stream = await fake.stream()
        await handshake_by_hand(stream, WELCOME)
        while b"\x81" not in await stream.receive_some(1000):
            pass
        await stream.send_all(TOLERATED[name] + text({"id": 2, "publish": {}}))
        while await stream.receive_some(1000):
            pass

    fake.nursery.start_soon(serve)
    async with open_client(URL, open_stream=fake.open_stream) as client:
        await client.publish("news", 1)
        assert client.connected
    assert len(fake.dials) == 1


# Bounds.


async def test_one_pong_answers_all_pings_that_come_at_once(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client(ping=25, pong=True) as (client, peer):
        for _ in range(3):
            await peer.ws.send_message("\n".join(["{}"] * 50_000))
        await wait_all_tasks_blocked()
        got = ""

        async def serve() -> None:
            nonlocal got
            while '"publish"' not in got:
                got += str(await peer.ws.get_message()) + "\n"
            await peer.send({"id": 2, "publish": {}})

        fake.nursery.start_soon(serve)
        await client.publish("news", 1)
        # One for what came before each turn of the writer, and few turns in all.
        assert 1 <= got.count("{}\n") <= 3 * 50_000 / 64 + 3


async def test_reading_pauses_at_1_mib_in_one_subscription(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    fake.pair = lockstep_stream_pair
    async with fake.subscriber() as (subscription, peer), trio.open_nursery() as nursery:
        sent = await flood(nursery, peer, "news")
        assert MIB // BIG <= sent() <= MIB // BIG + 3
        for offset in range(1, 30):
            assert (await anext(subscription)).offset == offset
        nursery.cancel_scope.cancel()


async def test_reading_pauses_at_16_mib_in_all_subscriptions(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    fake.pair = lockstep_stream_pair
    async with fake.client() as (client, peer), AsyncExitStack() as stack:
        names = [f"t{number}" for number in range(40)]
        for name in names:
            peer.soon("subscribe", **KEPT)
            await stack.enter_async_context(client.subscribe(name))
        async with trio.open_nursery() as nursery:
            sent = await flood(nursery, peer, *names)
            assert 16 * MIB // BIG - 2 <= sent() <= 16 * MIB // BIG + 3
            nursery.cancel_scope.cancel()


async def test_a_reply_that_never_comes_does_not_make_the_client_read_without_end(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    fake.pair = lockstep_stream_pair
    newest: list[int] = []

    async def come_back() -> None:
        while True:
            with suppress(trio_websocket.ConnectionClosed):
                peer = await fake.greet()
                command = await peer.expect("subscribe")
                asked = command["subscribe"]["offset"]
                more = KEPT | {"offset": asked, "recovered": True}
                more["publications"] = [{"data": "last", "offset": asked + 1}]
                newest.append(asked + 1)
                await peer.send({"id": command["id"], "subscribe": more})

    async with fake.client() as (client, peer):
        peer.soon("subscribe", **KEPT)
        async with client.subscribe("news") as subscription, trio.open_nursery() as nursery:
            sent = await flood(nursery, peer, "news")
            paused = sent()
            with pytest.raises(ConnectionLost, match="still owes a reply") as caught:
                await client.publish("news", 1)
            assert caught.value.code == CloseCode.POLICY_VIOLATION
            assert HELD_BYTES // BIG - 20 <= sent() <= HELD_BYTES // BIG + 3
            assert sent() > paused
            # The publications that have come are the app's; then it goes on where that ends.
            nursery.start_soon(come_back)
            offset = 0
            async for publication in subscription:
                offset += 1
                assert publication.offset == offset
                if publication.value == "last":
                    break
            assert newest[-1] == offset
            assert offset >= sent()
            assert subscription.gaps == 0
            nursery.cancel_scope.cancel()


async def test_unsubscribes_that_are_never_answered_do_not_make_the_client_read_on(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    fake.pair = lockstep_stream_pair
    async with fake.client() as (client, peer):
        for _ in range(20):
            peer.soon("subscribe", **KEPT)
            async with client.subscribe("other"):
                pass
            await peer.expect("unsubscribe")
        peer.soon("subscribe", **KEPT)
        async with client.subscribe("news"), trio.open_nursery() as nursery:
            sent = await flood(nursery, peer, "news")
            assert sent() <= MIB // BIG + 3
            nursery.cancel_scope.cancel()


async def test_requests_that_are_given_up_wait_while_a_thousand_commands_are_queued(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    fake.pair = lockstep_stream_pair
    async with fake.client() as (client, peer):
        for _ in range(1500):
            with trio.move_on_after(1):
                await client.rpc("slow", "x" * 1000)
            with trio.move_on_after(1):
                async with client.subscribe("news"):
                    pytest.fail("subscribed")
        got = 0
        while True:
            with trio.move_on_after(1) as waiting:
                got += str(await peer.ws.get_message()).count('"id"')
            if waiting.cancelled_caught:
                break
        assert 1000 <= got < 1100


async def test_a_reply_that_nobody_waits_for_any_more_is_right_once(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        with trio.move_on_after(1):
            await client.publish("news", 1)
        await peer.answer("publish")
        await wait_all_tasks_blocked()
        assert client.connected
        await peer.send({"id": 2, "publish": {}})
        await wait_all_tasks_blocked()
        assert not client.connected


async def test_messages_nobody_asks_for_are_kept_within_1_mib_and_stop_nothing(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        for size in (15 * MIB, *[BIG] * 50):
            await peer.send({"push": {"message": {"data": "x" * size}}})
        peer.soon("publish")
        await client.publish("news", 1)
        assert client.messages.dropped == 50 - MIB // BIG
        assert len((await anext(client.messages)).data) == BIG + 2


async def test_a_subscription_that_is_granted_and_ended_in_turns_is_not_hammered(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    asked = 0
    async with fake.client() as (client, peer):

        async def serve() -> None:
            nonlocal asked
            while True:
                await peer.answer("subscribe", **KEPT)
                asked += 1
                assert asked < 1000  # or virtual time would never pass
                await peer.send({"push": {"channel": "news", "unsubscribe": {"code": 2500}}})

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            with trio.move_on_after(300):
                async with client.subscribe("news") as subscription:
                    await anext(subscription)
            nursery.cancel_scope.cancel()
        assert 10 < asked < 90


async def test_a_recovery_too_large_to_take_is_a_gap_and_not_a_loop(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.subscriber() as (subscription, peer):
        await peer.publish(1)
        await wait_all_tasks_blocked()
        await peer.drop()
        peer = await fake.greet()
        command = await peer.expect("subscribe")
        assert command["subscribe"]["recover"]
        head = b"\x81\x7f" + (MAX_MESSAGE_BYTES + 1).to_bytes(8, "big")
        await peer.stream.send_all(head)
        peer = await fake.greet()
        assert "recover" not in await peer.answer("subscribe", **KEPT | {"offset": 9})
        await peer.publish(10)
        assert [(await anext(subscription)).offset for _ in range(2)] == [1, 10]
        assert subscription.gaps == 1
        assert not subscription.recovered


async def test_a_large_recovery_gives_others_their_turns_and_comes_whole(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    count = 20_000
    turns = 0
    async with fake.subscriber() as (subscription, peer), trio.open_nursery() as nursery:

        async def work() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        await peer.drop()
        peer = await fake.greet()
        missed = [{"data": 1, "offset": offset} for offset in range(1, count + 1)]
        await peer.answer("subscribe", **KEPT, publications=missed, recovered=True)
        nursery.start_soon(work)
        for offset in range(1, count + 1):
            assert (await anext(subscription)).offset == offset
        assert turns >= count // 64
        assert subscription.recovered
        nursery.cancel_scope.cancel()


async def test_gaps_that_nobody_looks_at_take_no_room(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        peer.soon("subscribe")
        async with client.subscribe("news") as subscription:
            for _ in range(100):
                await peer.drop()
                peer = await fake.greet()
                await peer.answer("subscribe")
            peer.soon("publish")
            await client.publish("news", 1)
            await peer.publish(0)
            await anext(subscription)
            assert subscription.gaps == 1


async def test_the_answer_of_an_rpc_that_python_cannot_hold_is_a_client_error(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        answers = {
            "deep": (nested(900).decode(), None),
            "half": ('"\\ud83d"', "\ufffd"),
            "huge": ("1e999", float("inf")),
        }
        for method, (answer, value) in answers.items():

            async def serve(answer: str = answer) -> None:
                command = await peer.expect("rpc")
                await peer.ws.send_message(f'{{"id":{command["id"]},"rpc":{{"data":{answer}}}}}')

            fake.nursery.start_soon(serve)
            if value is None:
                with suppress(ClientError):  # or it can: how deep depends on what has called us
                    await client.rpc(method)
            else:
                assert await client.rpc(method) == value
        assert client.connected


BIG = 64 * 1024 - 500
"""Data of one publication of a flood: with what it takes besides, sixteen are just below 1 MiB."""


async def flood(nursery: trio.Nursery, peer: FakePeer, *topics: str) -> Callable[[], int]:
    """Publish to these topics in turn until the client stops reading; how many were sent."""
    sent = 0

    async def send() -> None:
        nonlocal sent
        with suppress(trio_websocket.ConnectionClosed, trio.ClosedResourceError):
            for offset in itertools.count(1):
                for topic in topics:
                    each = {"data": "x" * BIG, "offset": offset}
                    await peer.send({"push": {"channel": topic, "pub": each}})
                    sent += 1

    nursery.start_soon(send)
    await wait_all_tasks_blocked()
    return lambda: sent
