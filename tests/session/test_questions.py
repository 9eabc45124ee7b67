"""Questions of one client: asked side by side, carried out in the order of its commands."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, lockstep_stream_pair, wait_all_tasks_blocked

from broker import (
    Broker,
    Close,
    Config,
    Connection,
    Disconnect,
    Frame,
    PublishEvent,
    PublishReply,
    ReadEvent,
    Refused,
    SubscribeEvent,
    TopicRules,
)
from broker.protocols.centrifuge_json import CENTRIFUGE_JSON
from broker.session.questions import topic_of
from broker.testing import Closed, Network, Peer, client_frame, open_test_broker
from broker.transport.frames import TEXT

pytestmark = pytest.mark.usefixtures("logging_restored")


@attrs.define
class App:
    """Hooks that take as long as `seconds` has it for what they are asked about, else 0.1 s."""

    seconds: dict[str, float] = attrs.field(factory=dict)
    failures: dict[str, BaseException] = attrs.field(factory=dict)
    begun: list[str] = attrs.field(factory=list)
    ended: list[str] = attrs.field(factory=list)
    cancelled: list[tuple[str, float]] = attrs.field(factory=list)
    at_once: int = 0
    most_at_once: int = 0

    async def work(self, what: str) -> None:
        self.begun.append(what)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await trio.sleep(self.seconds.get(what, 0.1))
        except trio.Cancelled:
            self.cancelled.append((what, trio.current_time()))
            raise
        finally:
            self.at_once -= 1
        self.ended.append(what)
        if what in self.failures:
            raise self.failures[what]

    def serve(self, broker: Broker, *kinds: str) -> None:
        async def subscribe(event: SubscribeEvent) -> None:
            await self.work(event.topic)

        async def publish(event: PublishEvent) -> None:
            await self.work(f"{event.topic}={event.data.decode()}")

        async def read(event: ReadEvent) -> None:
            await self.work(event.topic)

        async def rpc(connection: Connection, method: str, data: object) -> object:
            await self.work(method)
            return method

        async def message(connection: Connection, frame: Frame) -> None:
            await self.work(str(frame.data))

        hooks = {"presence": read, "history": read}
        hooks |= {"subscribe": subscribe, "publish": publish, "rpc": rpc, "message": message}  # type: ignore[dict-item]
        for kind in kinds:
            broker.hooks.set(kind, hooks[kind])


@asynccontextmanager
async def served(*kinds: str, **settings: Any) -> AsyncIterator[tuple[Network, App, Peer]]:
    """A broker with hooks of these kinds, and a client that is connected."""
    app, broker = App(), Broker(Config(**settings))
    app.serve(broker, *kinds)
    async with open_test_broker(broker) as net:
        yield net, app, await net.open_client()


def subscribes(*topics: str, first_id: int = 1) -> list[dict[str, Any]]:
    return [{"id": i, "subscribe": {"channel": t}} for i, t in enumerate(topics, first_id)]


async def replies(peer: Peer, count: int) -> list[dict[str, Any]]:
    """The next `count` objects that come."""
    objects: list[dict[str, Any]] = []
    while len(objects) < count:
        objects += map(json.loads, (await peer.receive_text()).split("\n"))
    return objects


def ids(objects: list[dict[str, Any]]) -> list[int]:
    return [each["id"] for each in objects]


async def last_words(peer: Peer) -> tuple[int | None, str]:
    """Code and reason of the Close; no reply comes before it."""
    try:
        while True:
            assert "id" not in json.loads(await peer.receive_text())
    except Closed as closed:
        return closed.code, closed.reason


# side by side


@pytest.mark.parametrize("each_alone", [False, True], ids=["one message", "a message each"])
async def test_a_client_with_80_subscriptions_is_back_within_a_second(
    autojump_clock: MockClock, each_alone: bool
) -> None:
    topics = [f"t{n}" for n in range(80)]
    async with served("subscribe") as (net, app, peer):
        began = trio.current_time()
        if each_alone:
            for command in subscribes(*topics):
                await peer.send_json(command)
                await wait_all_tasks_blocked()
        else:
            await peer.send_json(*subscribes(*topics))
        assert ids(await replies(peer, 80)) == list(range(1, 81))
        # Official clients give up after five; one after the other it would be eight.
        assert trio.current_time() - began == pytest.approx(1.0)
        assert app.most_at_once == 8
        assert len(net.broker.topics()) == 80


@pytest.mark.parametrize("at_once", [1, 2, 100])
async def test_as_many_are_asked_at_once_as_the_settings_say(
    autojump_clock: MockClock, at_once: int
) -> None:
    async with served("subscribe", questions_at_once=at_once) as (_, app, peer):
        await peer.send_json(*subscribes(*(f"t{n}" for n in range(20))))
        assert ids(await replies(peer, 20)) == list(range(1, 21))
        assert app.most_at_once == min(at_once, 20)


async def test_the_setting_counts_from_the_next_command_on(autojump_clock: MockClock) -> None:
    async with served("subscribe") as (net, app, peer):
        net.broker.reload(Config(questions_at_once=3))
        await peer.send_json(*subscribes(*(f"t{n}" for n in range(20))))
        await replies(peer, 20)
        assert app.most_at_once == 3


@pytest.mark.parametrize(
    "kind, command",
    [
        ("subscribe", {"subscribe": {"channel": "{}"}}),
        ("publish", {"publish": {"channel": "{}", "data": 1}}),
        ("publish", {"rpc": {"method": "publish", "data": {"topic": "{}", "data": 1}}}),
        ("presence", {"presence": {"channel": "{}"}}),
        ("presence", {"presence_stats": {"channel": "{}"}}),
        ("history", {"history": {"channel": "{}"}}),
    ],
)
async def test_each_kind_of_question_about_a_topic_is_asked_beside_others(
    autojump_clock: MockClock, kind: str, command: dict[str, Any]
) -> None:
    async with served(kind) as (_, app, peer):
        began = trio.current_time()
        text = json.dumps(command)
        commands = [json.loads(text.replace("{}", f"t{n}")) | {"id": n} for n in range(1, 9)]
        await peer.send_json(*commands)
        assert ids(await replies(peer, 8)) == list(range(1, 9))
        assert trio.current_time() - began == pytest.approx(0.1)
        assert app.most_at_once == 8


# in order


async def test_replies_come_in_order_whichever_answer_was_there_first(
    autojump_clock: MockClock,
) -> None:
    async with served("subscribe") as (_, app, peer):
        app.seconds = {"a": 3, "b": 2, "c": 1}
        await peer.send_json(*subscribes("a", "b", "c", "d"))
        assert ids(await replies(peer, 4)) == [1, 2, 3, 4]
        assert app.ended == ["d", "c", "b", "a"]


async def test_publications_to_different_topics_keep_their_order(
    autojump_clock: MockClock,
) -> None:
    async with served("publish") as (net, app, peer):
        reader = await net.open_client()
        await reader.request(subscribe={"channel": ">"})
        app.seconds = {"a=1": 2, "b=2": 1, "c=3": 0.5}
        await peer.send_json(
            *({"publish": {"channel": t, "data": n}} for t, n in (("a", 1), ("b", 2), ("c", 3)))
        )
        pushes = await replies(reader, 3)
        assert [each["push"]["pub"]["data"] for each in pushes] == [1, 2, 3]
        assert app.ended == ["c=3", "b=2", "a=1"]


@pytest.mark.parametrize("each_alone", [False, True], ids=["one message", "a message each"])
async def test_of_two_about_one_topic_the_second_is_asked_when_the_first_is_carried_out(
    autojump_clock: MockClock, each_alone: bool
) -> None:
    async with served("publish") as (net, app, peer):
        commands = [
            {"id": n + 1, "publish": {"channel": "ab"[n % 2], "data": n // 2}} for n in range(8)
        ]
        for group in [[each] for each in commands] if each_alone else [commands]:
            await peer.send_json(*group)
        assert ids(await replies(peer, 8)) == list(range(1, 9))
        assert app.most_at_once == 2
        for topic in "ab":
            assert [p.value for p in (await net.broker.history(topic))[0]] == [0, 1, 2, 3]


async def test_a_run_of_publishes_to_one_topic_is_carried_out_one_by_one_beside_another(
    autojump_clock: MockClock,
) -> None:
    async with served("publish") as (_, app, peer):
        app.seconds = {"slow=0": 1}
        await peer.send_json(
            {"id": 1, "publish": {"channel": "slow", "data": 0}},
            *({"id": n, "publish": {"channel": "a", "data": n}} for n in range(2, 6)),
        )
        assert ids(await replies(peer, 5)) == [1, 2, 3, 4, 5]
        # Asked beside the slow one, and only then behind each other.
        assert set(app.begun[:2]) == {"slow=0", "a=2"}
        assert app.begun[2:] == ["a=3", "a=4", "a=5"]
        assert app.most_at_once == 2


async def test_a_change_by_the_first_counts_for_the_second_about_its_topic(
    autojump_clock: MockClock,
) -> None:
    """Only subscribers may publish: asked before it is one, it would be refused."""
    rules = TopicRules(may_publish="subscribers")
    async with served("subscribe", "publish", topics=rules) as (net, _, peer):
        await peer.send_json(
            *subscribes("a"),
            {"id": 2, "publish": {"channel": "a", "data": 1}},
            {"id": 3, "unsubscribe": {"channel": "a"}},
            {"id": 4, "subscribe": {"channel": "a"}},
            {"id": 5, "rpc": {"method": "publish", "data": {"topic": "a", "data": 2}}},
        )
        objects = await replies(peer, 7)
        assert [o for o in objects if "error" in o] == []
        assert [o["id"] for o in objects if "id" in o] == [1, 2, 3, 4, 5]
        assert [p.value for p in (await net.broker.history("a"))[0]] == [1, 2]


async def test_a_command_that_nobody_is_asked_about_waits_for_its_turn(
    autojump_clock: MockClock,
) -> None:
    async with served("subscribe") as (net, app, peer):
        app.seconds = {"a": 1}
        await peer.send_json(*subscribes("a"))
        await wait_all_tasks_blocked()
        # Another read, which the lane could carry out at once.
        await peer.send_json({"id": 2, "publish": {"channel": "a", "data": "mine"}})
        await peer.send_json({"id": 3, "presence": {"channel": "a"}})
        await peer.send_json({"id": 4, "unsubscribe": {"channel": "a"}})
        await peer.send_json({"id": 5, "history": {"channel": "a", "limit": 9}})
        await wait_all_tasks_blocked()
        assert (await net.broker.history("a"))[0] == []
        objects = await replies(peer, 6)
        assert [o.get("id") for o in objects] == [1, None, 2, 3, 4, 5]
        assert list(objects[3]["presence"]["presence"]) == [str(peer.fd)]


async def test_a_pong_while_a_question_is_open_changes_nothing(autojump_clock: MockClock) -> None:
    async with served("subscribe") as (_, app, peer):
        app.seconds = {"a": 1}
        await peer.send_json(*subscribes("a"), {}, *subscribes("b", first_id=2))
        await peer.send_json({})
        assert ids(await replies(peer, 2)) == [1, 2]
        assert app.most_at_once == 2


async def test_a_large_run_of_publishes_behind_a_question_is_kept_in_order_and_bounded(
    autojump_clock: MockClock,
) -> None:
    async with served("subscribe") as (net, _, peer):
        await peer.send_json(*subscribes("a"))
        await wait_all_tasks_blocked()
        for n in range(100):
            await peer.send_json({"publish": {"channel": "b", "data": n}})
        (connection,) = net.node.services.connections.values()
        await wait_all_tasks_blocked()
        assert len(connection._dispatcher.questions.turns) <= 8  # type: ignore[attr-defined]
        await replies(peer, 1)
        await wait_all_tasks_blocked()
        assert [p.value for p in (await net.broker.history("b"))[0]] == list(range(100))


async def test_room_for_subscriptions_is_counted_in_turn(autojump_clock: MockClock) -> None:
    async with served("subscribe", "publish", max_topics=3) as (net, app, peer):
        await peer.send_json(*subscribes("a", "b", "c"))
        await replies(peer, 3)
        app.seconds = {"x=1": 1}
        await peer.send_json(
            {"id": 4, "publish": {"channel": "x", "data": 1}},
            {"id": 5, "unsubscribe": {"channel": "a"}},
            {"id": 6, "subscribe": {"channel": "d"}},  # for which there is room in its turn
            {"id": 7, "subscribe": {"channel": "e"}},
        )
        objects = await replies(peer, 4)
        assert ids(objects) == [4, 5, 6, 7]
        assert [o["error"]["code"] for o in objects if "error" in o] == [106]
        assert set(net.broker.topics()) == {"b", "c", "d"}


# alone


async def test_calls_of_the_app_go_alone(autojump_clock: MockClock) -> None:
    """A call may be anything, such as a login that all behind it needs."""
    async with served("subscribe", "rpc") as (_, app, peer):
        await peer.send_json(
            *subscribes("a", "b"),
            {"id": 3, "rpc": {"method": "login"}},
            {"id": 4, "rpc": {"method": "next"}},
            *subscribes("c", "d", first_id=5),
        )
        assert ids(await replies(peer, 6)) == [1, 2, 3, 4, 5, 6]
        assert app.begun[2:4] == app.ended[2:4] == ["login", "next"]
        assert set(app.begun[:2]) == {"a", "b"}
        assert set(app.begun[4:]) == {"c", "d"}
        assert app.most_at_once == 2


async def test_messages_for_the_app_go_alone(autojump_clock: MockClock) -> None:
    async with served("subscribe", "message") as (_, app, peer):
        app.seconds = {"a": 1}
        await peer.send_json(*subscribes("a"), {"send": {"data": 1}}, *subscribes("b", first_id=2))
        assert ids(await replies(peer, 2)) == [1, 2]
        assert app.ended == ["a", "1", "b"]


async def test_plain_messages_are_handled_one_at_a_time(autojump_clock: MockClock) -> None:
    async with served("message") as (net, app, _):
        peer = await net.open_plain()
        for n in range(5):
            await peer.send_text(str(n))
        await trio.sleep(1)
        assert app.ended == list("01234")
        assert app.most_at_once == 1


# what goes wrong


async def test_each_failure_is_answered_in_its_turn(autojump_clock: MockClock) -> None:
    async with served("subscribe") as (net, app, peer):
        app.seconds = {"a": 1}
        app.failures = {"b": Refused(4242, "no"), "c": ZeroDivisionError("secret")}
        with capture_logs() as lines:
            await peer.send_json(*subscribes("a", "b", "c", "d"))
            objects = await replies(peer, 4)
        assert ids(objects) == [1, 2, 3, 4]
        codes = [o["error"]["code"] for o in objects if "error" in o]
        assert codes == [4242, 100]
        assert [(x["hook"], x["fd"]) for x in lines if x["event"] == "hook_failed"] == [
            ("subscribe", peer.fd)
        ]
        assert set(net.broker.topics()) == {"a", "d"}


async def test_a_client_that_is_sent_away_gets_what_came_before_and_nothing_behind(
    autojump_clock: MockClock,
) -> None:
    async with served("subscribe", "publish") as (net, app, peer):
        app.seconds = {"a": 1, "d": 2}
        app.failures = {"b": Disconnect(4001, "banned")}
        await peer.send_json(
            *subscribes("a", "b", "c", "d"), {"id": 9, "publish": {"channel": "e", "data": 1}}
        )
        assert ids(await replies(peer, 1)) == [1]
        assert await last_words(peer) == (4001, "banned")
        await trio.sleep(3)
        assert net.broker.topics() == {}
        assert net.broker.stats().published == 0


@pytest.mark.parametrize(
    "bad, code",
    [
        ({"connect": {}, "id": 9}, 3501),
        ({"presence": {"channel": "a"}}, 3501),
        ("nonsense", 3501),
    ],
)
async def test_a_bad_command_ends_the_client_when_its_turn_comes(
    autojump_clock: MockClock, bad: object, code: int
) -> None:
    async with served("subscribe") as (_, _app, peer):
        await peer.send_json(*subscribes("a", "b"))
        await peer.send_text(bad if isinstance(bad, str) else json.dumps(bad))
        await peer.send_json(*subscribes("c", first_id=3))
        assert ids(await replies(peer, 2)) == [1, 2]
        assert (await last_words(peer))[0] == code


async def test_a_command_too_many_is_refused_in_its_turn(autojump_clock: MockClock) -> None:
    async with served("subscribe", message_rate=1, message_burst=3) as (_, app, peer):
        app.seconds = {"a": 1}  # its connect was the first of the burst
        await peer.send_json(*subscribes("a", "b", "c"))
        objects = await replies(peer, 3)
        assert ids(objects) == [1, 2, 3]
        assert objects[2]["error"]["code"] == 111


async def test_rights_are_those_of_the_turn(autojump_clock: MockClock) -> None:
    async with served("subscribe", "publish") as (net, _app, peer):
        await peer.send_json(*subscribes("a"), {"id": 2, "publish": {"channel": "b", "data": 1}})
        await wait_all_tasks_blocked()
        net.broker.reload(Config(topics=TopicRules(may_publish="none", may_subscribe="none")))
        objects = await replies(peer, 2)
        assert [o["error"]["code"] for o in objects] == [103, 103]


async def test_the_hook_s_word_counts_for_its_own_command(autojump_clock: MockClock) -> None:
    broker = Broker()

    @broker.on_publish
    async def shout(event: PublishEvent) -> PublishReply:
        await trio.sleep(1 / len(event.data))
        return PublishReply(event.data.upper())

    async with open_test_broker(broker) as net:
        peer = await net.open_client()
        texts = ["x" * n for n in range(1, 9)]
        commands = [{"id": i, "publish": {"channel": t, "data": t}} for i, t in enumerate(texts, 1)]
        await peer.send_json(*commands)
        await replies(peer, 8)
        for text in texts:
            assert [p.value for p in (await broker.history(text))[0]] == [text.upper()]


# the end


async def test_hooks_that_are_still_busy_when_the_client_has_gone_have_close_seconds(
    autojump_clock: MockClock,
) -> None:
    async with served("subscribe") as (net, app, peer):
        closes: list[Close] = []

        @net.broker.on_close
        async def note(connection: Connection, close: Close) -> None:
            assert app.at_once == 0
            closes.append(close)

        app.seconds = {"a": 2, "b": 60, "c": 60}
        await peer.send_json(*subscribes("a", "b", "c"))
        await wait_all_tasks_blocked()
        began = trio.current_time()
        await peer.aclose()
        await trio.sleep(30)
        assert app.ended == ["a"]
        ends = began + net.broker.config.close_seconds
        assert app.cancelled == [("b", ends), ("c", ends)] or app.cancelled == [
            ("c", ends),
            ("b", ends),
        ]
        assert len(closes) == 1
        assert not net.broker.exists(peer.fd)
        assert net.broker.topics() == {}


async def test_hooks_have_close_seconds_also_where_the_peer_stays(
    autojump_clock: MockClock,
) -> None:
    async with served("subscribe") as (net, app, peer):
        app.seconds = {"a": 60, "b": 60}
        await peer.send_json(*subscribes("a", "b"))
        await wait_all_tasks_blocked()
        ends = trio.current_time() + net.broker.config.close_seconds
        net.broker.disconnect(peer.fd)
        await trio.sleep(30)  # it never answers our Close, for which it has as long again
        assert sorted(app.cancelled) == [("a", ends), ("b", ends)]


async def test_a_stop_leaves_no_question_behind(autojump_clock: MockClock) -> None:
    async with served("subscribe") as (net, app, peer):
        app.seconds = dict.fromkeys("abc", 60.0)
        await peer.send_json(*subscribes("a", "b", "c"))
        await wait_all_tasks_blocked()
        net.broker.stop()
        await trio.sleep(20)
        assert sorted(what for what, _ in app.cancelled) == ["a", "b", "c"]
        assert app.at_once == 0


async def test_a_command_behind_a_large_reply_waits_until_that_is_taken(
    autojump_clock: MockClock,
) -> None:
    async with served("subscribe") as (net, app, _):
        for n in range(100):
            net.broker.publish_nowait("big", "x" * 20_000 + str(n))
        peer = await net.open_client(make_pair=lockstep_stream_pair)
        commands: list[dict[str, Any]] = subscribes("a")
        commands += [{"id": 2, "history": {"channel": "big", "limit": 100}}]
        await peer.send_json(*subscribes("big"))
        await replies(peer, 1)
        await peer.send_json(*commands, *subscribes("b", first_id=3))
        assert ids(await replies(peer, 3)) == [1, 2, 3]
        assert set(app.ended) == {"big", "a", "b"}


# the topic of a command


@pytest.mark.parametrize(
    "text, topic",
    [
        ('{"id":1,"subscribe":{"channel":"a"}}', "a"),
        ('{"id":1,"unsubscribe":{"channel":"a"}}', "a"),
        ('{"id":1,"sub_refresh":{"channel":"a","token":"x"}}', "a"),
        ('{"id":1,"publish":{"channel":"a","data":1}}', "a"),
        ('{"id":1,"rpc":{"method":"publish","data":{"topic":"a","data":1}}}', "a"),
        ('{"id":1,"rpc":{"method":"request","data":{"to":"fd:7","data":1}}}', "fd:7"),
        ('{"id":1,"rpc":{"method":"will","data":{"topic":"a","data":1}}}', "a"),
        ('{"id":1,"rpc":{"method":"will","data":{}}}', None),
        ('{"id":1,"rpc":{"method":"reply","data":{"reply_to":"1","data":1}}}', None),
        ('{"id":1,"rpc":{"method":"publish","data":{"topic":5}}}', None),
        ('{"id":1,"rpc":{"method":"publish"}}', None),
        ('{"id":1,"rpc":{"method":"mine","data":{"topic":"a"}}}', None),
        ('{"id":1,"connect":{}}', None),
        ('{"id":1,"refresh":{"token":"x"}}', None),
        ('{"send":{"data":1}}', None),
    ],
)
def test_a_command_is_about_the_topic_it_names(text: str, topic: str | None) -> None:
    (command,) = CENTRIFUGE_JSON.decode(text.encode())
    (method,) = json.loads(text).keys() - {"id"}
    assert topic_of(command, method) == topic


async def test_bytes_that_are_one_frame_or_many_make_no_difference(
    autojump_clock: MockClock,
) -> None:
    """A read may hold many messages, each of one command."""
    async with served("subscribe") as (_, app, peer):
        messages = [json.dumps(each).encode() for each in subscribes(*(f"t{n}" for n in range(16)))]
        await peer.send(b"".join(client_frame(TEXT, each) for each in messages))
        began = trio.current_time()
        assert ids(await replies(peer, 16)) == list(range(1, 17))
        assert trio.current_time() - began == pytest.approx(0.2)
        assert app.most_at_once == 8
