"""Events to a backend: in order, at least once, whatever the backend does and whenever it does it."""

import json
import runpy
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from datetime import UTC, datetime
from email.utils import format_datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import httpx2
import pytest
import trio
import trio.lowlevel
from hypothesis import given, settings
from hypothesis import strategies as st
from standardwebhooks import Webhook as StandardWebhook
from standardwebhooks import WebhookVerificationError
from starlette.requests import Request
from starlette.responses import Response
from structlog.testing import capture_logs
from trio.testing import MockClock

from broker import Broker, Config, ConfigError, WebhookRules
from broker.client import open_client
from broker.config.reload import merge
from broker.core.event_queue import Event
from broker.core.signing import key_of, signature
from broker.http.api import Api
from broker.testing import Closed, MemoryListener, Network, Peer, open_test_broker
from broker.transport.listeners import describe, open_listeners
from broker.webhooks import sender as webhooks
from broker.webhooks.sender import RETRY_AFTER_MOST, encode, seconds_of
from tests.conftest import WEBHOOK_SECRET

pytestmark = pytest.mark.usefixtures("logging_restored")

ROOT = Path(__file__).parents[2]
URL = "https://backend.example/events"
RULES = WebhookRules(url=URL, retry_seconds=1, retry_max_seconds=8)

sample: dict[str, Any] = runpy.run_path(str(ROOT / "clients" / "online.py"))

Say: TypeAlias = Callable[[httpx2.Request], Awaitable[httpx2.Response]]


