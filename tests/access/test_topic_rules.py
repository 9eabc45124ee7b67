"""Which rules a topic has, and who may what: as tables, then asked of a broker in memory."""

import json
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from broker import (
    Broker,
    Config,
    ConnectEvent,
    Connection,
    ConnectReply,
    PublishEvent,
    ReadEvent,
    Refused,
    SubscribeEvent,
    TopicRules,
)
from broker.access.topic_rules import (
    CACHED,
    RuleBook,
    allows,
    check_access,
    check_subscribe,
    personal_topic,
    reaches,
)
from broker.config.settings import Askers, TopicPattern
from broker.testing import Closed, Peer, open_test_broker


def sized(size: int) -> TopicRules:
    return TopicRules(history_size=size)


BOOK = RuleBook(
    Config(
        topics=sized(1),
        namespaces={"chat": sized(2), "rest": sized(3)},
        patterns=(
            TopicPattern("news.>", sized(10)),
            TopicPattern("news.*.eu", sized(11)),
            TopicPattern("*.eu", sized(12)),
            TopicPattern("chat:lobby", sized(13)),
            TopicPattern("news.first", sized(14)),
        ),
    )
)


@pytest.mark.parametrize(
    "name, size",
    [
        ("plain", 1),
        ("news", 1),
        ("a.b", 1),
        ("", 1),
        ("chat:room", 2),
        ("chat:", 2),
        ("$chat:room", 2),
        ("chat:a:b", 2),
        ("rest:chat:room", 3),
        ("chat:#7", 2),
        ("chat:room.*", 2),  # a pattern's own name has rules as well
        ("$plain", 1),
        ("#7", 1),
        ("news.a", 10),
        ("news.x.eu", 10),  # the first that matches, not the closest
        ("news.eu", 10),
        ("news.first", 10),
        ("x.eu", 12),
        ("other:x.eu", 12),  # a pattern comes before the namespace, known or not
        ("chat:lobby", 13),
        ("news.*", 10),
        ("other:room", None),
        ("$other:room", None),
        (":room", None),
        ("Chat:room", None),
        ("other#chat:x", 1),  # the colon is in a user's name
        ("chat:room#a:b", 2),
        ("#other:7", 1),
    ],
)
def test_the_first_pattern_counts_then_the_namespace_then_the_default(
    name: str, size: int | None
) -> None:
    for _ in range(2):  # found, then remembered
        rules = BOOK.find(name)
        assert (rules and rules.history_size) == size
    if size is None:
        with pytest.raises(Refused, match="102"):
            BOOK.of(name)
    else:
        assert BOOK.of(name) is rules


def test_without_namespaces_a_colon_is_a_letter_like_others() -> None:
    book = RuleBook(Config(topics=sized(1), patterns=(TopicPattern("a:*", sized(2)),)))
    assert book.of("any:thing").history_size == 1
    assert book.of("a:*").history_size == 2  # the star is no token of its own here


def test_the_names_that_are_remembered_are_bounded() -> None:
    book = RuleBook(Config(namespaces={"a": sized(2)}))
    for number in range(CACHED + 100):
        book.of(f"a:{number}")
    assert book.find.cache_info().currsize == CACHED  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "who, nobody, alice, subscribed",
    [
        ("all", True, True, True),
        ("users", False, True, False),
        ("subscribers", False, False, True),
        ("none", False, False, False),
    ],
)
def test_who_is_meant_by_each_word(
    who: Askers, nobody: bool, alice: bool, subscribed: bool
) -> None:
    assert allows(who, "") is nobody
    assert allows(who, "alice") is alice
    assert allows(who, "", subscribed=True) is subscribed


OPEN, USERS, NONE = (TopicRules(may_subscribe=who) for who in ("all", "users", "none"))


