"""`broker.cli.bench` against a real broker on a real socket: it measures, so the clock is real too."""

import attrs
import pytest
import trio

from broker import Broker, Close, Config, Connection
from broker.cli.bench import SMALLEST, BenchFailed, Plan, measure
from broker.client.testing import acceptance, read_key, server_frame
from broker.errors import CannotConnect, ClientError
from tests.cli.conftest import serving


def quiet(published: int, seconds: float) -> None:
    """Progress that nobody watches."""


@pytest.mark.parametrize("size", [SMALLEST, 64, 70_000])
async def test_every_subscriber_gets_every_publication(size: int) -> None:
    async with serving() as url:
        plan = Plan(url=url, publishers=2, subscribers=3, size=size, messages=101, window=32)
        result = await measure(plan, quiet)
    assert (result.published, result.delivered, result.missing) == (101, 303, 0)
    assert result.deliveries_per_second == pytest.approx(3 * result.publishes_per_second)
    assert 0 < result.latency["p50"] <= result.latency["p99.9"] <= result.latency["max"] < 20_000


async def test_a_rate_is_kept_and_every_publication_is_timed() -> None:
    seen: list[int] = []
    async with serving() as url:
        plan = Plan(url=url, publishers=2, rate=200, seconds=0.3)
        result = await measure(plan, lambda published, _: seen.append(published))
    assert 40 <= result.published <= 62
    assert result.missing == 0
    assert seen[-1] == result.published


async def test_without_subscribers_it_waits_until_all_was_taken() -> None:
    async with serving() as url:
        result = await measure(Plan(url=url, subscribers=0, messages=50), quiet)
    assert (result.published, result.delivered, result.latency) == (50, 0, {})


@pytest.mark.parametrize("ends_well", [True, False])
async def test_every_connection_is_closed_with_1000(ends_well: bool) -> None:
    broker = Broker(Config(host="127.0.0.1", port=0, drain_seconds=0))
    codes: list[int] = []
    all_closed = trio.Event()

    @broker.on_close
    async def note(connection: Connection, close: Close) -> None:
        codes.append(close.code)
        if len(codes) == 5:
            all_closed.set()

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            (url,) = await nursery.start(broker.serve)
            plan = Plan(url=url, publishers=2, subscribers=3, seconds=60, rate=50)
            with trio.CancelScope() as measuring:
                if ends_well:
                    plan = attrs.evolve(plan, seconds=None, messages=10)
                await measure(plan, lambda count, _: None if ends_well else measuring.cancel())
            await all_closed.wait()
            broker.stop()
    assert codes == [1000] * 5


async def test_a_broker_that_stops_ends_it_with_its_last_words() -> None:
    broker = Broker(Config(host="127.0.0.1", port=0, drain_seconds=0))

    def stop(published: int, seconds: float) -> None:
        broker.stop()

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            (url,) = await nursery.start(broker.serve)
            with pytest.raises(BenchFailed, match=r"closed a connection"):
                await measure(Plan(url=url, subscribers=3, seconds=60, rate=50), stop)


async def test_a_pattern_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(BenchFailed, match=r"topic 'a\.\*': a topic has no wildcard"):
        await measure(Plan(url="ws://localhost:1", topic="a.*", messages=1), quiet)


async def test_nobody_there_is_told_with_the_url() -> None:
    with pytest.raises(
        ClientError, match=r"cannot connect to ws://127\.0\.0\.1:1: connection refused"
    ) as caught:
        await measure(Plan(url="ws://127.0.0.1:1", messages=1), quiet)
    assert type(caught.value) is CannotConnect


async def test_another_path_is_no_broker() -> None:
    async with serving() as url:
        with pytest.raises(BenchFailed, match="404"):
            await measure(Plan(url=f"{url}/nowhere", messages=1), quiet)


WELCOME = server_frame(b'{"id":1,"connect":{"client":"1"}}')

SUBSCRIBED = server_frame(b'{"id":2,"subscribe":{}}')

BENCH: dict[str, tuple[bytes, str]] = {
    "no HTTP": (b"\x1b[2J\r\n\r\n", r"is no WebSocket broker: it said '\\x1b\[2J'"),
    "a line of 1 MB": (b"x" * 2**20 + b"\r\n\r\n", "is no "),
    "a head without end": (b"a: b\r\n" * 400_000, "it sent 1,048,576 bytes and none"),
    "no answer to connect": (b"101" + b"x" * 2**21, "it sent 1,048,576 bytes and none"),
    "deep JSON in an error": (
        b'HTTP/1.1 101 x\r\n\r\n{"error":{"a":' + b"[" * 99_999 + b"}",
        "the broker refused",
    ),
    "a reason of 1 MB": (
        b'HTTP/1.1 101 x\r\n\r\n{"error":{"message":"' + b"x" * 900_000 + b'","code":1}}',
        r"the broker refused(: x{500} \(1\))?$",
    ),
    "an end": (b"", "closed a connection"),
}


@pytest.mark.parametrize("name", BENCH)
async def test_bench_ends_with_one_error_of_bounded_length(name: str) -> None:
    answer, message = BENCH[name]

    async def serve(stream: trio.SocketStream) -> None:
        await read_key(stream)
        try:
            await stream.send_all(answer)
        except trio.BrokenResourceError:
            pass  # it has seen enough

    async with trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        url = f"ws://127.0.0.1:{listener.socket.getsockname()[1]}"
        with trio.fail_after(30), pytest.raises(BenchFailed, match=message) as caught:
            await measure(Plan(url=url, messages=1), lambda published, seconds: None)
        assert len(str(caught.value)) < 800
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("data", [b"#@Tnot-a-hex-number", b"#@T" + b"\xff" * 16])
async def test_bench_on_a_topic_that_others_use_is_told_so(data: bytes) -> None:
    opened: list[trio.SocketStream] = []

    async def serve(stream: trio.SocketStream) -> None:
        opened.append(stream)
        try:
            await stream.send_all(acceptance(await read_key(stream)))
            await stream.receive_some(1000)
            await stream.send_all(WELCOME)
            await stream.receive_some(1000)
            await stream.send_all(SUBSCRIBED)
            while True:
                await stream.receive_some(1000)
                for each in opened:
                    await each.send_all(data + b" " * 100)
        except (trio.BrokenResourceError, trio.BusyResourceError, trio.ClosedResourceError):
            pass  # it has seen enough, and says goodbye on all connections at once

    async with trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        url = f"ws://127.0.0.1:{listener.socket.getsockname()[1]}"
        with trio.fail_after(30), pytest.raises(BenchFailed, match="did not publish"):
            await measure(Plan(url=url, seconds=20), lambda published, seconds: None)
        nursery.cancel_scope.cancel()