def reply(status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> httpx2.Response:
    """An answer as it comes from the network: to be read once."""

    async def chunks() -> AsyncIterator[bytes]:
        yield body

    return httpx2.Response(status, content=chunks(), headers=headers)


async def taken(request: httpx2.Request) -> httpx2.Response:
    return reply(204)


def status(code: int, **headers: str) -> Say:
    async def say(request: httpx2.Request) -> httpx2.Response:
        return reply(code, {name.replace("_", "-"): value for name, value in headers.items()})

    return say


async def hang(request: httpx2.Request) -> httpx2.Response:
    await trio.sleep_forever()
    raise AssertionError


async def refuse_connection(request: httpx2.Request) -> httpx2.Response:
    raise httpx2.ConnectError("nobody there")


@attrs.define
class Backend:
    """The backend that a URL leads to. `say` answers; it may be changed at any time."""

    say: Say = taken
    requests: list[tuple[float, httpx2.Request]] = attrs.field(factory=list)

    async def handle(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append((trio.current_time(), request))
        return await self.say(request)

    @asynccontextmanager
    async def open_http_client(
        self, setting: str, extra: str
    ) -> AsyncGenerator[httpx2.AsyncClient]:
        transport = httpx2.MockTransport(self.handle)
        async with httpx2.AsyncClient(transport=transport, timeout=None) as client:
            yield client

    def batches(self) -> list[list[tuple[str, int]]]:
        return [
            [(event["kind"], event["seq"]) for event in json.loads(request.content)["events"]]
            for _, request in self.requests
        ]

    def gaps(self) -> list[float]:
        times = [at for at, _ in self.requests]
        return [later - earlier for earlier, later in pairwise(times)]


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    backend = Backend()
    monkeypatch.setattr(webhooks, "open_http_client", backend.open_http_client)
    return backend


def broker_of(name: str = "", **rules: Any) -> Broker:
    config = Config(webhooks=attrs.evolve(RULES, **rules), ping_seconds=1e9, name=name)
    return Broker(config)


def named(lines: Any, *names: str) -> list[str]:
    return [line["event"] for line in lines if line["event"] in names]


# what is sent


async def test_events_are_posted_as_they_happen_and_last_words_get_out(
    autojump_clock: MockClock, backend: Backend
) -> None:
    async with open_test_broker(broker_of()) as net:
        await trio.sleep(1)
        await net.open_plain()
        await trio.sleep(1)
        assert backend.batches() == [[("started", 1)], [("opened", 2)]]
        began = trio.current_time()
    assert trio.current_time() - began < RULES.flush_seconds + 5
    flat = [each for batch in backend.batches() for each in batch]
    assert flat[2:] == [("disconnected", 3), ("stopped", 4)]
    (_, request) = backend.requests[1]
    assert (request.method, str(request.url)) == ("POST", URL)
    assert request.headers["content-type"] == "application/json"
    (event,) = json.loads(request.content)["events"]
    assert event.keys() == {
        *("kind", "node", "epoch", "seq", "time", "fd", "user", "address", "path", "transport"),
    }
    assert event["time"] == pytest.approx(net.broker.wall_clock() - 7, abs=7)


async def test_events_during_a_request_go_with_the_next_up_to_a_batch(
    autojump_clock: MockClock, backend: Backend
) -> None:
    async def slow(request: httpx2.Request) -> httpx2.Response:
        await trio.sleep(1)
        return reply(200)

    backend.say = slow
    async with open_test_broker(broker_of(batch_events=3)) as net:
        await trio.sleep(0.5)
        for _ in range(4):
            await net.open_plain()
        await trio.sleep(5)
        assert backend.batches() == [
            [("started", 1)],
            [("opened", 2), ("opened", 3), ("opened", 4)],
            [("opened", 5)],
        ]


async def test_kinds_that_are_not_asked_for_are_not_sent(
    autojump_clock: MockClock, backend: Backend
) -> None:
    async with open_test_broker(broker_of(events=("connected",))) as net:
        await net.open_client()
        await trio.sleep(1)
    flat = [each for batch in backend.batches() for each in batch]
    assert flat == [("started", 1), ("connected", 2), ("stopped", 3)]


# who sent it


async def test_requests_are_signed_as_standard_webhooks_has_it(
    autojump_clock: MockClock, backend: Backend
) -> None:
    async with open_test_broker(broker_of(secret=WEBHOOK_SECRET)):
        await trio.sleep(1)
    _, request = backend.requests[0]
    theirs = StandardWebhook(WEBHOOK_SECRET)
    assert theirs.verify(request.content, dict(request.headers))["events"][0]["seq"] == 1
    with pytest.raises(WebhookVerificationError):
        theirs.verify(request.content + b" ", dict(request.headers))
    verify, now = sample["verify"], int(request.headers["webhook-timestamp"])
    assert verify(WEBHOOK_SECRET, request.headers, request.content, now + 299)
    assert not verify(WEBHOOK_SECRET, request.headers, request.content, now + 301)
    assert not verify(WEBHOOK_SECRET, request.headers, request.content + b" ", now)
    assert not verify("whsec_" + "A" * 32, request.headers, request.content, now)
    assert not verify(WEBHOOK_SECRET, {}, request.content, now)


async def test_without_a_secret_there_is_no_signature(
    autojump_clock: MockClock, backend: Backend
) -> None:
    async with open_test_broker(broker_of()):
        await trio.sleep(1)
    assert "webhook-id" in backend.requests[0][1].headers
    assert "webhook-signature" not in backend.requests[0][1].headers


def test_the_example_of_the_standard_comes_out() -> None:
    headers = signature(
        WEBHOOK_SECRET, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330.9, b'{"test": 2432232314}'
    )
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }
    assert key_of(WEBHOOK_SECRET) == key_of(WEBHOOK_SECRET.removeprefix("whsec_"))


# a backend that fails


async def test_a_batch_is_sent_again_as_it_was_until_it_is_taken(
    autojump_clock: MockClock, backend: Backend
) -> None:
    backend.say = status(500)
    async with open_test_broker(broker_of(secret=WEBHOOK_SECRET)) as net:
        await trio.sleep(0.5)
        await net.open_plain()
        await trio.sleep(40)
        requests = [request for _, request in backend.requests]
        assert len(requests) > 5
        assert len({request.content for request in requests}) == 1
        assert len({request.headers["webhook-id"] for request in requests}) == 1
        assert len({request.headers["webhook-timestamp"] for request in requests}) > 5
        statistics = net.broker.stats().events["webhooks"]
        assert (statistics.waiting, statistics.failures) == (2, len(requests))
        backend.say = taken
        await trio.sleep(10)
        assert backend.batches()[-2:] == [[("started", 1)], [("opened", 2)]]
        assert net.broker.stats().events["webhooks"].waiting == 0


async def test_retries_wait_twice_as_long_each_time_up_to_a_bound_and_at_random(
    autojump_clock: MockClock, backend: Backend
) -> None:
    backend.say = status(503)
    async with open_test_broker(broker_of()):
        await trio.sleep(200)
        gaps = backend.gaps()
        for gap, bound in zip(gaps, [1, 2, 4, *[8] * 100], strict=False):
            assert bound / 2 <= gap <= bound
        assert len({round(gap, 6) for gap in gaps[3:]}) > 3
        backend.say = taken
        await trio.sleep(20)
        backend.say = status(503)
        backend.requests.clear()
        net_free_gaps = backend.gaps
        await trio.lowlevel.checkpoint()
        assert net_free_gaps() == []


async def test_after_a_success_the_first_retry_is_soon_again(
    autojump_clock: MockClock, backend: Backend
) -> None:
    backend.say = status(503)
    async with open_test_broker(broker_of()) as net:
        await trio.sleep(100)
        backend.say = taken
        await trio.sleep(10)
        backend.say = status(503)
        backend.requests.clear()
        await net.open_plain()
        await trio.sleep(1.1)
        assert backend.gaps()[0] <= 1


@pytest.mark.parametrize(
    "asked, waits",
    [("20", 20.0), ("date", 20.0), ("1000000", RETRY_AFTER_MOST)],
)
async def test_a_backend_may_ask_for_more_time(
    autojump_clock: MockClock, backend: Backend, asked: str, waits: float
) -> None:
    async with open_test_broker(broker_of()) as net:
        await trio.sleep(1)
        if asked == "date":
            at = datetime.fromtimestamp(int(net.broker.wall_clock()) + 21, UTC)
            asked = format_datetime(at, usegmt=True)
        backend.requests.clear()
        backend.say = status(429, retry_after=asked)
        await net.open_plain()
        await trio.sleep(waits + 2)
        assert backend.gaps()[0] == pytest.approx(waits, abs=1.001)


@pytest.mark.parametrize("text", ["", "-5", "soon", "١٢", "1e9", "Mon, 99 Foo 9999 99:99:99"])
def test_a_time_to_wait_that_cannot_be_read_is_none(text: str) -> None:
    assert seconds_of(text, 0.0) == 0.0


def test_a_time_to_wait_is_never_negative_or_endless() -> None:
    assert seconds_of("Wed, 21 Oct 2015 07:28:00 GMT", 2e9) == 0.0
    assert seconds_of("9" * 5000, 0.0) == RETRY_AFTER_MOST


@pytest.mark.parametrize(
    "code, level",
    [
        *[(400, "error"), (401, "error"), (404, "error"), (413, "error"), (307, "error")],
        *[(408, "warning"), (425, "warning"), (429, "warning"), (500, "warning")],
    ],
)
async def test_a_refusal_is_logged_louder_than_an_outage_and_loses_nothing_either(
    autojump_clock: MockClock, backend: Backend, code: int, level: str
) -> None:
    backend.say = status(code, location="https://evil.example/")
    names = ("webhook_failed", "webhook_refused", "webhook_recovered")
    with capture_logs() as lines:
        async with open_test_broker(broker_of()) as net:
            await trio.sleep(60)
            assert len(backend.requests) > 5
            seconds = net.broker.stats().events["webhooks"].seconds
            assert len(backend.requests) - 1 <= seconds.count <= len(backend.requests)
            ours = [line for line in lines if line["event"] in names]
            assert [line["log_level"] for line in ours] == [level]
            assert ours[0]["reason"] == f"status {code}"
            assert ours[0]["backend"] == "backend.example"
            backend.say = taken
            await trio.sleep(10)
            assert named(lines, *names)[1:] == ["webhook_recovered"]
    recovered = next(line for line in lines if line["event"] == "webhook_recovered")
    assert float(recovered["after"].removesuffix(" s")) >= 60
    assert recovered["waiting"] == 0
    assert {str(request.url) for _, request in backend.requests} == {URL}
    assert named(lines, *names)[1:] == ["webhook_recovered"]


async def test_each_outage_is_logged_once_and_a_refusal_within_it_too(
    autojump_clock: MockClock, backend: Backend
) -> None:
    names = ("webhook_failed", "webhook_refused", "webhook_recovered")
    with capture_logs() as lines:
        async with open_test_broker(broker_of()) as net:
            for _ in range(2):
                for say in (refuse_connection, status(404), status(503), status(404), taken):
                    backend.say = say
                    await net.open_plain()
                    await trio.sleep(30)
            assert named(lines, *names) == [*names] * 2


async def test_a_backend_that_hangs_is_asked_again_after_its_time(
    autojump_clock: MockClock, backend: Backend
) -> None:
    backend.say = hang
    async with open_test_broker(broker_of(timeout_seconds=7)) as net:
        await trio.sleep(7.2)
        backend.say = taken
        await trio.sleep(1)
        assert 7.5 <= backend.gaps()[0] <= 8
        await net.open_plain()
        await trio.sleep(1)
        assert net.broker.stats().events["webhooks"].waiting == 0


async def endless(chunks: list[int]) -> AsyncIterator[bytes]:
    while True:
        chunks.append(1)
        await trio.lowlevel.checkpoint()
        yield b"x" * 2**16


async def cut_short() -> AsyncIterator[bytes]:
    yield b"{"
    raise httpx2.ReadError("gone")


async def never() -> AsyncIterator[bytes]:
    yield b"{"
    await trio.sleep_forever()


async def test_of_an_endless_answer_little_is_read_and_its_status_counts(
    autojump_clock: MockClock, backend: Backend
) -> None:
    chunks: list[int] = []

    async def say(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, content=endless(chunks))

    backend.say = say
    async with open_test_broker(broker_of()) as net:
        await trio.sleep(1)
        assert net.broker.stats().events["webhooks"].waiting == 0
        assert (len(backend.requests), len(chunks)) == (1, 3)


@pytest.mark.parametrize("body", [cut_short, never])
async def test_an_answer_that_is_not_whole_is_none(
    autojump_clock: MockClock, backend: Backend, body: Callable[[], AsyncIterator[bytes]]
) -> None:
    async def say(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, content=body())

    backend.say = say
    async with open_test_broker(broker_of()) as net:
        await trio.sleep(30)
        assert len(backend.requests) > 1
        assert net.broker.stats().events["webhooks"].waiting == 1


async def test_an_answer_of_a_backend_counts_by_its_status_alone(
    autojump_clock: MockClock, backend: Backend
) -> None:
    async def say(request: httpx2.Request) -> httpx2.Response:
        headers = {"set-cookie": "a=b", "retry-after": "99"}
        return reply(202, headers, b"\xff{]")

    backend.say = say
    async with open_test_broker(broker_of()) as net:
        await trio.sleep(1)
        await net.open_plain()
        await trio.sleep(1)
        assert backend.batches() == [[("started", 1)], [("opened", 2)]]
        assert "cookie" not in backend.requests[1][1].headers


# a backend that cannot follow


async def test_a_full_queue_holds_up_nobody_and_says_what_was_lost(
    autojump_clock: MockClock, backend: Backend
) -> None:
    backend.say = hang
    with capture_logs() as lines:
        async with open_test_broker(broker_of(max_events=3)) as net:
            began = trio.current_time()
            for _ in range(10):
                await net.open_plain()
            assert trio.current_time() == began
            backend.say = taken
            await trio.sleep(30)
            last = json.loads(backend.requests[-1][1].content)["events"]
            assert [(each["kind"], each["seq"]) for each in last] == [
                *[("started", 1), ("lost", 8), ("opened", 9), ("opened", 10), ("opened", 11)],
            ]
            assert (last[1]["first"], last[1]["missed"]) == (2, 7)
            statistics = net.broker.stats().events["webhooks"]
            assert (statistics.dropped, statistics.delivered) == (7, 5)
            assert named(lines, "events_lost") == ["events_lost"]


# the end


async def test_a_stop_does_not_wait_for_the_next_retry(
    autojump_clock: MockClock, backend: Backend
) -> None:
    backend.say = status(503, retry_after="1000")
    with capture_logs() as lines:
        async with open_test_broker(broker_of(flush_seconds=3)):
            await trio.sleep(50)
            assert len(backend.requests) == 1
            backend.say = taken
            began = trio.current_time()
        assert trio.current_time() == began
    assert [each for batch in backend.batches()[1:] for each in batch] == [
        *[("started", 1), ("stopped", 2)],
    ]
    assert named(lines, "events_untold") == []


@pytest.mark.parametrize("say", [status(503), status(429, retry_after="99"), hang])
async def test_a_stop_waits_so_long_and_no_longer_for_a_backend(
    autojump_clock: MockClock, backend: Backend, say: Say
) -> None:
    backend.say = say
    with capture_logs() as lines:
        async with open_test_broker(broker_of(flush_seconds=3)):
            await trio.sleep(50)
            before, began = len(backend.requests), trio.current_time()
        assert trio.current_time() - began == 3
    assert before <= len(backend.requests) <= before + 7
    (untold,) = [line for line in lines if line["event"] == "events_untold"]
    assert untold["waiting"] == 2


async def test_a_backend_that_comes_back_during_a_stop_gets_the_last_words(
    autojump_clock: MockClock, backend: Backend
) -> None:
    backend.say = refuse_connection
    async with trio.open_nursery() as nursery:
        async with open_test_broker(broker_of(flush_seconds=10)):
            await trio.sleep(1)

            async def heal() -> None:
                await trio.sleep(5)
                backend.say = taken

            nursery.start_soon(heal)
    assert backend.batches()[-1][-1] == ("stopped", 2)


async def test_a_broker_that_is_cancelled_says_no_more(
    autojump_clock: MockClock, backend: Backend
) -> None:
    broker = broker_of()
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(broker.serve, listeners=[MemoryListener()]))
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert backend.batches() == [[("started", 1)]]