@pytest.mark.parametrize(
    "rules, name, user, asked, allowed",
    [
        (OPEN, "a", "", False, True),
        (USERS, "a", "", False, False),
        (USERS, "a", "", True, False),  # a hook decides after the rules, not instead
        (USERS, "a", "bob", False, True),
        (NONE, "a", "bob", True, False),
        (OPEN, "$a", "bob", False, False),
        (OPEN, "$a", "", True, True),
        (OPEN, "a$", "", False, True),
        (OPEN, "a#bob", "bob", False, True),
        (OPEN, "a#ann,bob", "bob", False, True),
        (OPEN, "#bob", "bob", False, True),
        (OPEN, "a#ann", "bob", False, False),
        (OPEN, "a#ann", "", False, False),
        (OPEN, "a#", "", False, False),  # nobody in particular is not a user called ""
        (OPEN, "a#,ann", "", True, False),
        (OPEN, "a#bobby", "bob", False, False),
        (OPEN, "a#bob#ann", "bob", False, False),  # the last sign counts
        (OPEN, "$a#bob", "bob", False, False),
        (OPEN, "$a#bob", "bob", True, True),
        (OPEN, "$a#ann", "bob", True, False),
        (NONE, "#bob", "bob", False, False),
    ],
)
def test_who_may_subscribe(
    rules: TopicRules, name: str, user: str, asked: bool, allowed: bool
) -> None:
    if allowed:
        check_subscribe(rules, name, user, asked=asked)
    else:
        with pytest.raises(Refused, match="103"):
            check_subscribe(rules, name, user, asked=asked)


@pytest.mark.parametrize(
    "who, name, user, subscribed, allowed",
    [
        ("all", "a", "", False, True),
        ("subscribers", "a", "", True, True),
        ("subscribers", "a", "bob", False, False),
        ("users", "a", "", True, False),
        ("all", "$a", "bob", False, False),
        ("all", "$a", "", True, True),
        ("none", "$a", "", True, False),
        ("all", "a#ann", "bob", False, False),
        ("all", "a#ann", "bob", True, True),  # let in by a token
        ("all", "a#bob", "bob", False, True),
        ("subscribers", "a#bob", "bob", False, False),
    ],
)
def test_who_may_publish_and_read(
    who: Askers, name: str, user: str, subscribed: bool, allowed: bool
) -> None:
    if allowed:
        check_access(who, name, user, subscribed=subscribed)
    else:
        with pytest.raises(Refused, match="103"):
            check_access(who, name, user, subscribed=subscribed)


@pytest.mark.parametrize(
    "rules, topic, user, reached",
    [
        (OPEN, "a", "", True),
        (OPEN, "$a", "ann", False),
        (OPEN, "a#ann", "ann", True),
        (OPEN, "a#ann", "bob", False),
        (OPEN, "a#ann", "", False),
        (USERS, "a", "", False),
        (USERS, "a", "ann", True),
        (NONE, "a", "ann", False),
    ],
)
def test_whom_a_publication_reaches_through_a_pattern(
    rules: TopicRules, topic: str, user: str, reached: bool
) -> None:
    assert reaches(rules, topic, user) is reached


# asked of a broker


def served(config: Config) -> Broker:
    """A broker that takes a client's token for its user."""
    broker = Broker(config)

    @broker.on_connect
    async def name(event: ConnectEvent) -> ConnectReply:
        return ConnectReply(user=event.token)

    return broker


async def code_of(peer: Peer, **command: object) -> int:
    """The error that a command is answered with; 0 for none."""
    reply = await peer.request(**command)
    code = reply.get("error", {}).get("code", 0)
    assert isinstance(code, int)
    return code


async def arrived(peer: Peer) -> list[Any]:
    """All objects that come until nothing more does; a Close at the end as its code."""
    objects: list[Any] = []
    try:
        while True:
            with trio.move_on_after(0.1) as silence:
                text = await peer.receive_text()
            if silence.cancelled_caught:
                return objects
            objects += map(json.loads, text.split("\n"))
    except Closed as closed:
        return [*objects, closed.code]


def data_of(objects: list[Any]) -> list[Any]:
    return [o["push"]["pub"]["data"] for o in objects if "pub" in o.get("push", {})]


