"""Both ends of TLS in memory; what is asked of the queue before each answer."""

import ssl
from itertools import pairwise

import pytest
import trio
import trustme
from trio.testing import MockClock, memory_stream_pair, wait_all_tasks_blocked

from broker.core.work import TLS_HANDSHAKE, TLS_OPENED, TLS_RECORD
from broker.transport.sockets import HTTP_WITHOUT_TLS, socket_below, tls_fault
from broker.transport.tls_carrier import (
    AT_ONCE,
    HELLO_BYTES,
    HELLO_RECORDS,
    TlsCarrier,
    shake_hands,
)

AUTHORITY = trustme.CA()
HANDSHAKE = b"\x16\x03\x01"


def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of the server, and of a client."""
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    AUTHORITY.issue_cert("localhost").configure_cert(server)
    client = ssl.create_default_context()
    AUTHORITY.configure_trust(client)
    return server, client


def hello() -> bytes:
    """What a client says first: one record."""
    coming, going = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        contexts()[1].wrap_bio(coming, going, server_hostname="localhost").do_handshake()
    return going.read()


def record(body: bytes) -> bytes:
    return HANDSHAKE + len(body).to_bytes(2) + body


class End:
    """A server's end of TLS, and what it has asked for."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.peer, self.plain = memory_stream_pair()
        self.stream: trio.SSLStream[trio.abc.Stream] = trio.SSLStream(
            self.plain, context, server_side=True, https_compatible=True
        )
        self.asked: list[float] = []
        self.waited: list[float] = []
        self.paid: list[float] = []
        self.fault: BaseException | None = None

    async def enter(self, work: float) -> None:
        await trio.lowlevel.checkpoint()
        self.asked.append(work)

    async def wait_room(self, work: float = 0.0) -> None:
        self.waited.append(work)
        await trio.lowlevel.checkpoint()

    def spend(self, work: float) -> None:
        self.paid.append(work)

    async def shake_hands(self) -> None:
        try:
            await shake_hands(self.stream, self.enter, self)
        except trio.BrokenResourceError as error:
            self.fault = error

    async def hear(self, *parts: bytes) -> list[int]:
        """Send these one by one; how many answers were asked for after each."""
        counts = []
        for part in parts:
            await self.peer.send_all(part)
            await wait_all_tasks_blocked()
            counts.append(len(self.asked))
        return counts


@pytest.fixture
def end() -> End:
    return End(contexts()[0])