# settings


async def test_without_its_package_a_url_is_a_mistake_in_the_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(ConfigError) as raised:
        await broker_of().serve(listeners=[])
    assert str(raised.value) == (
        "webhooks.url needs the package `httpx2`: pip install '.[webhooks]'"
    )


async def test_without_a_url_nothing_is_needed_and_nothing_sent(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)
    async with open_test_broker(Broker()) as net:
        assert net.broker.stats().events == {}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"url": "backend:80"}, "url is 'backend:80': must be like \"https://example.com/events\""),
        ({"url": "http://"}, "url is 'http://': must be like"),
        ({"url": "http://[::1"}, "url is 'http://[::1': must be like"),
        ({"secret": "hunter2"}, "secret must be base64 of 24 random bytes or more, as by: echo"),
        ({"secret": "whsec_" + "A" * 28}, "secret must be base64"),
        ({"secret": "whsec_" + "é" * 32}, "secret must be base64"),
        ({"secret": "whsec_" + "A!" * 32}, "secret must be base64"),
        ({"events": ("opened", "closed")}, "events holds 'closed': known are opened, connected"),
        ({"batch_events": 0}, "batch_events is 0: must be at least 1"),
        ({"max_events": 0}, "max_events is 0"),
        ({"retry_seconds": 0}, "retry_seconds is 0.0: must be more than 0"),
        ({"flush_seconds": -1}, "flush_seconds is -1"),
    ],
)
def test_a_wrong_setting_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        WebhookRules(**settings)
    assert str(raised.value).startswith(message)
    assert "hunter2" not in str(raised.value)