COMMANDS = {
    "publish": {"data": 1},
    "subscribe": {},
    "presence": {},
    "presence_stats": {},
    "history": {"limit": 1},
}


async def codes(peer: Peer, topic: str) -> dict[str, int]:
    """What each command that names a topic is answered with. Nothing is left subscribed."""
    answers = {
        method: await code_of(peer, **{method: {"channel": topic, **rest}})
        for method, rest in COMMANDS.items()
    }
    await peer.request(unsubscribe={"channel": topic})
    return answers


LOCKED = TopicRules(
    may_publish="none", may_subscribe="none", may_read_presence="none", may_read_history="none"
)


@pytest.mark.parametrize(
    "rules, answers",
    [
        (TopicRules(), [0, 0, 0, 0, 0]),
        (LOCKED, [103, 103, 103, 103, 103]),
        (TopicRules(may_publish="users"), [103, 0, 0, 0, 0]),
        (TopicRules(may_publish="subscribers"), [103, 0, 0, 0, 0]),
        (TopicRules(may_subscribe="users"), [0, 103, 0, 0, 0]),
        (TopicRules(may_read_presence="users"), [0, 0, 103, 103, 0]),
        (TopicRules(may_read_presence="subscribers"), [0, 0, 0, 0, 0]),  # it is one by then
        (TopicRules(may_read_history="users"), [0, 0, 0, 0, 103]),
        (TopicRules(presence=False), [0, 0, 108, 108, 0]),
        (TopicRules(history_size=0), [0, 0, 0, 0, 108]),
        (TopicRules(history_size=0, may_read_history="none"), [0, 0, 0, 0, 108]),
    ],
)
@pytest.mark.parametrize("place", ["default", "namespace", "pattern"])
async def test_each_rule_holds_wherever_it_stands(
    autojump_clock: MockClock, rules: TopicRules, answers: list[int], place: str
) -> None:
    config = {
        "default": Config(topics=rules),
        "namespace": Config(topics=LOCKED, namespaces={"chat": rules}),
        "pattern": Config(namespaces={"chat": LOCKED}, patterns=(TopicPattern("chat:r", rules),)),
    }[place]
    async with open_test_broker(served(config)) as net:
        peer = await net.open_client()
        assert list((await codes(peer, "chat:r")).values()) == answers


async def test_a_user_may_what_nobody_in_particular_may_not(autojump_clock: MockClock) -> None:
    rules = TopicRules(
        may_publish="users",
        may_subscribe="users",
        may_read_presence="users",
        may_read_history="users",
    )
    async with open_test_broker(served(Config(topics=rules))) as net:
        nobody, alice = await net.open_client(), await net.open_client(token="alice")
        assert set((await codes(nobody, "a")).values()) == {103}
        assert set((await codes(alice, "a")).values()) == {0}
        # Who it is may change under way.
        net.broker.bind(alice.fd, "")
        net.broker.bind(nobody.fd, "bob")
        assert set((await codes(nobody, "a")).values()) == {0}
        assert set((await codes(alice, "a")).values()) == {103}


async def test_an_unknown_namespace_is_an_unknown_channel(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker(Config(namespaces={"chat": TopicRules()}))) as net:
        peer = await net.open_client()
        assert set((await codes(peer, "chta:room")).values()) == {102}
        assert set((await codes(peer, "chat:room")).values()) == {0}
        with pytest.raises(Refused, match="102"):
            net.broker.publish("chta:room", 1)


async def test_who_may_publish_is_asked_for_each_topic_and_each_time(
    autojump_clock: MockClock,
) -> None:
    config = Config(
        namespaces={"open": TopicRules(), "subs": TopicRules(may_publish="subscribers")}
    )
    async with open_test_broker(Broker(config)) as net:
        peer = await net.open_client()

        async def publish(topic: str) -> int:
            return await code_of(peer, publish={"channel": topic, "data": 1})

        assert [await publish(t) for t in ("open:a", "subs:a", "open:a", "open:b")] == [
            0,
            103,
            0,
            0,
        ]
        await peer.request(subscribe={"channel": "subs:a"})
        assert [await publish(t) for t in ("subs:a", "subs:b", "subs:a")] == [0, 103, 0]
        await peer.request(unsubscribe={"channel": "subs:a"})
        assert await publish("subs:a") == 103


