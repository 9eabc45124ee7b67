"""Targets of a whole broker in memory: bodies for its HTTP API, requests of clients without WebSocket, and
messages of a client. In each, nothing is an error of ours: none is told (100), and none is logged."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, TypeAlias

import msgspec
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from broker import Broker, Config
from broker.core.json_reader import value_of
from broker.http.api import Api
from broker.testing import Closed, Network, Peer, open_test_broker
from tests.fuzz.codecs import JSON_WORDS
from tests.fuzz.target import target

CONFIG: Final = Config(api_key="k", max_message_bytes=2**16)
TOPIC: Final = "beside"

Act: TypeAlias = Callable[[Network, bytes], Awaitable[None]]


def _with_broker(act: Act, data: bytes) -> None:
    """Do it beside a client that listens: it must go on getting what is published."""
    with capture_logs() as logged:
        trio.run(partial(_beside, act, data), clock=MockClock(autojump_threshold=0))
    wrong = [each for each in logged if each["log_level"] in ("error", "critical")]
    assert not wrong, wrong


async def _beside(act: Act, data: bytes) -> None:
    async with open_test_broker(Broker(CONFIG)) as net:
        bystander = await net.open_client()
        await bystander.request(subscribe={"channel": TOPIC})
        await act(net, data)
        net.broker.publish_nowait(TOPIC, "still here")
        while True:
            push = await bystander.receive_json()
            if push.get("push", {}).get("pub", {}).get("data") == "still here":
                break
        await bystander.aclose()


def _is_no_fault_of_ours(reply: object) -> None:
    if isinstance(reply, dict):
        error = reply.get("error")
        assert not (isinstance(error, dict) and error.get("code") == 100), reply
        for name in ("replies", "responses", "result"):
            _is_no_fault_of_ours(reply.get(name))
    elif isinstance(reply, list):
        for each in reply:
            _is_no_fault_of_ours(each)


async def _call(net: Network, data: bytes) -> None:
    name, _, body = data.partition(b"\n")
    api = Api(net.node)
    method = name.decode("latin-1")
    if api.refuse(method, "k", "memory") is not None:
        return
    with trio.move_on_after(60) as bound:
        answer = await api.answer(method, body, net.node.new_share())
        assert answer.status in (200, 400), answer
        if answer.status == 200:
            assert b"\n" not in answer.body
            reply = value_of(answer.body)
            assert isinstance(reply, dict)
            assert reply.keys() & {"result", "error", "replies"}
            _is_no_fault_of_ours(reply)
    assert not bound.cancelled_caught, "it takes a minute"


@target(
    "api",
    b'publish\n{"channel":"a","data":{"x":1},"tags":{"k":"v"},"idempotency_key":"i","retain":true,"exclude":[1]}',
    b'broadcast\n{"channels":["a","b"],"b64data":"AAEC","report":true}',
    b'batch\n{"commands":[{"publish":{"channel":"a","data":1}},{"info":{}},{"history":{"channel":"a"}}],"parallel":true}',
    b'subscribe\n{"user":"","client":"1","channel":"x","info":{},"b64data":"e30=","recover_since":{"offset":0,"epoch":""}}',
    b'history\n{"channel":"a","limit":10,"since":{"offset":1,"epoch":"x"},"reverse":true}',
    b'disconnect\n{"user":"u","whitelist":["1"],"disconnect":{"code":4000,"reason":"r"}}',
    b'refresh\n{"user":"u","expire_at":1800000000,"expired":false}',
    b'channels\n{"pattern":"a{b,c}*[d-f]?"}', b'connections\n{"user":"","topic":"a","limit":10,"expression":"a"}',
    b'push\n{"fd":1,"data":"x"}', b'presence\n{"channel":"beside"}', b'presence_stats\n{"channel":"beside"}',
    b'trace\n{"fd":1}', b'connection\n{"fd":1}', b'closed_connections\n{"limit":1}', b'history_remove\n{"channel":"a"}',
    words=(*JSON_WORDS, b'"channel":"', b'"channels":["', b'"b64data":"', b'"user":"u"', b'"client":"1"', b'"fd":',
           b'{"publish":{"channel":"', b'"epoch":"', b'"pattern":"', b"{a,b}", b"[!a-", b"*.>", b"fd:1", b"user:"),
    share=3,
)  # fmt: skip
def api(data: bytes) -> None:
    """A backend's body is answered, or refused as bad."""
    _with_broker(_call, data)


