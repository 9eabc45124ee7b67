"""Measure what a broker sustains, from outside: publishers and subscribers in one process.

The connections are bare: frames are made ahead, and frames that come are counted, not parsed, so that one
core can ask for more than most deployments will. It still is one process on one core: a broker that can do
more is held back by it, and one on the same core shares it.

Rules:

1. Every connection's task lives in the nursery of `measure`; nothing outlives it.
2. Without a rate at most `window` publications are under way, counted by what all subscribers got:
   a broker is driven as fast as it delivers, so it has no reason to cut a subscriber as slow.
3. With a rate, latency counts from when a publication was due, so falling behind is not hidden.
4. Publications that did not arrive are counted: `Result.missing`.
"""

import base64
import os
import ssl
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

import attrs
import msgspec
import trio

from broker.client import CONNECT_SECONDS
from broker.client.address import host_header, opener, split_url
from broker.client.client import CLOSE_SECONDS
from broker.client.loss import explain
from broker.config.settings import Config
from broker.core.topics import check_topic
from broker.errors import CannotConnect, ClientError
from broker.transport import frames

BURST: Final = 16
"""Publications in one write, without a rate: between a lone client's one and a relay's hundreds."""

ALIVE_SECONDS: Final = 10.0
"""How often a silent connection says that it is there; the broker asks after 20 s of silence."""

ARRIVE_SECONDS: Final = 5.0
"""Time without any delivery after which what is still under way counts as missing."""

OPENING_AT_ONCE: Final = 64
"""Handshakes under way. More would measure the broker's backlog, not its deliveries."""

MARK: Final = b"#@"
_TIMED: Final = b"#@T"
SMALLEST: Final = len(_TIMED) + 16
"""Bytes of the smallest payload: it holds the mark and the time it was due, in hex."""

ANSWER_BYTES: Final = 2**20
"""Bytes read while waiting for an answer. Behind a subscribe reply there may be some reads of what
others publish to the topic; before it, nothing."""

_READ: Final = 256 * 2**10
_ALIVE: Final = b"{}"


class BenchFailed(ClientError):
    """The broker was reached, but what was asked for cannot be measured; the text says why."""


@attrs.frozen(kw_only=True)
class Plan:
    """The plan of a measurement. Exactly one of `messages` (in all) and `seconds` ends it."""

    url: str
    token: str = ""
    ssl_context: ssl.SSLContext | None = None
    topic: str = "bench"
    publishers: int = 1
    subscribers: int = 1
    size: int = attrs.field(default=64, validator=attrs.validators.ge(SMALLEST))
    messages: int | None = None
    seconds: float | None = None
    rate: float | None = None
    """Publications a second in all; None: as fast as they are delivered."""
    window: int = 1024


@attrs.frozen(kw_only=True)
class Result:
    """Latencies are in milliseconds, of a sample: one publication of each write."""

    published: int
    delivered: int
    missing: int
    seconds: float
    publishes_per_second: float
    deliveries_per_second: float
    latency: dict[str, float]
    """p50, p90, p99, p99.9 and max; empty without subscribers."""


async def measure(plan: Plan, on_progress: Callable[[int, float], None]) -> Result:
    """Connect everybody, publish, wait for the last delivery, say what was seen.

    `on_progress` is called about ten times a second with the publications made so far and the
    seconds since the first. Raises `CannotConnect` when the broker cannot be reached, `BenchFailed`
    when it refuses, closes a connection, stops delivering or answers what no broker answers, or
    when the topic is none. Cancelled, it closes all connections at once.
    """
    try:
        check_topic(plan.topic, Config().max_topic_bytes)
    except ValueError as error:
        raise BenchFailed(f"topic {plan.topic!r}: {error}") from None
    try:
        return await _measure(plan, on_progress)
    except BaseExceptionGroup as group:
        # A broker that goes away takes all connections along; one of them tells it.
        known, others = group.split(ClientError)
        if known is None or others is not None:
            raise
        first: BaseException = known
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        # Its own context is that of one connection; here it stands for all of them.
        raise first from None  # noqa: ASYNC123


