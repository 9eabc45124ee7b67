"""The rules of each topic, as a table, then as a broker in memory goes by them."""

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from broker import (
    Broker,
    Config,
    Connection,
    Refused,
    TopicRules,
)
from broker.access.topic_rules import RuleBook
from broker.config.settings import TopicPattern
from broker.core.topics import CACHED
from broker.testing import Peer, name_users_by_token, open_test_broker
from tests.access.conftest import codes
from tests.conftest import code_of, data_of


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
    book = RuleBook(Config(topics=sized(1), patterns=(TopicPattern("a:b.*", sized(2)),)))
    assert book.of("any:thing").history_size == 1
    assert book.of("a:b.c").history_size == 2
    assert book.of("a:c").history_size == 1


def test_the_names_that_are_remembered_are_bounded() -> None:
    book = RuleBook(Config(namespaces={"a": sized(2)}))
    for number in range(CACHED + 100):
        book.of(f"a:{number}")
        book.is_open(f"a:{number}")
    assert book.find.cache_info().currsize == CACHED  # type: ignore[attr-defined]
    assert book.is_open.cache_info().currsize == CACHED  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "name, is_open",
    [
        ("news", True),
        ("open:news", True),
        ("users:news", False),
        ("subscribers:news", False),
        ("none:news", False),
        ("unknown:news", False),
        ("$news", False),
        ("$open:news", False),
        ("open:room#1,2", False),
        ("#1", False),
    ],
)
def test_a_name_is_open_if_neither_its_rules_nor_itself_say_who_may_publish(
    name: str, is_open: bool
) -> None:
    rules = {
        "open": TopicRules(may_publish="all"),
        "users": TopicRules(may_publish="users"),
        "subscribers": TopicRules(may_publish="subscribers"),
        "none": TopicRules(may_publish="none"),
    }
    book = RuleBook(Config(topics=TopicRules(may_publish="all"), namespaces=rules))
    assert [book.is_open(name) for _ in range(2)] == [is_open, is_open]


# asked of a broker


async def test_an_unknown_namespace_is_an_unknown_channel(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker(Config(namespaces={"chat": TopicRules()}))) as net:
        peer = await net.open_client()
        assert set((await codes(peer, "chta:room")).values()) == {102}
        assert set((await codes(peer, "chat:room")).values()) == {0}
        with pytest.raises(Refused, match="102"):
            net.broker.publish_nowait("chta:room", 1)


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
            await watcher.receive_all()
            await guest.request(subscribe={"channel": topic})
            await guest.request(unsubscribe={"channel": topic})
            kinds = [
                kind for o in await watcher.receive_all() for kind in o["push"] if kind != "channel"
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
                net.broker.publish_nowait(topic, number)

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
            net.broker.publish_nowait("a", number)
        peer = await net.open_client()
        reply = await peer.request(history={"channel": "a", "limit": limit})
        assert len(reply["history"]["publications"]) == got
        assert reply["history"]["offset"] == 5


async def test_one_user_has_so_many_connections(autojump_clock: MockClock) -> None:
    async with open_test_broker(
        name_users_by_token(Broker(Config(max_connections_per_user=2)))
    ) as net:

        async def connect(token: str) -> Peer | int:
            peer = await net.open_websocket()
            await peer.send_json({"id": 1, "connect": {"token": token}})
            *_, last = await peer.receive_all()
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


async def test_a_client_gets_its_personal_topic_and_recovers_it(autojump_clock: MockClock) -> None:
    async with open_test_broker(name_users_by_token(Broker(Config(personal_topic=True)))) as net:

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
        net.broker.publish_nowait("#ann", "one")
        assert data_of(await phone.receive_all()) == ["one"]
        assert data_of(await eve.receive_all()) == []
        assert await code_of(phone, subscribe={"channel": "#ann"}) == 105
        assert await code_of(eve, subscribe={"channel": "#ann"}) == 103
        await phone.aclose()
        net.broker.publish_nowait("#ann", "two")
        _, subs = await connect("ann", subs={"#ann": {"recover": True, **position}})
        assert subs["#ann"]["recovered"] is True
        assert [each["data"] for each in subs["#ann"]["publications"]] == ["one", "two"]
        _, subs = await connect("ann", subs={"#ann": {"recover": True, "epoch": "x", "flag": 2}})
        assert subs["#ann"]["recovered"] is False


async def test_a_connection_that_has_its_user_already_is_not_one_more(
    autojump_clock: MockClock,
) -> None:
    broker = name_users_by_token(Broker(Config(max_connections_per_user=1)))

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
        net.broker.publish_nowait("a:ok", 1)
        book = net.node.services.rights.book
        assert book.find.cache_info().currsize == 1  # type: ignore[attr-defined]