@pytest.mark.parametrize("cut", [1, 4, 5, 6, 9, 100, -1])
async def test_a_hello_is_answered_when_it_is_whole(
    autojump_clock: MockClock, end: End, cut: int
) -> None:
    said = hello()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(end.shake_hands)
        assert await end.hear(said[:cut], said[cut:]) == [0, 1]
        assert end.asked == [TLS_HANDSHAKE]
        assert (await end.peer.receive_some()).startswith(b"\x16\x03\x03")
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("size", [1, 3, 4, 100])
async def test_a_hello_may_span_records(autojump_clock: MockClock, end: End, size: int) -> None:
    body = hello()[5:]
    rest = max(size, -(-len(body) // (HELLO_RECORDS - 10)))
    cuts = [0, *range(min(size, 8), len(body), rest), len(body)]
    records = [record(body[a:b]) for a, b in pairwise(cuts)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(end.shake_hands)
        assert await end.hear(*records) == [0] * (len(records) - 1) + [1]
        assert end.asked == [TLS_HANDSHAKE]
        assert (await end.peer.receive_some()).startswith(b"\x16\x03\x03")
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_all_that_is_answered_is_asked_for_and_nothing_behind_it_is_read(
    autojump_clock: MockClock, version: ssl.TLSVersion
) -> None:
    ours, theirs = contexts()
    theirs.maximum_version = version
    end = End(ours)
    client = trio.SSLStream(end.peer, theirs, server_hostname="localhost")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(end.shake_hands)
        await client.do_handshake()
        await client.send_all(b"a request")
    finishing = 2 if version is ssl.TLSVersion.TLSv1_3 else 3
    assert end.asked == [TLS_HANDSHAKE, *[TLS_RECORD] * finishing]
    assert end.paid == []
    assert await end.stream.receive_some() == b"a request"
    assert end.paid == [TLS_OPENED]


async def test_what_a_client_says_last_is_answered_when_it_is_whole(
    autojump_clock: MockClock,
) -> None:
    ours, theirs = contexts()
    end = End(ours)
    coming, going = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = theirs.wrap_bio(coming, going, server_hostname="localhost")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(end.shake_hands)
        with pytest.raises(ssl.SSLWantReadError):
            client.do_handshake()
        await end.peer.send_all(going.read())
        coming.write(await end.peer.receive_some())
        client.do_handshake()
        last = going.read()
        assert await end.hear(last[:20], last[20:]) == [
            2,
            3,
        ]  # the first record of it has six bytes
    assert end.fault is None


async def test_a_second_hello_is_paid_for_as_the_first(autojump_clock: MockClock) -> None:
    """Where the first was about no key that the server has, the second is what is signed."""
    ours, theirs = contexts()
    ours.set_ecdh_curve("secp521r1")
    end = End(ours)
    client = trio.SSLStream(end.peer, theirs, server_hostname="localhost")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(end.shake_hands)
        await client.do_handshake()
    assert end.asked.count(TLS_HANDSHAKE) == 2


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (record(b"\x01" + HELLO_BYTES.to_bytes(3)), f"a hello of {HELLO_BYTES + 4} bytes"),
        (
            record(b"\x01\x00\x10\x00") + record(b"x") * HELLO_RECORDS,
            f"a hello in more than {HELLO_RECORDS} records",
        ),
    ],
    ids=["long", "in pieces"],
)
async def test_a_hello_that_nobody_sends_is_refused(
    autojump_clock: MockClock, end: End, said: bytes, reason: str
) -> None:
    await end.peer.send_all(said)
    await end.shake_hands()
    assert isinstance(end.fault, trio.BrokenResourceError)
    assert tls_fault(end.fault) == reason
    assert end.asked == []


STRANGE = {
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "sslv2": b"\x80\x2e\x01\x03\x03" + bytes(43),
    "endless": b"\x16\x03\x01\xff\xff" + bytes(100),
    "an alert": b"\x15\x03\x01\x00\x02\x02\x28",
    "another message": record(b"\x0f" + bytes(9)),
    "an empty record": record(b""),
}


@pytest.mark.parametrize("said", STRANGE)
async def test_what_is_no_hello_is_for_openssl_to_judge(
    autojump_clock: MockClock, end: End, said: str
) -> None:
    await end.peer.send_all(STRANGE[said])
    await end.peer.send_eof()
    await end.shake_hands()
    assert isinstance(end.fault, trio.BrokenResourceError)
    assert (tls_fault(end.fault) == HTTP_WITHOUT_TLS) == (said == "http")
    assert set(end.asked) == {TLS_RECORD}


@pytest.mark.parametrize("size", [0, 3, 100])
async def test_a_peer_that_goes_in_the_middle_is_gone(
    autojump_clock: MockClock, end: End, size: int
) -> None:
    await end.peer.send_all(hello()[:size])
    await end.peer.send_eof()
    await end.shake_hands()
    assert isinstance(end.fault, trio.BrokenResourceError)
    assert tls_fault(end.fault) is None
    assert TLS_HANDSHAKE not in end.asked
    assert end.stream.transport_stream is end.plain


async def test_a_stream_is_its_own_again_after_a_handshake_that_is_cancelled(
    autojump_clock: MockClock, end: End
) -> None:
    for scope in (trio.move_on_after(1), trio.move_on_after(1)):
        with scope:
            await end.shake_hands()
        assert scope.cancelled_caught
        assert end.stream.transport_stream is end.plain
        await end.peer.send_all(hello())


async def test_the_socket_is_found_below_a_handshake(autojump_clock: MockClock, end: End) -> None:
    ours, _ = contexts()
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    client = await trio.open_tcp_stream(*listener.socket.getsockname())
    plain = await listener.accept()
    stream: trio.SSLStream[trio.abc.Stream] = trio.SSLStream(plain, ours, server_side=True)

    async with client, plain, trio.open_nursery() as nursery:
        nursery.start_soon(shake_hands, stream, end.enter, end)
        await client.send_all(hello())
        assert await client.receive_some()
        assert stream.transport_stream is not plain
        assert socket_below(stream) is plain
        nursery.cancel_scope.cancel()
    await listener.aclose()


def secured(end: End) -> TlsCarrier:
    """A carrier after its handshake."""
    carrier = TlsCarrier(end.plain, end.enter, end)
    carrier.is_secured = True
    return carrier


SMALL = b"\x17\x03\x03\x00\x16" + bytes(22)


@pytest.mark.parametrize("records", [1, AT_ONCE, AT_ONCE + 1, 3 * AT_ONCE + 7])
@pytest.mark.parametrize("cut", [0, 1, 4, 5, 6, 30, -3])
async def test_records_are_paid_for_before_they_are_opened_and_few_at_a_time(
    autojump_clock: MockClock, end: End, records: int, cut: int
) -> None:
    carrier, sent, got = secured(end), SMALL * records, b""
    for part in (sent[:cut], sent[cut:]):
        await end.peer.send_all(part)
        before = len(got)
        while len(got) < before + len(part):
            paid = sum(end.paid)
            some = await carrier.receive_some()
            got += some
            assert len(some) <= (AT_ONCE + 1) * len(SMALL)
            assert sum(end.paid) - paid <= AT_ONCE * TLS_OPENED
    assert got == sent
    assert end.waited == end.paid
    assert sum(end.paid) == records * TLS_OPENED


async def test_a_large_record_costs_one_however_it_comes(
    autojump_clock: MockClock, end: End
) -> None:
    carrier, got = secured(end), b""
    sent = (b"\x17\x03\x03\x40\x11" + bytes(0x4011)) * 2 + SMALL
    for place in range(0, len(sent), 1000):
        await end.peer.send_all(sent[place : place + 1000])
        got += await carrier.receive_some()
    await end.peer.send_eof()
    assert got == sent
    assert sum(end.paid) == 3 * TLS_OPENED
    assert await carrier.receive_some() == b""


async def test_nothing_is_lost_of_what_waits_for_its_turn(
    autojump_clock: MockClock, end: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    carrier = secured(end)
    await end.peer.send_all(SMALL)

    async def wait_for_ever(work: float) -> None:
        await trio.sleep_forever()

    with monkeypatch.context() as patch, trio.move_on_after(1) as waiting:
        patch.setattr(end, "wait_room", wait_for_ever)
        await carrier.receive_some()
    assert waiting.cancelled_caught
    assert end.paid == []
    assert await carrier.receive_some() == SMALL