async def test_hooks_are_asked_only_for_what_the_rules_allow(autojump_clock: MockClock) -> None:
    broker, asked = Broker(Config(namespaces={"no": LOCKED, "yes": TopicRules()})), []

    @broker.on_publish
    async def publish(event: PublishEvent) -> None:
        asked.append(("publish", event.topic))

    @broker.on_subscribe
    async def subscribe(event: SubscribeEvent) -> None:
        asked.append(("subscribe", event.topic))

    @broker.on_presence
    async def presence(event: ReadEvent) -> None:
        asked.append(("presence", event.topic))

    @broker.on_history
    async def history(event: ReadEvent) -> None:
        asked.append(("history", event.topic))

    async with open_test_broker(broker) as net:
        peer = await net.open_client()
        assert set((await codes(peer, "no:a")).values()) == {103}
        assert not asked
        assert set((await codes(peer, "yes:a")).values()) == {0}
        assert {method for method, _ in asked} == {"publish", "subscribe", "presence", "history"}


async def test_a_hook_lets_into_a_private_topic_and_only_members_use_it(
    autojump_clock: MockClock,
) -> None:
    broker = served(Config())
    async with open_test_broker(broker) as net:
        ann, bob = await net.open_client(token="ann"), await net.open_client(token="bob")
        assert set((await codes(ann, "$plans")).values()) == {103}

        @broker.on_subscribe
        async def only_ann(event: SubscribeEvent) -> None:
            if event.connection.user != "ann":
                raise Refused(103)

        assert await code_of(ann, subscribe={"channel": "$plans"}) == 0
        assert await code_of(bob, subscribe={"channel": "$plans"}) == 103
        for method, rest in COMMANDS.items():
            if method != "subscribe":
                command = {method: {"channel": "$plans", **rest}}
                assert (await code_of(ann, **command), await code_of(bob, **command)) == (0, 103)


async def test_a_topic_for_some_users_is_for_no_others(autojump_clock: MockClock) -> None:
    async with open_test_broker(served(Config())) as net:
        for token, expected in (("ann", 0), ("bob", 0), ("eve", 103), ("", 103)):
            peer = await net.open_client(token=token)
            assert set((await codes(peer, "room#ann,bob")).values()) == {expected}, token


async def test_who_becomes_nobody_loses_what_only_users_may(autojump_clock: MockClock) -> None:
    async with open_test_broker(served(Config(may_send="users"))) as net:
        ann, other = await net.open_client(token="ann"), await net.open_client()
        for topic in ("room#ann", f"fd:{other.fd}"):
            net.broker.bind(ann.fd, "ann")
            command = {"publish": {"channel": topic, "data": 1}}
            assert await code_of(ann, **command) == 0
            net.broker.bind(ann.fd, "")
            assert await code_of(ann, **command) == 103


async def test_a_pattern_shows_nobody_what_he_may_not_subscribe_to(
    autojump_clock: MockClock,
) -> None:
    config = Config(
        namespaces={
            "all": TopicRules(),
            "users": TopicRules(may_subscribe="users"),
            "none": TopicRules(may_subscribe="none"),
        }
    )
    async with open_test_broker(served(config)) as net:
        nobody, ann = await net.open_client(), await net.open_client(token="ann")
        for peer in (nobody, ann):
            assert await code_of(peer, subscribe={"channel": "*"}) == 0
        async with net.broker.subscribe("*") as inside:
            topics = ["all:a", "users:a", "none:a", "$a", "room#ann", "room#bob", "#ann", "a"]
            for topic in topics:
                net.broker.publish(topic, topic)
            assert data_of(await arrived(nobody)) == ["all:a", "a"]
            assert data_of(await arrived(ann)) == ["all:a", "users:a", "room#ann", "#ann", "a"]
            # The program itself is behind no rule.
            assert [(await inside.receive()).value for _ in topics] == topics