async def _measure(plan: Plan, on_progress: Callable[[int, float], None]) -> Result:
    async with _goodbyes() as opened:
        subscribers = await _open_all(plan, plan.subscribers, opened, subscribe=True)
        publishers = await _open_all(plan, plan.publishers, opened, subscribe=False)
        meter = _Meter(plan)
        async with trio.open_nursery() as listening:
            for connection in subscribers:
                listening.start_soon(_listen, connection, meter)
                listening.start_soon(_stay_alive, connection)
            listening.start_soon(_report, meter, on_progress)
            meter.began = time.perf_counter()
            async with trio.open_nursery() as publishing:
                for number, connection in enumerate(publishers):
                    publishing.start_soon(_publish, connection, meter, number)
            await meter.wait_arrived()
            on_progress(meter.published, time.perf_counter() - meter.began)
            listening.cancel_scope.cancel()
    return meter.result()


class _Meter:
    """Counts of publications sent and delivered, and whether more may be sent."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.began = 0.0
        self.ended = 0.0
        self.published = 0
        self.delivered = 0
        self.latencies: list[int] = []
        self._progress = trio.lowlevel.ParkingLot()

    def delivered_more(self, count: int) -> None:
        self.delivered += count
        self.ended = time.perf_counter()
        if self._progress:
            self._progress.unpark_all()

    @property
    def expected(self) -> int:
        return self.published * self.plan.subscribers

    def allowed(self) -> int:
        """How many publications may be made now; 0 when all are."""
        plan = self.plan
        if plan.seconds is not None:
            left = plan.window if time.perf_counter() - self.began < plan.seconds else 0
        else:
            assert plan.messages is not None
            left = plan.messages - self.published
        return max(0, min(left, BURST))

    async def wait_window(self, count: int) -> None:
        """Wait until `count` more may be under way."""
        plan = self.plan
        if not plan.subscribers:
            await trio.lowlevel.checkpoint()
            return
        while self.expected - self.delivered > (plan.window - count) * plan.subscribers:
            with trio.move_on_after(ARRIVE_SECONDS) as waiting:
                await self._progress.park()
            if waiting.cancelled_caught:
                under_way = self.expected - self.delivered
                raise BenchFailed(
                    f"{plan.url}: nothing was delivered for {ARRIVE_SECONDS:g} s, with {under_way} "
                    "deliveries owed"
                )

    async def wait_arrived(self) -> None:
        """Wait for what is under way, for as long as something arrives."""
        while self.delivered < self.expected:
            with trio.move_on_after(ARRIVE_SECONDS) as waiting:
                await self._progress.park()
            if waiting.cancelled_caught:
                break

    def result(self) -> Result:
        seconds = max(self.ended - self.began, 1e-9)
        ordered = sorted(self.latencies)
        latency = {}
        if ordered:
            shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
            last = len(ordered) - 1
            latency = {name: ordered[int(share * last)] / 1e6 for name, share in shares.items()}
        return Result(
            published=self.published,
            delivered=self.delivered,
            missing=self.expected - self.delivered,
            seconds=seconds,
            publishes_per_second=self.published / seconds,
            deliveries_per_second=self.delivered / seconds,
            latency=latency,
        )


@attrs.define(eq=False)
class _Connection:
    stream: trio.abc.Stream
    url: str
    unread: bytes = b""
    is_open: bool = False
    """After the handshake, so that a Close frame can be sent."""

    async def send(self, *commands: object) -> None:
        await self.stream.send_all(
            b"".join([_masked(msgspec.json.encode(command)) for command in commands])
        )

    async def receive(self) -> bytes:
        """The next bytes. Raises `BenchFailed` when the connection is over."""
        try:
            data = bytes(await self.stream.receive_some(_READ))
        except trio.BrokenResourceError:
            data = b""
        if not data:
            raise BenchFailed(f"{self.url}: the broker closed a connection{_why(self.unread)}")
        return data

    async def wait_for(self, text: bytes) -> None:
        """Read on until `text` has come. Raises `BenchFailed` on an error reply before it."""
        while text not in self.unread:
            if b'"error":{' in self.unread or b'"disconnect":{' in self.unread:
                raise BenchFailed(f"{self.url}: the broker refused{_why(self.unread)}")
            self.unread += await self.receive()
            if len(self.unread) > ANSWER_BYTES:
                raise BenchFailed(
                    f"{self.url} is no broker: it sent {ANSWER_BYTES:,} bytes and none of its answer"
                )


def _why(data: bytes) -> str:
    """The reason that the broker gave before it closed, if it gave one."""
    for key in (b'"disconnect":{', b'"error":{'):
        start = data.rfind(key)
        end = data.find(b"}", start)
        if start >= 0 and end >= 0:
            try:
                fields = msgspec.json.decode(data[start + len(key) - 1 : end + 1])
                text = str(fields.get("reason") or fields.get("message"))[:500]
                return f": {text} ({fields.get('code')})"
            except (msgspec.DecodeError, RecursionError):
                break
    return ""


def _masked(payload: bytes) -> bytes:
    """One text frame as a client sends it."""
    frame = frames.text_frame(payload)
    return _as_client(frame, len(frame) - len(payload))


def _as_client(frame: bytes, head: int) -> bytes:
    """A frame as a client sends it (RFC 6455 section 5.3); `head` are the bytes before its payload."""
    mask = os.urandom(4)
    masked = frames.unmask(frame[head:], mask)
    return bytes((frame[0], frame[1] | 0x80)) + frame[2:head] + mask + masked


@asynccontextmanager
async def _goodbyes() -> AsyncGenerator[list[_Connection]]:
    """Connections that are put on this list are closed when the block ends: with 1000, as a client does,
    and by force after `CLOSE_SECONDS`."""
    opened: list[_Connection] = []
    try:
        yield opened
    finally:
        with trio.move_on_after(CLOSE_SECONDS, shield=True):
            async with trio.open_nursery() as leaving:
                for connection in opened:
                    if connection.is_open:
                        leaving.start_soon(_say_goodbye, connection.stream)
        with trio.CancelScope(shield=True):  # which waits for nobody
            for connection in opened:
                await trio.aclose_forcefully(connection.stream)


async def _say_goodbye(stream: trio.abc.Stream) -> None:
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
        await stream.send_all(_as_client(frames.close_frame(1000), 2))
        while await stream.receive_some(_READ):
            pass


async def _open_all(
    plan: Plan, count: int, all_opened: list[_Connection], *, subscribe: bool
) -> list[_Connection]:
    opened: list[_Connection] = []
    limiter = trio.CapacityLimiter(OPENING_AT_ONCE)

    async def open_one() -> None:
        async with limiter:
            opened.append(await _open(plan, all_opened, subscribe=subscribe))

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(open_one)
    return opened


async def _open(plan: Plan, opened: list[_Connection], *, subscribe: bool) -> _Connection:
    host, port, resource = split_url(plan.url)
    try:
        with trio.fail_after(CONNECT_SECONDS):
            stream = await opener(plan.url, plan.ssl_context)(host, port)
            connection = _Connection(stream, plan.url)
            opened.append(connection)
            key = base64.b64encode(os.urandom(16)).decode()
            request = (
                f"GET {resource} HTTP/1.1\r\nHost: {host_header(host, port)}\r\n"
                "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                f"Sec-WebSocket-Key: {key}\r\n\r\n"
            )
            await stream.send_all(request.encode())
            await connection.wait_for(b"\r\n\r\n")
            status = connection.unread.partition(b"\r\n")[0][:200].decode("latin-1")
            if " 101 " not in f"{status} ":
                raise BenchFailed(f"{plan.url} is no WebSocket broker: it said {status!r}")
            connection.is_open = True
            await connection.send({"id": 1, "connect": {"token": plan.token}})
            await connection.wait_for(b'{"id":1,"connect"')
            if subscribe:
                await connection.send({"id": 2, "subscribe": {"channel": plan.topic}})
                await connection.wait_for(b'{"id":2,"subscribe"')
            connection.unread = b""
            return connection
    except trio.TooSlowError:
        raise CannotConnect(f"{plan.url}: no answer within {CONNECT_SECONDS:g} s") from None
    except (OSError, trio.BrokenResourceError) as error:
        raise CannotConnect(f"cannot connect to {plan.url}: {explain(error).reason}") from error


async def _publish(connection: _Connection, meter: _Meter, number: int) -> None:
    plan = meter.plan
    before = b'{"publish":{"channel":%b,"data":"' % msgspec.json.encode(plan.topic)
    behind = b'"}}'
    untimed = _masked(before + MARK + b"-" * (plan.size - len(MARK)) + behind)
    filler = b"-" * (plan.size - SMALLEST)
    share = None if plan.rate is None else plan.rate / plan.publishers
    due = meter.began + (number / plan.rate if plan.rate is not None else 0)
    stream = connection.stream
    try:
        while count := meter.allowed():
            if share is None:
                await meter.wait_window(count)
                # Another publisher may have made the last ones meanwhile.
                count = meter.allowed()
                if not count:
                    break
                at = time.perf_counter_ns()
            else:
                await _wait_until(due, connection)
                count, at = 1, int(due * 1e9)
                due += 1 / share
            timed = _masked(before + _TIMED + b"%016x" % at + filler + behind)
            meter.published += count
            await stream.send_all(timed + untimed * (count - 1))
        # Behind everything else, so its answer means that all was taken.
        await connection.send({"id": 3, "presence_stats": {"channel": plan.topic}})
        connection.unread = b""
        while b'"id":3,' not in connection.unread:
            connection.unread = connection.unread[-16:] + await connection.receive()
    except trio.BrokenResourceError:
        raise BenchFailed(f"{plan.url}: the broker closed a connection") from None
    meter.ended = max(meter.ended, time.perf_counter())


async def _wait_until(due: float, connection: _Connection) -> None:
    """Sleep until a time of `perf_counter`, and be heard meanwhile."""
    while (left := due - time.perf_counter()) > ALIVE_SECONDS:
        await trio.sleep(min(left, ALIVE_SECONDS))
        await connection.stream.send_all(_masked(_ALIVE))
    await trio.sleep(max(0.0, left))


async def _listen(connection: _Connection, meter: _Meter) -> None:
    tail = b""
    while True:
        data = tail + await connection.receive()
        now = time.perf_counter_ns()
        # Kept for the next read: a mark, or a time, that is not whole yet.
        cut = len(data)
        last = data.rfind(b"#", max(0, cut - SMALLEST))
        if last >= 0 and cut - last < SMALLEST:
            cut = last
        count = data.count(MARK, 0, cut)
        start = data.find(_TIMED, 0, cut)
        while start >= 0:
            try:
                at = int(data[start + len(_TIMED) : start + SMALLEST], 16)
            except ValueError:
                raise BenchFailed(
                    f"{connection.url}: topic {meter.plan.topic!r} carries what this bench did not "
                    "publish; name another with --topic"
                ) from None
            if len(meter.latencies) < meter.expected:
                meter.latencies.append(now - at)
            start = data.find(_TIMED, start + SMALLEST, cut)
        tail = data[cut:]
        connection.unread = data[-512:]  # for the broker's last words
        if count:
            meter.delivered_more(count)


async def _stay_alive(connection: _Connection) -> None:
    """Say that a connection that only listens is there."""
    while True:
        await trio.sleep(ALIVE_SECONDS)
        try:
            await connection.stream.send_all(_masked(_ALIVE))
        except trio.BrokenResourceError:
            return  # its listener says why


async def _report(meter: _Meter, on_progress: Callable[[int, float], None]) -> None:
    while True:
        await trio.sleep(0.1)
        on_progress(meter.published, time.perf_counter() - meter.began)