def test_the_secret_is_not_shown() -> None:
    assert WEBHOOK_SECRET not in repr(Config(webhooks=WebhookRules(secret=WEBHOOK_SECRET)))


def test_a_reload_leaves_webhooks_as_they_are() -> None:
    change = merge(Config(), Config(webhooks=RULES))
    assert (change.config, change.refused) == (Config(), ("webhooks",))


def test_a_user_who_is_no_unicode_is_told_of_all_the_same() -> None:
    event = Event(kind="bound", node="n", epoch="e", seq=1, time=1.0, user="\ud800")
    (shown,) = json.loads(encode([event]))["events"]
    assert shown == {
        "kind": "bound",
        "node": "n",
        "epoch": "e",
        "seq": 1,
        "time": 1.0,
        "user": "\ud800",
    }


# a backend that knows who is online


async def test_a_page_of_connections_says_where_in_the_events_it_stands(
    autojump_clock: MockClock, backend: Backend
) -> None:
    backend.say = hang
    async with open_test_broker(broker_of(name="eu-1")) as net:
        await net.open_plain()
        page = page_of(net, 0)
        assert (page["node"], page["seq"]) == ("eu-1", 2)
        assert page["epoch"] == json.loads(backend.requests[0][1].content)["events"][0]["epoch"]
    async with open_test_broker(Broker()) as net:
        assert page_of(net, 0) == {"connections": {}}