async def test_a_pattern_itself_goes_by_the_rules_of_its_own_name(
    autojump_clock: MockClock,
) -> None:
    config = Config(topics=LOCKED, namespaces={"chat": TopicRules()})
    async with open_test_broker(Broker(config)) as net:
        peer = await net.open_client()
        assert await code_of(peer, subscribe={"channel": ">"}) == 103
        assert await code_of(peer, subscribe={"channel": "chat:room.*"}) == 0
        assert await code_of(peer, subscribe={"channel": "chta:room.*"}) == 102


async def test_joins_and_leaves_are_forced_where_the_rules_say_so(
    autojump_clock: MockClock,
) -> None:
    config = Config(
        namespaces={
            "forced": TopicRules(force_push_join_leave=True),
            "off": TopicRules(force_push_join_leave=True, join_leave=False),
            "asked": TopicRules(),
        }
    )
    async with open_test_broker(Broker(config)) as net:
        watcher, guest = await net.open_client(), await net.open_client()
        for topic in ("forced:a", "off:a", "asked:a"):
            await watcher.request(subscribe={"channel": topic})
            await arrived(watcher)
            await guest.request(subscribe={"channel": topic})
            await guest.request(unsubscribe={"channel": topic})
            kinds = [
                kind for o in await arrived(watcher) for kind in o["push"] if kind != "channel"
            ]
            assert kinds == (["join", "leave"] if topic == "forced:a" else []), topic


@pytest.mark.parametrize(
    "rules, recoverable",
    [
        (TopicRules(), False),
        (TopicRules(force_recovery=True), True),
        (TopicRules(force_positioning=True), True),
        (TopicRules(force_recovery=True, history_size=0), False),
    ],
)
async def test_recovery_is_forced_where_there_is_a_history(
    autojump_clock: MockClock, rules: TopicRules, recoverable: bool
) -> None:
    async with open_test_broker(Broker(Config(topics=rules))) as net:
        peer = await net.open_client()
        reply = await peer.request(subscribe={"channel": "a"})
        assert reply["subscribe"].get("recoverable", False) is recoverable
        assert reply["subscribe"].get("positioned", False) is recoverable
        assert ("epoch" in reply["subscribe"]) is recoverable
        assert "recoverable" not in (await peer.request(subscribe={"channel": "a.*"}))["subscribe"]


async def test_each_namespace_keeps_a_history_of_its_own_size(autojump_clock: MockClock) -> None:
    config = Config(namespaces={"small": sized(2), "none": sized(0)})
    async with open_test_broker(Broker(config)) as net:
        peer = await net.open_client()
        for topic in ("small:a", "none:a", "default"):
            for number in range(4):
                net.broker.publish(topic, number)

        async def kept(topic: str) -> list[int]:
            reply = await peer.request(history={"channel": topic, "limit": -1})
            return [each["data"] for each in reply["history"]["publications"]]

        assert (await kept("small:a"), await kept("default")) == ([2, 3], [0, 1, 2, 3])
        assert await code_of(peer, history={"channel": "none:a"}) == 108


@pytest.mark.parametrize("limit, got", [(-1, 3), (2, 2), (3, 3), (4, 3), (2**40, 3), (0, 0)])
async def test_one_answer_holds_so_many_publications(
    autojump_clock: MockClock, limit: int, got: int
) -> None:
    async with open_test_broker(Broker(Config(history_max_limit=3))) as net:
        for number in range(5):
            net.broker.publish("a", number)
        peer = await net.open_client()
        reply = await peer.request(history={"channel": "a", "limit": limit})
        assert len(reply["history"]["publications"]) == got
        assert reply["history"]["offset"] == 5


