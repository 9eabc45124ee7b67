"""Where a broker listens, what it says when it cannot, and that what it opened can be spoken to."""

import errno
import grp
import os
import socket
import ssl
import stat
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import structlog
import trio
import trio_websocket
import trustme
from cryptography.hazmat.primitives import serialization
from trio.testing import MockClock, memory_stream_pair, wait_all_tasks_blocked

from broker import Broker, Config, Connection
from broker.core.messages import Frame
from broker.errors import ConfigError
from broker.testing import MemoryListener, Peer
from broker.transport.gate import LEAD, Counts, Gate, GatedListener
from broker.transport.listeners import (
    ACCEPT_PAUSE,
    AT_ONCE,
    AnyListener,
    accept_streams,
    describe,
    listening_on,
    open_listeners,
    open_sockets,
    read_certificate,
    secure,
    take_sockets,
)


@asynccontextmanager
async def opened(config: Config) -> AsyncGenerator[list[AnyListener], None]:
    listeners = await open_listeners(config)
    try:
        yield listeners
    finally:
        for listener in listeners:
            await listener.aclose()


async def refusal_of(config: Config) -> str:
    """The one line in which a config is refused."""
    with pytest.raises(ConfigError) as caught:
        await open_listeners(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


# TCP


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on this machine")
async def test_both_families_share_one_port_that_the_system_chose() -> None:
    async with opened(Config(host="", port=0)) as listeners:
        addresses = describe(listeners)
        ports = {address.rpartition(":")[2] for address in addresses}
        assert len(ports) == 1
        assert "0" not in ports
        port = ports.pop()
        assert set(addresses) == {f"ws://0.0.0.0:{port}", f"ws://[::]:{port}"}
        for host in ("127.0.0.1", "::1"):
            stream = await trio.open_tcp_stream(host, int(port))
            await stream.aclose()


async def test_one_address_is_one_listener() -> None:
    async with opened(Config(host="127.0.0.1", port=0)) as listeners:
        assert len(listeners) == 1
        assert describe(listeners)[0].startswith("ws://127.0.0.1:")


async def test_a_port_that_is_taken_is_named_with_the_way_out() -> None:
    async with opened(Config(host="127.0.0.1", port=0)) as listeners:
        port = int(describe(listeners)[0].rpartition(":")[2])
        message = await refusal_of(Config(host="127.0.0.1", port=port))
        assert f"port {port} on 127.0.0.1 is already in use" in message
        assert "--port" in message


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
async def test_an_address_that_is_not_ours_is_named_with_the_way_out(host: str) -> None:
    message = await refusal_of(Config(host=host, port=0))
    assert host in message
    assert "--host" in message


async def test_without_heartbeats_the_system_waits_as_long_as_it_can() -> None:
    async with opened(Config(host="127.0.0.1", port=0, ping_seconds=inf)) as listeners:
        assert isinstance(listeners[0], trio.SocketListener)
        sock = listeners[0].socket
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 2**31 - 1


async def test_behind_our_heartbeat_the_system_gives_up_on_a_silent_network() -> None:
    config = Config(host="127.0.0.1", port=0, ping_seconds=3, pong_seconds=2)
    async with opened(config) as listeners:
        port = int(describe(listeners)[0].rpartition(":")[2])
        client = await trio.open_tcp_stream("127.0.0.1", port)
        served = await listeners[0].accept()
        assert isinstance(served, trio.SocketStream)
        assert served.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 5000
        await served.aclose()
        await client.aclose()


AddressInfo: TypeAlias = tuple[int, int, int, str, tuple[str | int, ...]]


class Names(trio.abc.HostnameResolver):
    """A name has the addresses that a test says."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses

    async def getaddrinfo(
        self,
        host: bytes | None,
        port: bytes | str | int | None,
        family: int = 0,
        type: int = 0,  # noqa: A002 - trio's name
        proto: int = 0,
        flags: int = 0,
    ) -> list[Any]:
        found: list[AddressInfo] = []
        for each in self.addresses:
            is_six = ":" in each
            where: tuple[str | int, ...] = (each, int(port or 0), *((0, 0) if is_six else ()))
            kind = socket.AF_INET6 if is_six else socket.AF_INET
            found.append((kind, socket.SOCK_STREAM, 6, "", where))
        return found

    async def getnameinfo(self, sockaddr: Any, flags: int) -> tuple[str, str]:
        raise NotImplementedError


@pytest.mark.parametrize("absent", ["192.0.2.1", "2001:db8::1"])
async def test_an_address_of_a_name_that_is_not_here_does_not_fail_the_others(absent: str) -> None:
    trio.socket.set_custom_hostname_resolver(Names(absent, "127.0.0.1"))
    with structlog.testing.capture_logs() as lines:
        async with opened(Config(host="two.example", port=0)) as listeners:
            assert [each.rpartition(":")[0] for each in describe(listeners)] == ["ws://127.0.0.1"]
    (line,) = lines
    assert (line["event"], line["address"], line["log_level"]) == (
        "address_left_out",
        absent,
        "info",
    )
    trio.socket.set_custom_hostname_resolver(Names(absent))
    assert "not an address of this machine" in await refusal_of(Config(host="two.example", port=0))


async def test_a_port_that_is_taken_on_one_address_of_a_name_is_a_mistake() -> None:
    """To serve on the other alone would be to share the name with somebody else."""
    with socket.create_server(("127.0.0.2", 0)) as taken:
        trio.socket.set_custom_hostname_resolver(Names("127.0.0.1", "127.0.0.2"))
        config = Config(host="two.example", port=taken.getsockname()[1])
        assert "is already in use" in await refusal_of(config)
        with socket.create_server(("127.0.0.1", config.port)):
            pass  # nothing was left open


# Sockets of another process


async def test_sockets_of_another_process_are_listened_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        (listener,) = take_sockets([os.dup(server.fileno())])
        client = await trio.open_tcp_stream(*server.getsockname())
        await (await listener.accept()).aclose()
        await client.aclose()
        await listener.aclose()


def test_a_file_that_does_not_listen_is_refused_by_its_number() -> None:
    with socket.socket() as quiet:
        number = os.dup(quiet.fileno())
        for _ in range(2):  # the second time it is closed
            with pytest.raises(ConfigError, match=f"file {number}, given to listen on: "):
                take_sockets([number])


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        (["127.0.0.1"], ("127.0.0.1", None)),
        (["127.0.0.1", "0.0.0.0"], ("0.0.0.0", None)),
        (["unix", "0.0.0.0"], ("0.0.0.0", None)),
        (["unix"], ("localhost", "unix")),
        ([], ("localhost", None)),
    ],
)
def test_what_others_can_reach_counts_as_the_place_of_given_sockets(
    tmp_path: Path, addresses: list[str], expected: tuple[str, str | None]
) -> None:
    sockets = []
    for name in addresses:
        if name == "unix":
            sockets.append(socket.socket(socket.AF_UNIX))
            sockets[-1].bind(str(tmp_path / "unix"))
        else:
            sockets.append(socket.create_server((name, 0)))
    config = listening_on(Config(), [each.fileno() for each in sockets])
    assert (config.host, config.unix and config.unix.name) == expected
    for each in sockets:
        each.close()


# Unix sockets


@pytest.mark.parametrize(
    ("fields", "mode"),
    [({"unix_mode": "0666"}, 0o666), ({"unix_mode": "600"}, 0o600), ({"unix_group": ""}, 0o660)],
)
async def test_a_unix_socket_is_for_whom_the_settings_say(
    tmp_path: Path, fields: dict[str, str], mode: int
) -> None:
    path = tmp_path / "broker.sock"
    if "unix_group" in fields:
        fields = {"unix_group": grp.getgrgid(os.getgid()).gr_name}
    async with opened(Config(unix=path, **fields)):  # type: ignore[arg-type]
        assert stat.S_IMODE(path.stat().st_mode) == mode


async def test_a_group_that_is_not_there_is_named(tmp_path: Path) -> None:
    config = Config(unix=tmp_path / "broker.sock", unix_group="no-such-group")
    assert "unix_group is 'no-such-group'" in await refusal_of(config)


@pytest.mark.parametrize("mode", ["rw", "0999", "7", "66666", ""])
def test_a_mode_is_octal_in_quotes(mode: str) -> None:
    with pytest.raises(ValueError, match="must be octal digits in quotes"):
        Config(unix_mode=mode)


async def test_a_unix_socket_is_spoken_to_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "broker.sock"
    async with opened(Config(unix=path)) as listeners:
        assert describe(listeners) == [f"unix:{path}"]
        stream = await trio.open_unix_socket(str(path))
        await stream.aclose()


async def test_a_stale_socket_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "broker.sock"
    async with opened(Config(unix=path)):
        pass
    assert stat.S_ISSOCK(path.stat().st_mode)
    async with opened(Config(unix=path)):
        stream = await trio.open_unix_socket(str(path))
        await stream.aclose()


async def test_a_live_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "broker.sock"
    async with opened(Config(unix=path)):
        message = await refusal_of(Config(unix=path))
        assert f"unix socket {path} is already in use" in message
        assert "--unix" in message
        stream = await trio.open_unix_socket(str(path))
        await stream.aclose()


async def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    assert str(path) in await refusal_of(Config(unix=path))
    assert path.read_text() == "data"


async def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "broker.sock"
    assert str(path) in await refusal_of(Config(unix=path))


# TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA(key_type=trustme.KeyType.ECDSA)


@pytest.fixture
def tls(authority: trustme.CA, tmp_path: Path) -> tuple[Path, Path]:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    leaf = authority.issue_cert("localhost", "127.0.0.1")
    certificate.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
    key.write_bytes(leaf.private_key_pem.bytes())
    return certificate, key


async def test_wss_serves_an_echo_and_a_close(
    authority: trustme.CA, tls: tuple[Path, Path]
) -> None:
    broker = Broker(Config(host="127.0.0.1", port=0, tls_cert=tls[0], tls_key=tls[1]))
    closes = []

    @broker.on_message
    async def echo(connection: Connection, frame: Frame) -> None:
        broker.push(connection.fd, frame.data)

    @broker.on_close
    async def note(connection: Connection, close: object) -> None:
        closes.append(connection.address)

    context = ssl.create_default_context()
    authority.configure_trust(context)
    async with trio.open_nursery() as nursery:
        address = (await nursery.start(broker.serve))[0]
        assert address.startswith("wss://127.0.0.1:")
        async with trio_websocket.open_websocket_url(address, context) as client:
            for message in ("häi", b"\x00\xff", "x" * 200_000):
                await client.send_message(message)
                assert await client.get_message() == message
        assert client.closed is not None
        assert client.closed.code == 1000
        broker.stop()
    assert len(closes) == 1
    assert closes[0].startswith("127.0.0.1:")


async def test_plain_http_on_a_tls_port_is_answered_in_the_clear_and_ends_just_that_connection(
    authority: trustme.CA, tls: tuple[Path, Path]
) -> None:
    broker = Broker(Config(host="127.0.0.1", port=0, tls_cert=tls[0], tls_key=tls[1]))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    async with trio.open_nursery() as nursery:
        address = (await nursery.start(broker.serve))[0]
        port = int(address.rpartition(":")[2])
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b"".join([bytes(data) async for data in stream])
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"\r\n\r\nthis port speaks TLS: an address begins with https://" in answer
        await stream.aclose()
        async with trio_websocket.open_websocket_url(address, context):
            pass
        broker.stop()


async def distrust(stream: trio.abc.Stream) -> None:
    """Begin a handshake, and say by an alert that the certificate is nobody's. (Trio's own stream
    does not.)"""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context()
    client = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    await stream.send_all(outgoing.read())
    incoming.write(await stream.receive_some())
    with pytest.raises(ssl.SSLCertVerificationError):
        client.do_handshake()
    await stream.send_all(outgoing.read())


@pytest.mark.parametrize(
    "sent, reason",
    [
        (b"GET / HTTP/1.1\r\n\r\n", "http request"),
        (b"\0" * 99, "wrong version number"),
        (None, "tlsv1 alert unknown ca"),
        (b"", ""),
        (b"\x16\x03\x01\x02\x00\x01", ""),
    ],
    ids=["plain HTTP", "garbage", "a client that trusts nobody", "nothing", "half a hello"],
)
async def test_a_handshake_that_fails_leaves_one_line_with_address_and_reason(
    autojump_clock: MockClock, authority: trustme.CA, sent: bytes | None, reason: str
) -> None:
    listener, context = MemoryListener(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    tls = trio.SSLListener(listener, context, https_compatible=True)
    broker = Broker()
    with structlog.testing.capture_logs() as lines:
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(broker.serve, listeners=[tls]))
            stream = await listener.connect()
            if sent is None:
                await distrust(stream)
            elif sent:
                await stream.send_all(sent)
            await wait_all_tasks_blocked()
            await stream.aclose()
            await wait_all_tasks_blocked()
            assert broker.stats().refused == bool(reason)
            assert broker.stats().ends.refused["tls"] == bool(reason)
            broker.stop()
    failed = [each for each in lines if each["event"] == "tls_failed"]
    assert [(each["reason"], each["peer"]) for each in failed] == (
        [(reason, "memory")] if reason else []
    )


async def test_nobody_has_a_second_handshake_on_a_connection(tls: tuple[Path, Path]) -> None:
    context = await read_certificate(Config(port=0, tls_cert=tls[0], tls_key=tls[1]))
    assert context is not None
    assert context.options & ssl.OP_NO_RENEGOTIATION


@pytest.mark.parametrize("which", [0, 1], ids=["certificate", "key"])
async def test_a_tls_file_that_cannot_be_read_is_named(tls: tuple[Path, Path], which: int) -> None:
    tls[which].unlink()
    message = await refusal_of(Config(port=0, tls_cert=tls[0], tls_key=tls[1]))
    assert str(tls[which]) in message


async def test_a_certificate_that_is_none_is_named(tls: tuple[Path, Path]) -> None:
    tls[0].write_text("hello")
    message = await refusal_of(Config(port=0, tls_cert=tls[0], tls_key=tls[1]))
    assert str(tls[0]) in message


async def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_its_passphrase(
    tls: tuple[Path, Path],
) -> None:
    key = serialization.load_pem_private_key(tls[1].read_bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    tls[1].write_bytes(locked)
    message = await refusal_of(Config(port=0, tls_cert=tls[0], tls_key=tls[1]))
    assert "unencrypted" in message


# accepting


class Scripted(trio.abc.Listener[trio.abc.Stream]):
    """A listener whose accepts go as they are told; then nothing comes any more."""

    def __init__(self, *outcomes: OSError | trio.abc.Stream) -> None:
        self.outcomes = list(outcomes)
        self.is_closed = False

    async def accept(self) -> trio.abc.Stream:
        if not self.outcomes:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, OSError):
            raise outcome
        return outcome

    async def aclose(self) -> None:
        self.is_closed = True
        await trio.lowlevel.checkpoint()


def failure(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("number", "makes_room"),
    [
        (errno.EMFILE, True),
        (errno.ENFILE, True),
        (errno.ENOMEM, True),
        (errno.ENOBUFS, True),
        (errno.EINVAL, False),
        (errno.EOPNOTSUPP, False),
        (errno.EIO, False),
    ],
)
async def test_an_accept_that_fails_ends_nothing_and_does_not_spin(
    autojump_clock: MockClock, number: int, makes_room: bool
) -> None:
    stream, _ = memory_stream_pair()
    listener = Scripted(*[failure(number)] * 10, stream)
    taken: list[trio.abc.Stream] = []
    rooms: list[float] = []
    began = trio.current_time()
    with structlog.testing.capture_logs() as logs:
        async with trio.open_nursery() as nursery:

            def take(stream: trio.abc.Stream) -> None:
                taken.append(stream)
                nursery.cancel_scope.cancel()

            nursery.start_soon(
                accept_streams, listener, take, lambda: rooms.append(trio.current_time())
            )
    assert trio.current_time() - began == pytest.approx(10 * ACCEPT_PAUSE)
    assert taken == [stream]
    assert len(rooms) == (10 if makes_room else 0)
    assert listener.is_closed
    assert {line["event"] for line in logs} == {"not_accepted"}
    assert str(logs[0]["reason"]).startswith(errno.errorcode[number])


class Steps(trio.abc.Instrument):
    """Counts the steps of all tasks."""

    count = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.count += 1


def gated(listener: trio.SocketListener) -> AnyListener:
    counts = Counts(memoryview(bytearray(16)).cast("q"))
    return GatedListener.over(listener, Gate(counts, 0, lambda: 0))


def over_tls(listener: trio.SocketListener) -> AnyListener:
    (secured,) = secure([listener], ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    return secured


def itself(listener: trio.SocketListener) -> AnyListener:
    return listener


@pytest.mark.parametrize(
    ("made", "has_room", "together"),
    [
        (itself, True, [AT_ONCE, 1]),
        (itself, False, [1] * 17),
        (over_tls, True, [AT_ONCE, 1]),
        (gated, True, [LEAD, LEAD, 1]),
    ],
    ids=["room", "no room", "TLS", "gate"],
)
async def test_those_who_wait_are_accepted_in_one_step_where_there_is_room(
    made: Callable[[trio.SocketListener], AnyListener], has_room: bool, together: list[int]
) -> None:
    (listener,) = await open_sockets(Config(port=0))
    address = listener.socket.getsockname()
    steps = Steps()
    trio.lowlevel.add_instrument(steps)
    taken: list[tuple[int, trio.abc.Stream]] = []
    async with AsyncExitStack() as stack:
        for _ in range(AT_ONCE + 1):
            peer = await trio.open_tcp_stream(*address)
            await stack.enter_async_context(peer)
        async with trio.open_nursery() as nursery:

            def take(stream: trio.abc.Stream) -> None:
                taken.append((steps.count, stream))
                if len(taken) == AT_ONCE + 1:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(
                accept_streams, made(listener), take, lambda: None, lambda streams: has_room
            )
        for _, stream in taken:
            await trio.aclose_forcefully(stream)
    trio.lowlevel.remove_instrument(steps)
    assert list(Counter(step for step, _ in taken).values()) == together
    assert {isinstance(each, trio.SSLStream) for _, each in taken} == {made is over_tls}


async def test_a_listener_that_somebody_else_closes_is_no_failed_accept() -> None:
    listener = MemoryListener()
    await listener.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await accept_streams(listener, lambda stream: None, lambda: None)


async def test_a_broker_serves_on_after_a_failed_accept(autojump_clock: MockClock) -> None:
    ours, theirs = memory_stream_pair()
    listener = Scripted(failure(errno.EMFILE), failure(errno.EIO), theirs)
    broker = Broker()
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda **start: broker.serve(listeners=[listener], **start))
        peer = Peer(ours)
        await peer.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert " 200 " in await peer.receive_head()
        broker.stop()