async def _talk(net: Network, data: bytes) -> None:
    peer = await net.open_client()
    for part in data.split(b"\0"):
        try:
            await peer.send(net_frame(part))
        except trio.BrokenResourceError:
            break
        await wait_all_tasks_blocked()
    await _hear(peer)
    await peer.aclose()
    await wait_all_tasks_blocked()


def net_frame(payload: bytes) -> bytes:
    from broker.transport.frames import TEXT, masked_frame

    return masked_frame(TEXT, payload)


async def _hear(peer: Peer) -> None:
    """All that came is JSON, line by line, and none of it an error of ours."""
    with trio.move_on_after(1):
        try:
            while True:
                for line in (await peer.receive_text()).split("\n"):
                    reply = msgspec.json.decode(line)
                    assert isinstance(reply, dict)
                    error = reply.get("error", {})
                    assert error.get("code") != 100, reply
        except Closed as closed:
            assert closed.code is None or 1000 < closed.code < 4999


@target(
    "session",
    b'{"id":2,"subscribe":{"channel":"a","recoverable":true,"positioned":true,"join_leave":true}}\0{"id":3,"publish":{"channel":"a","data":{"x":1}}}\n{"id":4,"history":{"channel":"a","limit":5,"since":{"offset":0,"epoch":""}}}',
    b'{"id":2,"subscribe":{"channel":"a.*","tf":{"key":"k","cmp":"eq","val":"1"}}}\n{"id":3,"publish":{"channel":"a.b","data":1}}\0{"id":4,"unsubscribe":{"channel":"a.*"}}',
    b'{"id":2,"publish":{"channel":"fd:1","data":1}}\n{"id":3,"presence":{"channel":"beside"}}\n{"id":4,"presence_stats":{"channel":"beside"}}',
    b'{"id":2,"rpc":{"method":"broker.whoami","data":{}}}\n{"id":3,"rpc":{"method":"broker.request","data":{"to":"fd:2","data":1,"timeout":1}}}',
    b'{"id":2,"rpc":{"method":"broker.publish","data":{"channel":"a","data":1,"tags":{"k":"v"},"retain":true,"key":"i","exclude":[1]}}}',
    b'{"id":2,"refresh":{"token":"x"}}\n{"send":{"data":1}}\n{}\n{"id":5,"sub_refresh":{"channel":"a","token":""}}',
    b'{"id":2,"subscribe":{"channel":"a","recover":true,"offset":3,"epoch":"none"}}\0{"id":3,"subscribe":{"channel":"group:g:a"}}',
    words=(*JSON_WORDS, b'"channel":"a', b"\0", b"fd:1", b"fd:2", b'"method":"broker.', b"*.>", b'"recover":true',
           b'"join_leave":true', b'"epoch":"', b'"limit":', b'"timeout":', b'"to":"', b"presence"),
    share=3,
)  # fmt: skip
def session(data: bytes) -> None:
    """A client's messages are answered in JSON, or end its connection with a code; and nobody else's."""
    _with_broker(_talk, data)


async def _request(net: Network, data: bytes) -> None:
    start, _, body = data.partition(b"\n")
    peer = await net.connect()
    fields = b"Host: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    await peer.send(start.replace(b"\r", b"") + b" HTTP/1.1\r\n" + fields + body)
    await wait_all_tasks_blocked()
    with trio.move_on_after(1):
        first = await peer.receive_head()
        assert first.startswith("HTTP/1.1 "), first
        assert first[9:12] != "500", first
    await peer.aclose()
    await wait_all_tasks_blocked()


@target(
    "http",
    b'POST /connection/uni_sse\n{"subs":{"a":{"recover":true,"epoch":"","offset":0}},"token":"","data":{"n":1}}',
    b'POST /connection/http_stream\n{"id":1,"connect":{"data":1}}\n{"id":2,"subscribe":{"channel":"a"}}',
    b'POST /connection/sse\n{"id":1,"connect":{}}',
    b'POST /emulation\n{"session":"x","node":"y","data":"{\\"id\\":2}"}',
    b"GET /connection/uni_sse?topic=a&topic=b&cf_connect=%7B%22name%22%3A%22x%22%7D&token=\n",
    b"GET /connection/sse?cf_connect=%7B%22id%22%3A1%2C%22connect%22%3A%7B%7D%7D\n",
    b"GET /healthz\n", b"GET /?a=%ff\n", b"POST /api/publish\n{}",
    words=(*JSON_WORDS, b"/connection/uni_sse", b"?topic=", b"&cf_connect=%7B", b"%00", b"%ff", b"/..", b"//", b"%2e%2e"),
    share=3,
)  # fmt: skip
def http(data: bytes) -> None:
    """A request of a client without WebSocket has an answer that is no 500."""
    _with_broker(_request, data)