@pytest.mark.parametrize(
    "may_send, nobody, user", [("all", 0, 0), ("users", 103, 0), ("none", 103, 103)]
)
async def test_who_may_send_direct_messages(
    autojump_clock: MockClock, may_send: Any, nobody: int, user: int
) -> None:
    config = attrs.evolve(Config(topics=LOCKED), may_send=may_send)
    async with open_test_broker(served(config)) as net:
        receiver = await net.open_client()
        message = {"publish": {"channel": f"fd:{receiver.fd}", "data": 1}}
        assert await code_of(await net.open_client(), **message) == nobody
        assert await code_of(await net.open_client(token="ann"), **message) == user
        assert data_of(await arrived(receiver)) == [1] * (nobody, user).count(0)


async def test_one_user_has_so_many_connections(autojump_clock: MockClock) -> None:
    async with open_test_broker(served(Config(max_connections_per_user=2))) as net:

        async def connect(token: str) -> Peer | int:
            peer = await net.open_websocket()
            await peer.send_json({"id": 1, "connect": {"token": token}})
            *_, last = await arrived(peer)
            return last if isinstance(last, int) else peer

        first = await connect("ann")
        assert isinstance(first, Peer)
        assert isinstance(await connect("ann"), Peer)
        assert await connect("ann") == 3504
        assert isinstance(await connect("bob"), Peer)
        for _ in range(3):  # nobody in particular is no user
            assert isinstance(await connect(""), Peer)
        await first.aclose()
        await trio.sleep(1)
        assert isinstance(await connect("ann"), Peer)


@pytest.mark.parametrize(
    "user, topic",
    [("ann", "#ann"), ("a:b", "#a:b"), ("", None), ("a,b", None), ("a#b", None), ("x" * 99, None)],
)
def test_the_personal_topic_is_for_one_user_alone(user: str, topic: str | None) -> None:
    assert personal_topic(user, 50) == topic


async def test_a_client_gets_its_personal_topic_and_recovers_it(autojump_clock: MockClock) -> None:
    async with open_test_broker(served(Config(personal_topic=True))) as net:

        async def connect(token: str, **fields: Any) -> tuple[Peer, dict[str, Any]]:
            peer = await net.open_websocket()
            reply = await peer.request(connect={"token": token, **fields})
            subs = reply["connect"]["subs"]
            assert subs.pop(f"fd:{peer.fd}") == {}
            return peer, subs

        phone, subs = await connect("ann")
        assert subs["#ann"]["recoverable"] is True
        position = {key: subs["#ann"][key] for key in ("offset", "epoch")}
        eve, others = await connect("eve")
        assert list(others) == ["user:eve", "#eve"]
        assert (await connect(""))[1] == {}  # nobody has no topic of its own
        net.broker.publish("#ann", "one")
        assert data_of(await arrived(phone)) == ["one"]
        assert data_of(await arrived(eve)) == []
        assert await code_of(phone, subscribe={"channel": "#ann"}) == 105
        assert await code_of(eve, subscribe={"channel": "#ann"}) == 103
        await phone.aclose()
        net.broker.publish("#ann", "two")
        _, subs = await connect("ann", subs={"#ann": {"recover": True, **position}})
        assert subs["#ann"]["recovered"] is True
        assert [each["data"] for each in subs["#ann"]["publications"]] == ["one", "two"]
        _, subs = await connect("ann", subs={"#ann": {"recover": True, "epoch": "x", "flag": 2}})
        assert subs["#ann"]["recovered"] is False


async def test_a_connection_that_has_its_user_already_is_not_one_more(
    autojump_clock: MockClock,
) -> None:
    broker = served(Config(max_connections_per_user=1))

    @broker.on_open
    async def know(connection: Connection) -> None:
        broker.bind(connection.fd, "ann")

    async with open_test_broker(broker) as net:
        peer = await net.open_client(token="ann")
        assert net.broker.fds_of("ann") == [peer.fd]


async def test_a_long_topic_of_a_hostile_client_is_not_remembered(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker(Config(namespaces={"a": TopicRules()}))) as net:
        peer = await net.open_client()
        assert set((await codes(peer, "a:" + "x" * 10_000)).values()) == {107}
        net.broker.publish("a:ok", 1)
        book = net.node.services.rights.book
        assert book.find.cache_info().currsize == 1  # type: ignore[attr-defined]