def page_of(net: Network, after: int, limit: int = 100) -> Any:
    """A page as a program without Trio asks for it: all at once, as there is room enough for that."""
    params = json.dumps({"after": after, "limit": limit}).encode()
    share = net.node.new_share()
    share.spend(-1e9)
    try:
        Api(net.node).answer("connections", params, share).send(None)
    except StopIteration as done:
        return json.loads(done.value.body)["result"]
    raise AssertionError("it waited")


def truth(net: Network) -> dict[int, tuple[str, str, frozenset[str]]]:
    return {
        info.fd: (info.user, info.protocol.removeprefix("centrifuge-"), frozenset(info.topics))
        for info in net.broker.connections(limit=1000)
    }


class Observer:
    """A backend that is up and down and forgets, and whose answers get lost; on top of the sample
    receiver, whose rules are what the documentation tells others to keep."""

    def __init__(self) -> None:
        self.net: Network | None = None
        self.mode = "ok"
        self.page_size = 100
        self.forget()

    def forget(self) -> None:
        self.online = sample["Online"](self.fetch)

    def fetch(self, after: int) -> Any:
        assert self.net is not None
        return page_of(self.net, after, self.page_size)

    async def handle(self, request: httpx2.Request) -> httpx2.Response:
        mode = self.mode
        if mode == "down":
            raise httpx2.ConnectError("nobody there")
        if mode == "error":
            return reply(500)
        for event in json.loads(request.content)["events"]:
            if mode == "half" and event["seq"] % 2:
                return reply(500)
            await trio.sleep(0.001)
            self.online.apply(event)
        if mode == "lost":
            raise httpx2.ReadError("gone")
        if mode == "hang":
            await trio.sleep_forever()
        return reply(204)

    @property
    def known(self) -> dict[int, tuple[str, str, frozenset[str]]]:
        return {
            fd: (known["user"], known["protocol"], frozenset(known["topics"]))
            for fd, known in self.online.connections.items()
        }

    @asynccontextmanager
    async def open_http_client(
        self, setting: str, extra: str
    ) -> AsyncGenerator[httpx2.AsyncClient]:
        transport = httpx2.MockTransport(self.handle)
        async with httpx2.AsyncClient(transport=transport, timeout=None) as client:
            yield client


