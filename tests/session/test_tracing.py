"""Live traces: of a connection, a user, a topic; bounded, and free while nobody looks."""

import re

import msgspec
import pytest
import trio
from trio.testing import MockClock, lockstep_stream_pair, wait_all_tasks_blocked

from broker import Broker, Event, Refused
from broker.core.trace import ENTRIES_MOST, Entry, Target
from broker.session.tracing import TRACES_MOST, Trace
from broker.testing import client_frame, name_users_by_token, open_test_broker
from broker.transport.frames import BINARY


async def settled(trace: Trace) -> list[Entry]:
    """All that has been seen by the time that nothing moves."""
    await wait_all_tasks_blocked()
    return trace.buffer.take()


def kinds(entries: list[Entry]) -> list[tuple[str, str]]:
    return [(entry.kind, entry.text) for entry in entries]


async def test_a_connection_is_traced_both_ways_until_it_ends(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net, await net.open_client() as other:
        peer = await net.open_client()
        async with net.node.traces.open(Target(fd=peer.fd)) as trace:
            await peer.request(subscribe={"channel": "news"})
            await other.request(publish={"channel": "news", "data": {"n": 1}})
            await other.request(publish={"channel": "elsewhere", "data": 2})
            net.broker.disconnect(peer.fd, 4001, "kicked")
            await peer.receive_close()
            await peer.send_close(4001)
            entries = await trace.receive()
            await trio.sleep(1)
            entries += await trace.receive()
            assert {entry.fd for entry in entries} == {peer.fd}
            seen = [(e.kind, e.topic, e.text) for e in entries]
            assert seen[0] == ("received", "", '{"id":1,"subscribe":{"channel":"news"}}')
            assert seen[1] == ("subscribed", "news", "")
            assert seen[2][0] == "sent"
            assert '"subscribe"' in seen[2][2]
            assert seen[3][:2] == ("sent", "news")
            assert '"data":{"n":1}' in seen[3][2]
            assert seen[4][0] == "sent"
            assert "disconnect" in seen[4][2]
            assert seen[-1][0] == "disconnected"
            assert "code=4001 reason=kicked initiator=server" in seen[-1][2]
            assert trace.has_ended
            assert await trace.receive() == [], "no more will come"


async def test_a_topic_is_traced_with_who_publishes_and_who_comes_and_goes(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(name_users_by_token(Broker())) as net:
        ann = await net.open_client(token="ann")
        async with net.node.traces.open(Target(topic="news")) as trace:
            await ann.request(subscribe={"channel": "news"})
            await ann.request(publish={"channel": "news", "data": "hi"})
            net.broker.publish_nowait("news", [1])
            net.broker.publish_nowait("other", 2)
            await ann.request(unsubscribe={"channel": "news"})
            entries = await settled(trace)
            assert [(e.kind, e.fd, e.user, e.topic, e.text) for e in entries] == [
                ("subscribed", ann.fd, "ann", "news", ""),
                ("published", ann.fd, "ann", "news", '"hi"'),
                ("published", 0, "", "news", "[1]"),
                ("unsubscribed", ann.fd, "ann", "news", "code=0 reason=unsubscribed"),
            ]
            assert [e.offset for e in entries] == [0, 1, 2, 0]
            assert [e.size for e in entries] == [0, 4, 3, 0]


@pytest.mark.parametrize(
    ("pattern", "topic", "is_seen"),
    [("a.*", "a.b", True), ("a.>", "a.b.c", True), ("a.*", "b.b", False)],
)
async def test_a_pattern_is_traced_with_the_topics_it_covers(
    autojump_clock: MockClock, pattern: str, topic: str, is_seen: bool
) -> None:
    async with open_test_broker(Broker()) as net, await net.open_client() as peer:
        async with net.node.traces.open(Target(topic=pattern)) as trace:
            await peer.request(subscribe={"channel": topic})
            net.broker.publish_nowait(topic, 1)
            got = [entry.kind for entry in await settled(trace)]
            assert got == (["subscribed", "published"] if is_seen else [])


async def test_a_user_is_traced_on_whatever_connection_the_user_has(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(name_users_by_token(Broker())) as net:
        first = await net.open_client(token="ann")
        plain = await net.open_plain()
        async with net.node.traces.open(Target(user="ann")) as trace:
            second = await net.open_client(token="ann")
            stranger = await net.open_client(token="bob")
            for peer in (first, second, stranger):
                await peer.request(presence={"channel": "t"})
            await plain.send_text("not yet")
            await wait_all_tasks_blocked()
            net.broker.bind(plain.fd, "ann")
            await plain.send_text("now")
            await wait_all_tasks_blocked()
            net.broker.bind(first.fd, "carl")
            await first.request(presence={"channel": "later"})
            await second.aclose()
            entries = await settled(trace)
            received = [(e.fd, e.text) for e in entries if e.kind == "received"]
            asked = '{"id":1,"presence":{"channel":"t"}}'
            assert received == [(first.fd, asked), (second.fd, asked), (plain.fd, "now")]
            events = [(e.fd, e.kind) for e in entries if e.kind not in ("received", "sent")]
            assert (second.fd, "connected") in events
            assert (plain.fd, "bound") in events
            assert events[-1] == (second.fd, "disconnected")
            assert not trace.has_ended, "the user may come back"


async def test_a_token_is_not_shown_in_any_protocol(autojump_clock: MockClock) -> None:
    async with open_test_broker(name_users_by_token(Broker())) as net:
        peer = await net.open_websocket()
        binary = await net.open_websocket(headers={"Sec-WebSocket-Protocol": "centrifuge-protobuf"})
        async with (
            net.node.traces.open(Target(fd=peer.fd)) as trace,
            net.node.traces.open(Target(fd=binary.fd)) as trace_of_binary,
        ):
            await peer.send_json({"id": 1, "connect": {"token": "s3cret"}})
            await binary.send(client_frame(BINARY, b"\x0c\x08\x01\x22\x08\x0a\x06s3cret"))
            for each in (trace, trace_of_binary):
                received = [e for e in await settled(each) if e.kind == "received"]
                assert len(received) == 1
                assert "s3cret" not in received[0].text
            assert received[0].size == 13
            assert received[0].text == "\x0c\x08\x01\x22\x08\x0a\x06…"


PROTOBUF = "application/octet-stream"


@pytest.mark.parametrize(
    ("media_type", "command"),
    [
        ("application/json", b'{"id":1,"connect":{"token":"ann"}}'),
        (PROTOBUF, b"\x09\x08\x01\x22\x05\x0a\x03ann"),
    ],
)
async def test_nobody_who_looks_can_take_a_session_over(
    autojump_clock: MockClock, media_type: str, command: bytes
) -> None:
    """With its session a client without WebSocket is whoever knows it."""
    async with open_test_broker(name_users_by_token(Broker())) as net:
        stream = await net.listener.connect()
        async with net.node.traces.open(Target(user="ann")) as trace:
            head = "POST /connection/http_stream HTTP/1.1\r\nHost: test\r\n"
            head += f"Content-Type: {media_type}\r\nContent-Length: {len(command)}\r\n\r\n"
            await stream.send_all(head.encode() + command)
            entries = await settled(trace)
            answer = bytes(await stream.receive_some())
            (session,) = re.findall(rb"[0-9]\.[\w-]{22}", answer)
            (reply,) = [entry.text for entry in entries if entry.kind == "sent"]
            assert "ann" in reply
            assert session[2:6].decode() not in reply
        await stream.aclose()


async def test_a_slow_reader_loses_entries_and_is_told_how_many(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net, await net.open_client() as peer:
        async with net.node.traces.open(Target(topic="t")) as trace:
            for number in range(ENTRIES_MOST + 500):
                net.broker.publish_nowait("t", number)
            await wait_all_tasks_blocked()
            assert (len(trace.buffer), trace.buffer.missed) == (ENTRIES_MOST, 500)
            await trio.sleep(2)
            assert len(await trace.receive()) == ENTRIES_MOST
            await peer.request(publish={"channel": "t", "data": "after"})
            (last,) = await settled(trace)
            assert (last.text, last.missed) == ('"after"', 500)


async def test_there_are_so_many_traces_at_once(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        traces = [net.node.traces.begin(Target(topic="t")) for _ in range(TRACES_MOST)]
        with pytest.raises(Refused, match="more than 8 traces") as refused:
            net.node.traces.begin(Target(topic="t"))
        assert refused.value.code == 106
        net.node.traces.end(traces[0])
        net.node.traces.begin(Target(topic="t"))


@pytest.mark.parametrize(
    ("target", "code"),
    [
        (Target(fd=99), 102),
        (Target(topic="fd:1"), 103),
        (Target(topic="user:ann"), 103),
        (Target(topic="a\n"), 107),
        (Target(topic="a.*.>.b"), 107),
    ],
)
async def test_what_cannot_be_traced_is_refused_and_leaves_nothing(
    autojump_clock: MockClock, target: Target, code: int
) -> None:
    async with open_test_broker(Broker()) as net:
        with pytest.raises(Refused) as refused:
            net.node.traces.begin(target)
        assert refused.value.code == code
        assert len(net.node.traces) == 0
        assert net.broker.topics() == {}
        assert net.node.router.event_sink is None


async def test_while_nobody_looks_everything_is_as_if_there_were_no_traces(
    autojump_clock: MockClock,
) -> None:
    """The lists and functions on the way of messages are the very ones of a broker without traces."""
    async with open_test_broker(Broker()) as net, await net.open_client() as peer:
        connection = net.node.services.connections[peer.fd]
        before = connection.lane._take_now
        for target in (Target(fd=peer.fd), Target(topic="t"), Target(user="ann")):
            async with net.node.traces.open(target):
                await peer.request(presence={"channel": "t"})
            await wait_all_tasks_blocked()
            assert connection.lane._take_now == before
            assert type(net.outbox(peer.fd).mail) is list
            assert net.node.router.event_sink is None
            assert net.broker.topics() == {}


async def test_two_traces_of_one_connection_see_the_same_until_one_ends(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker()) as net, await net.open_client() as peer:
        async with net.node.traces.open(Target(fd=peer.fd)) as first:
            async with net.node.traces.open(Target(fd=peer.fd)) as second:
                await peer.request(presence={"channel": "t"})
                assert kinds(await settled(first)) == kinds(await settled(second)) != []
            await peer.request(presence={"channel": "t"})
            assert len(await settled(first)) == 2
            assert await settled(second) == []


async def test_all_traces_of_a_topic_are_one_subscription_and_each_sees_all(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker()) as net:
        traces = [net.node.traces.begin(Target(topic="t")) for _ in range(3)]
        assert net.broker.topics() == {"t": 1}
        for left in (3, 2, 1):
            net.broker.publish_nowait("t", left)
            await wait_all_tasks_blocked()
            seen = [[e.text for e in trace.buffer.take()] for trace in traces]
            assert seen == [[str(left)]] * left
            net.node.traces.end(traces.pop())
            assert net.broker.topics() == ({"t": 1} if traces else {})


async def test_what_waits_in_an_outbox_still_goes_out_when_a_trace_begins_and_ends(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_plain(make_pair=lockstep_stream_pair)
        for number in range(5):
            net.broker.push(peer.fd, str(number))
        await wait_all_tasks_blocked()
        async with net.node.traces.open(Target(fd=peer.fd)) as trace:
            net.broker.push(peer.fd, "5")
            assert [entry.text for entry in await settled(trace)] == ["5"]
        net.broker.push(peer.fd, "6")
        assert [await peer.receive_text() for _ in range(7)] == list("0123456")


async def test_a_trace_that_nobody_reads_ends(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        traces = net.node.traces
        trace = traces.begin(Target(topic="t"), idle_seconds=10)
        await trio.sleep(8)
        assert traces.find(trace.id, 10) is trace
        await trio.sleep(8)
        assert len(traces) == 1
        await trio.sleep(4)
        assert len(traces) == 0
        assert trace.has_ended
        with pytest.raises(Refused):
            traces.find(trace.id, 10)


async def test_a_reader_that_waits_is_woken_when_the_broker_stops(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker()) as net:
        trace = net.node.traces.begin(Target(topic="t"))
        net.broker.stop()
        with trio.fail_after(5):
            assert await trace.receive() == []


async def test_the_memory_of_traces_is_in_the_account(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        async with net.node.traces.open(Target(topic="t")) as trace:
            before = net.node.figures.statistics().memory.parts["readers"]
            net.broker.publish_nowait("t", "x" * 100)
            await wait_all_tasks_blocked()
            held = net.node.figures.statistics().memory.parts["readers"] - before
            assert held == trace.buffer.bytes_held > 100
        assert net.node.figures.statistics().memory.parts["readers"] == before


async def test_an_app_s_own_events_go_on_while_something_is_traced(
    autojump_clock: MockClock,
) -> None:
    broker, told = Broker(), []

    @broker.on_event
    async def note(event: object) -> None:
        told.append(getattr(event, "kind", ""))

    async with open_test_broker(broker) as net:
        async with net.node.traces.open(Target(topic="t")):
            async with await net.open_client() as peer:
                await peer.request(subscribe={"channel": "t"})
        await trio.sleep(1)
    assert told == [
        *("started", "opened", "connected", "subscribed", "unsubscribed", "disconnected"),
        "stopped",
    ]


async def test_a_trace_leaves_the_readers_of_events_what_they_are(
    autojump_clock: MockClock,
) -> None:
    """A node that lapses, or buries another, while somebody looks has an epoch to begin and deaths to tell."""
    broker, told = Broker(), []

    @broker.on_event
    async def note(event: Event) -> None:
        told.append((event.kind, event.epoch))

    async with open_test_broker(broker) as net:
        events = net.node.router.events
        async with net.node.traces.open(Target(topic="t")):
            await wait_all_tasks_blocked()
            assert events is not None
            assert net.node.router.events is events
            events.begin_anew()
        await trio.sleep(1)
    (_, first), (_, second) = [each for each in told if each[0] == "started"]
    assert first != second


def test_an_entry_says_nothing_that_does_not_apply() -> None:
    assert msgspec.json.encode(Entry(1.0, "sent", 7)) == b'{"time":1.0,"kind":"sent","fd":7}'