MODES = ("ok", "ok", "down", "error", "half", "lost", "hang")
STEPS = st.lists(
    st.sampled_from(["plain", "client", "client"])
    | st.tuples(
        st.sampled_from(["sub", "sub", "unsub", "end", "add", "bye", "cut", "kick"]),
        st.integers(0, 5),
        st.sampled_from(["a", "b", "c.*"]),
    )
    | st.tuples(st.just("bind"), st.integers(0, 5), st.sampled_from(["", "ann", "ben"]))
    | st.tuples(st.just("mode"), st.sampled_from(MODES))
    | st.tuples(st.just("sleep"), st.sampled_from([0.0, 0.002, 0.5, 15.0]))
    | st.sampled_from(["forget", "amnesia", "restart"]),
    max_size=40,
)


async def act(net: Network, peers: list[Peer], step: Any) -> None:
    if step == "plain":
        peers.append(await net.open_websocket())
    elif step == "client":
        peers.append(await net.open_client())
    elif step[0] == "sleep":
        await trio.sleep(step[1])
    elif peers:
        what, number, name = step
        peer, broker = peers[number % len(peers)], net.broker
        if not broker.is_established(peer.fd):
            return
        info = broker.connection_info(peer.fd)
        assert info is not None
        is_client = info.protocol != "plain"
        if what == "bind":
            broker.bind(peer.fd, name)
        elif what in ("sub", "unsub") and is_client:
            method = "subscribe" if what == "sub" else "unsubscribe"
            with suppress(Closed, trio.ClosedResourceError, trio.BrokenResourceError):
                # One that is on its way out may not be answered any more.
                await peer.request(**{method: {"channel": name}})
        elif what == "end":
            broker.end_subscription(peer.fd, name)
        elif what == "add":
            broker.add_subscription(peer.fd, name)
        elif what == "bye":
            await peer.send_close()
        elif what == "cut":
            await peer.aclose()
        elif what == "kick":
            broker.disconnect(peer.fd)


async def observe(observer: Observer, steps: list[Any], rules: WebhookRules) -> None:
    rounds: list[list[Any]] = [[]]
    for step in steps:
        if step == "restart":
            rounds.append([])
        else:
            rounds[-1].append(step)
    for part in rounds:
        async with open_test_broker(Broker(Config(webhooks=rules, ping_seconds=1e9))) as net:
            observer.net = net
            peers: list[Peer] = []
            for step in part:
                if step == "forget":  # and is started anew
                    observer.forget()
                    observer.online.look()
                elif step == "amnesia":  # and learns of it only with what comes next
                    observer.forget()
                    await act(net, peers, "plain")
                elif step[0] == "mode":
                    observer.mode = step[1]
                else:
                    await act(net, peers, step)
            observer.mode = "ok"
            await trio.sleep(60)
            assert net.broker.stats().events["webhooks"].waiting == 0
            assert observer.known == truth(net)
        assert observer.known == {}
        observer.mode = "down" if len(part) % 2 else "ok"


@settings(max_examples=150, deadline=None)
@given(
    STEPS,
    st.sampled_from([1, 2, 100]),
    st.sampled_from([1, 3, 8, 1000]),
    st.sampled_from([1, 2, 100]),
)
def test_a_backend_ends_up_with_exactly_the_broker_s_connections(
    steps: list[Any], batch: int, room: int, page: int
) -> None:
    """It holds for any interleaving of connects, subscriptions, closes, failures and lost answers,
    overflows of the queue, a backend that forgets, and restarts of the broker."""
    observer = Observer()
    observer.page_size = page
    rules = attrs.evolve(
        RULES, batch_events=batch, max_events=room, timeout_seconds=2, retry_seconds=0.1
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(webhooks, "open_http_client", observer.open_http_client)
        trio.run(observe, observer, steps, rules, clock=MockClock(autojump_threshold=0))


def event(kind: str, seq: int, epoch: str = "a", **fields: Any) -> dict[str, Any]:
    if kind not in ("started", "lost", "stopped", "died"):
        fields = {"fd": 1, "user": "", **fields}
    return {"kind": kind, "epoch": epoch, "seq": seq, **fields}


def no_api(after: int) -> Any:
    raise AssertionError("it knows")


def test_an_event_that_comes_again_alone_brings_nobody_back() -> None:
    online = sample["Online"](no_api)
    for each in (event("started", 1), event("opened", 2), event("disconnected", 3)):
        online.apply(each)
    online.apply(event("opened", 2))
    assert online.connections == {}


def test_nobody_survives_a_crash_of_the_broker() -> None:
    online = sample["Online"](no_api)
    for each in (event("started", 1), event("opened", 2), event("started", 1, epoch="b")):
        online.apply(each)
    assert (online.connections, online.epoch, online.seq) == ({}, "b", 1)


def test_pages_that_were_read_one_after_another_fit_together() -> None:
    """Fd 2 went and fd 3 was renamed between the first page and the second."""
    info = {"protocol": "plain", "topics": []}
    pages = {
        0: {"epoch": "a", "seq": 10, "connections": {"1": {**info, "user": "ann"}}},
        1: {"epoch": "a", "seq": 14, "connections": {"3": {**info, "user": "new"}}},
        3: {"epoch": "a", "seq": 14, "connections": {}},
    }
    online = sample["Online"](pages.__getitem__)
    online.apply(event("lost", 9, first=2, missed=8))
    for each in (
        event("bound", 10, fd=1, user="before"),
        event("bound", 11, fd=3, user="old"),
        event("unsubscribed", 12, fd=2, topic="a"),
        event("disconnected", 13, fd=2),
        event("bound", 14, fd=3, user="new"),
    ):
        online.apply(each)
        assert {fd: known["user"] for fd, known in online.connections.items() if fd != 2} == {
            1: "ann",
            3: "new",
        }
    assert online.connections.keys() == {1, 3}
    online.apply(event("bound", 15, fd=3, user="newer"))
    assert online.connections[3]["user"] == "newer"


def test_each_node_has_its_own_events_and_one_that_died_has_nobody() -> None:
    nodes = sample["Nodes"](lambda node, after: no_api(after))
    for name in ("one", "two"):
        nodes.apply({**event("started", 1, epoch=name), "node": name})
    nodes.apply({**event("bound", 2, epoch="one", fd=1, user="ann"), "node": "one"})
    nodes.apply({**event("bound", 2, epoch="two", fd=2, user="bob"), "node": "two"})
    assert nodes.connections.keys() == {1, 2}
    died = event("died", 3, epoch="one", dead="two", dead_epoch="two")
    nodes.apply({**died, "node": "one"})
    assert nodes.connections.keys() == {1}


def test_a_node_that_is_back_before_its_death_is_told_keeps_its_connections() -> None:
    nodes = sample["Nodes"](lambda node, after: no_api(after))
    for epoch in ("before", "after"):
        nodes.apply({**event("started", 1, epoch=epoch), "node": "two"})
    nodes.apply({**event("bound", 2, epoch="after", fd=2, user="bob"), "node": "two"})
    nodes.apply({**event("started", 1, epoch="one"), "node": "one"})
    died = event("died", 2, epoch="one", dead="two", dead_epoch="before")
    nodes.apply({**died, "node": "one"})
    assert nodes.connections.keys() == {2}


def test_who_has_just_started_asks_for_each_node() -> None:
    asked = []

    def fetch(node: str, after: int) -> Any:
        asked.append((node, after))
        there = {"one": 1, "two": 2}.get(node, 0)
        info = {"user": "", "protocol": "plain", "topics": []}
        connections = {str(there): info} if there > after else {}
        page = {"connections": connections, "nodes": {"one": {}, "two": {}}}
        return page if not node else {**page, "node": node, "epoch": node, "seq": 5}

    nodes = sample["Nodes"](fetch)
    nodes.look()
    assert nodes.connections.keys() == {1, 2}
    assert asked == [("", 0), ("one", 0), ("one", 1), ("two", 0), ("two", 2)]


def test_news_of_a_broker_that_is_gone_change_nothing() -> None:
    page = {"epoch": "b", "seq": 5, "connections": {}}
    online = sample["Online"](lambda after: page)
    online.apply(event("started", 1, epoch="b"))
    online.apply(event("opened", 99, epoch="a"))
    assert (online.connections, online.epoch) == ({}, "b")


# over a real socket


async def test_over_a_real_socket_to_a_real_server(
    serve_backend: Callable[[Callable[..., Any]], AbstractAsyncContextManager[str]],
) -> None:
    seen: list[dict[str, Any]] = []
    attempts = []

    async def events(request: Request) -> Response:
        body = await request.body()
        attempts.append(body)
        if len(attempts) == 1:
            return Response("not yet", 503)
        seen.extend(StandardWebhook(WEBHOOK_SECRET).verify(body, dict(request.headers))["events"])
        return Response(status_code=204)

    async with serve_backend(events) as url:
        broker = broker_of(url=url, secret=WEBHOOK_SECRET, retry_seconds=0.01)
        async with open_test_broker(broker) as net:
            peer = await net.open_client()
            await peer.aclose()
    assert [event["kind"] for event in seen] == [
        *("started", "opened", "connected", "disconnected", "stopped"),
    ]
    assert attempts[0] == attempts[1]


@asynccontextmanager
async def sample_backend(*args: str) -> AsyncGenerator[Callable[[], Awaitable[str]]]:
    """`clients/online.py` in a process of its own; what it yields reads its next line."""
    async with trio.open_nursery() as nursery:
        process = await nursery.start(
            partial(
                trio.run_process,
                [sys.executable, str(ROOT / "clients" / "online.py"), *args],
                stdout=subprocess.PIPE,
                check=False,
                env={"BROKER_API_KEY": "s3cret", "BROKER_WEBHOOKS_SECRET": WEBHOOK_SECRET},
            )
        )
        seen = b""

        async def line() -> str:
            nonlocal seen
            while b"\n" not in seen:
                data = await process.stdout.receive_some()
                assert data, f"ended after {seen!r}"
                seen += data
            first, seen = seen.split(b"\n", 1)
            return str(first.decode())

        async with process.stdout:
            yield line
            nursery.cancel_scope.cancel()


async def test_the_sample_backend_knows_who_is_online_also_after_its_own_restart() -> None:
    config = Config(host="127.0.0.1", port=0, api_key="s3cret")
    listeners = await open_listeners(config)
    url = describe(listeners)[0].replace("ws:", "http:")

    async def until(line: Callable[[], Awaitable[str]], wanted: str) -> None:
        while await line() != wanted:
            pass

    with trio.fail_after(30):
        async with sample_backend(url, "0") as line:
            port = (await line()).removeprefix("listening on port ")
            backend_url = f"http://localhost:{port}/events"
            rules = WebhookRules(url=backend_url, secret=WEBHOOK_SECRET, retry_seconds=0.05)
            broker = Broker(attrs.evolve(config, webhooks=rules))
            async with trio.open_nursery() as nursery:
                await nursery.start(partial(broker.serve, listeners=listeners))
                await until(line, "online: nobody")
                async with open_client(url.replace("http:", "ws:")) as client:
                    await until(line, "online: fd 1")
                    broker.bind(client.fd, "ann")
                    await until(line, "online: ann")
                    async with sample_backend(url, "0") as again:
                        # Another process on another port: as good as one that has forgotten all.
                        other = (await again()).removeprefix("listening on port ")
                        body = encode([_of_this_epoch(broker)])
                        headers = signature(WEBHOOK_SECRET, "test", time.time(), body)
                        async with httpx2.AsyncClient() as http:
                            answer = await http.post(
                                f"http://localhost:{other}/events", content=body, headers=headers
                            )
                        assert answer.status_code == 204
                        assert await again() == "online: ann"
                await until(line, "online: nobody")
                broker.stop()


def _of_this_epoch(broker: Broker) -> Event:
    told = broker.stats().events["webhooks"]
    return Event(
        kind="bound", node=told.node, epoch=told.epoch, seq=told.seq, time=1.0, fd=1, user="old"
    )
