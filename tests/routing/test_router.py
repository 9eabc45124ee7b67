"""The way of a publication: what is joined into a run, what ends one, and who gets it in which order."""

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, assert_no_checkpoints, wait_all_tasks_blocked

from broker import (
    Broker,
    Delivery,
    TopicRules,
)
from broker.access.rights import Rights
from broker.config.reload import Settings
from broker.config.settings import Config
from broker.core.hub import Hub
from broker.core.messages import ClientInfo, Fd, Publication
from broker.core.session import Decider, Parcel, PhaseEvent
from broker.core.topics import matches
from broker.engines.memory import MemoryEngine
from broker.errors import Refused
from broker.hooks import Hooks
from broker.protocols.plain import PLAIN
from broker.routing.reader import Reader
from broker.routing.recipients import Peer
from broker.routing.router import RUN_BYTES, Router
from broker.testing import open_test_broker
from broker.transport.outbox import Outbox
from broker.transport.postman import open_post_office
from tests.conftest import done, next_pub, received, served, subscribe
from tests.routing.conftest import (
    PRICEY,
    attach,
    end_round,
    listen,
    make_router,
    publish,
    receive_pushes,
    runs,
    subscription,
)

# runs


async def test_publications_to_one_topic_in_a_row_are_one_run_for_all() -> None:
    router = make_router()
    one, two = listen(router, "a"), listen(router, "a")
    for data in (b"1", b"2", b"3"):
        publish(router, "a", data)
    assert runs(one) == []
    end_round(router)
    assert runs(one) == runs(two) == [[1, 2, 3]]
    assert one.outbox.mail[0] is two.outbox.mail[0]
    assert (one.outbox.mail[0].topic, one.outbox.mail[0].rule) == ("a", "close")
    assert router.published == 3


async def test_publishers_who_follow_one_another_share_a_run() -> None:
    router = make_router()
    listener = listen(router, "a")
    for publisher in (attach(router), attach(router)):
        publish(router, "a", b"1", publisher.info)
    end_round(router)
    assert runs(listener) == [[1, 1]]


async def test_what_was_weighed_for_a_parcel_is_looked_up_once() -> None:
    router = make_router(retain=True)
    listener = listen(router, "a", "*")
    asked = []
    listeners = router.hub.listeners

    def counted(topic: str) -> object:
        asked.append(topic)
        return listeners(topic)

    router.hub.listeners = counted  # type: ignore[method-assign,assignment]
    for keep in (True, False):
        assert router.weigh("a") > 0
        parcel = Parcel("a", "close", [(Publication("a", b"1"),)])
        router.publish_parcel(parcel, keep=keep, retain=False)
    assert asked == ["a", "a"]
    assert runs(listener) == [[1], [1]] * 2
    publish(router, "a", b"2")
    assert router.weigh("a") == 0, "the run is open"
    router.publish_parcel(
        Parcel("a", "close", [(Publication("a", b"3"),)]), keep=True, retain=False
    )
    assert asked == ["a"] * 4
    assert runs(listener)[4:] == [[2], [2], [3], [3]]
    with pytest.raises(Refused):
        router.publish_parcel(
            Parcel("", "close", [(Publication("", b"3"),)]), keep=True, retain=False
        )


async def test_a_run_ends_at_its_bound_without_a_flush() -> None:
    router = make_router()
    listener = listen(router, "a")
    data = b'"%b"' % (b"x" * 1000)
    published = 0
    while not runs(listener):
        publish(router, "a", data)
        published += 1
    assert published * len(data) > RUN_BYTES >= (published - 1) * len(data)
    assert len(runs(listener)[0]) == published


async def test_the_postman_delivers_what_nobody_flushed(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        client = await net.open_client()
        await client.request(subscribe={"channel": "a"})
        router = net.node.services.router
        publish(router, "a", b"1")
        assert (await client.receive_json())["push"]["pub"]["data"] == 1


async def test_each_protocol_and_each_name_listened_to_has_a_part_of_its_own() -> None:
    router = make_router()
    exact, pattern, both = (
        listen(router, "a.b"),
        listen(router, "a.*"),
        listen(router, "a.b", "*.b"),
    )
    plain = listen(router, "a.b", codec=PLAIN)
    for data in (b'"x"', b'"y"'):
        publish(router, "a.b", data)
    end_round(router)
    assert runs(exact) == runs(pattern) == runs(plain) == [["x", "y"]]
    assert runs(both) == [["x", "y"], ["x", "y"]]


ENDS: dict[str, tuple[Callable[[Router, Peer], object], list[list[Any]]]] = {
    "nothing": (lambda router, session: None, [[1, 2]]),
    "the postman's round": (lambda router, session: end_round(router), [[1], [2]]),
    "another topic": (lambda router, session: publish(router, "b", b"0"), [[1], [0], [2]]),
    "a topic nobody reads": (lambda router, session: publish(router, "c", b"0"), [[1], [2]]),
    "a direct message": (
        lambda router, session: publish(router, f"fd:{session.fd}", b"0"),
        [[1], [0], [2]],
    ),
    "somebody subscribes": (lambda router, session: listen(router, "a"), [[1], [2]]),
    "somebody unsubscribes": (lambda router, session: router.unsubscribe(session, "b"), [[1], [2]]),
    "what never was": (lambda router, session: router.unsubscribe(session, "x"), [[1], [2]]),
    "somebody leaves": (lambda router, session: router.leave_all(attach(router)), [[1], [2]]),
    "who gets it leaves": (lambda router, session: router.leave_all(session), [[1]]),
    "who gets it unsubscribes": (lambda router, session: router.unsubscribe(session, "a"), [[1]]),
}


@pytest.mark.parametrize("what", ENDS)
async def test_a_run_ends_at_anything_that_comes_between(what: str) -> None:
    act, expected = ENDS[what]
    router = make_router()
    session = listen(router, "a", "b")
    publish(router, "a", b"1")
    act(router, session)
    publish(router, "a", b"2")
    end_round(router)
    assert runs(session) == expected


@pytest.mark.parametrize("bad", ["", "*", "fd:99", "fd:x", "a\x00"])
async def test_a_publish_that_is_refused_harms_no_run(bad: str) -> None:
    router = make_router()
    session = listen(router, "a")
    publish(router, "a", b"1")
    for _ in range(2):
        with pytest.raises(Refused):
            publish(router, bad, b"0")
    publish(router, "a", b"2")
    end_round(router)
    end_round(router)
    assert runs(session) == [[1], [2]]
    assert router.published == 2


async def test_a_join_stands_behind_what_was_published_before_it() -> None:
    router = make_router()
    watcher = attach(router)
    router.subscribe(subscription(watcher, "a", join_leave=True))
    publish(router, "a", b"1")
    other = attach(router)
    newcomer = subscription(other, "a")
    router.subscribe(newcomer)
    router.announce(newcomer)
    publish(router, "a", b"2")
    router.leave_all(other)
    assert runs(watcher) == [[1], ["join"], [2], ["leave"]]
    assert runs(other) == [[2]]


# who gets it


async def test_a_direct_message_reaches_that_fd_alone() -> None:
    router = make_router()
    sender, receiver, others = attach(router), attach(router), listen(router, "*", ">")
    publish(router, f"fd:{receiver.fd}", b'"hi"', sender.info)
    end_round(router)
    assert runs(receiver) == [["hi"]]
    assert runs(others) == runs(sender) == []


async def test_a_closing_session_is_not_there_for_direct_messages() -> None:
    router = make_router()
    session = attach(router, PLAIN)
    session.transition(PhaseEvent.CLOSE)
    with pytest.raises(Refused, match="102"):
        publish(router, "fd:1", b"1")
    end_round(router)
    assert runs(session) == []


async def test_readers_in_process_get_publications_as_they_are() -> None:
    router = make_router(history_size=10)
    reader = Reader(10)
    router.subscribe(subscription(reader, "a", by=Decider.PROGRAM))
    info = ClientInfo("7")
    publish(router, "a", b"1", info)
    publish(router, "a", b"2")
    end_round(router)
    assert [await reader.receive() for _ in "12"] == [
        Publication("a", b"1", info, 1),
        Publication("a", b"2", None, 2),
    ]
    assert reader.bytes_waiting == 0


async def test_nothing_is_kept_of_direct_messages() -> None:
    router = make_router(history_size=10)
    session = attach(router)
    publish(router, f"fd:{session.fd}", b"1")
    assert router.engine.statistics().publications == 0


async def test_to_publish_is_one_atomic_step() -> None:
    router = make_router(history_size=10)
    session = listen(router, "a", "*")
    with assert_no_checkpoints():
        publish(router, "a", b"1")
        publish(router, "fd:1", b"2")
        router.subscribe(subscription(session, "b"))
        router.unsubscribe(session, "b")
        router.leave_all(session)
        end_round(router)


# a model: each publish delivers at once to whoever listens then

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.sampled_from(["a", "b", "a.b", "fd:1", "fd:2"])),
        st.tuples(st.just("flush"), st.just("")),
        st.tuples(
            st.sampled_from(["subscribe 1", "subscribe 2"]), st.sampled_from(["a", "a.*", ">"])
        ),
        st.tuples(st.sampled_from(["leave 1", "leave 2"]), st.sampled_from(["a", "a.*", ">", ""])),
    ),
    max_size=40,
)


@given(STEPS)
@settings(max_examples=150, deadline=None)
def test_runs_change_neither_order_nor_receivers(steps: list[tuple[str, str]]) -> None:
    async def main() -> None:
        router = make_router()
        sessions = {1: attach(router), 2: attach(router)}
        listening: dict[int, set[str]] = {1: set(), 2: set()}
        due: dict[int, list[tuple[str, int]]] = {1: [], 2: []}
        numbers = count()
        for what, name in steps:
            action, _, which = what.partition(" ")
            if action == "publish":
                number = next(numbers)
                publish(router, name, b"%d" % number)
                for fd in due:
                    if name.startswith("fd:"):
                        copies = int(name == f"fd:{fd}")
                    else:
                        copies = sum(matches(pattern, name) for pattern in listening[fd])
                    due[fd] += [(name, number)] * copies
            elif action == "flush":
                end_round(router)
            elif action == "subscribe" and name not in listening[int(which)]:
                session = sessions[int(which)]
                router.subscribe(subscription(session, name))
                listening[int(which)].add(name)
            elif action == "leave" and name:
                router.unsubscribe(sessions[int(which)], name)
                listening[int(which)].discard(name)
            elif action == "leave":
                router.leave_all(sessions[int(which)])
                listening[int(which)].clear()
        end_round(router)
        for fd, session in sessions.items():
            got = [number for run in runs(session) for number in run]
            assert sorted(got) == sorted(number for _, number in due[fd])
            for topic in {topic for topic, _ in due[fd]}:
                # The runs of two names that match one topic come one after the other.
                firsts = dict.fromkeys(number for number in got if (topic, number) in due[fd])
                assert list(firsts) == sorted(firsts)

    trio.run(main)


# with the real post office


async def test_a_session_that_has_left_gets_only_earlier_publications() -> None:
    async with open_post_office() as office, trio.open_nursery() as nursery:
        router = Router(Hub(), MemoryEngine(2**20), office, Rights(Settings(Config()), Hooks()))
        ours, theirs = trio.testing.memory_stream_pair()

        def make(fd: Fd) -> Peer:
            peer = Peer(fd, office=office, codec=PLAIN)
            peer.outbox = Outbox(
                ours,
                post=office.post,
                start_writer=nursery.start_soon,
                on_slow=lambda: None,
                on_drop=lambda dropped: None,
                on_broken=lambda: None,
                max_bytes=2**20,
                max_messages=100,
                stall_seconds=10,
            )
            return peer

        peer = router.hub.sessions.attach(make)
        router.subscribe(subscription(peer, "a"))
        publish(router, "a", b"1")
        router.unsubscribe(peer, "a")
        publish(router, "a", b"2")
        await wait_all_tasks_blocked()
        assert await theirs.receive_some() == b"\x81\x011"


# last values


async def test_a_new_subscriber_gets_the_retained_value_at_once(
    autojump_clock: MockClock,
) -> None:
    async with served() as net:
        publisher = await net.open_client()
        for value in (20, 21):
            await done(publisher, "publish", topic="temp.kitchen", data=value, retain=True)
        net.broker.publish("temp.kitchen", "not retained")
        info = {"user": "", "client": str(publisher.fd)}
        peer = await net.open_client()
        got = await subscribe(peer, "temp.kitchen", recoverable=True)
        assert got["offset"] == 3
        # Without an offset: it is no news that a position may follow.
        assert await next_pub(peer) == {"data": 21, "info": info, "tags": {"retained": "true"}}
        await subscribe(peer, "temp.>")
        assert (await next_pub(peer))["tags"] == {"retained": "true", "topic": "temp.kitchen"}
        async with net.broker.subscribe("temp.*") as messages:
            assert (await messages.receive()).value == 21
        # A client that has recovered everything has that, too.
        back = await net.open_client()
        await subscribe(back, "temp.kitchen", recover=True, offset=1, epoch=got["epoch"])
        assert await received(net, back) == []
        # But not what the history never had.
        net.broker.publish("temp.kitchen", 22, retain=True, skip_history=True)
        later = await net.open_client()
        await subscribe(later, "temp.kitchen", recover=True, offset=3, epoch=got["epoch"])
        assert (await next_pub(later))["data"] == 22
        net.broker.add_subscription(publisher.fd, "temp.kitchen")
        assert "subscribe" in (await publisher.receive_json())["push"]
        assert (await next_pub(publisher))["data"] == 22


async def test_null_clears_what_is_retained(autojump_clock: MockClock) -> None:
    async with served() as net:
        net.broker.publish("temp", 1, retain=True)
        net.broker.publish("temp", None, retain=True)
        peer = await net.open_client()
        await subscribe(peer, "temp")
        assert await received(net, peer) == []


async def test_a_rule_retains_what_anyone_publishes(autojump_clock: MockClock) -> None:
    async with served(topics=TopicRules(retain=True)) as net:
        publisher = await net.open_client()
        await publisher.send_json(*({"publish": {"channel": "t", "data": n}} for n in range(3)))
        await wait_all_tasks_blocked()
        assert net.broker.publish("u", 1) == Delivery(0, 0, 0, (), net.broker.history("u")[1])
        peer = await net.open_client()
        await subscribe(peer, "t")
        assert (await next_pub(peer))["data"] == 2
        await subscribe(peer, "u")
        assert (await next_pub(peer))["data"] == 1


async def test_a_retained_value_is_for_those_who_pick_it(autojump_clock: object) -> None:
    async with open_test_broker(Broker()) as net:
        for n in (99, 101):
            net.broker.publish(f"price.{n}", n, tags={"price": str(n)}, retain=True)
        peer = await net.open_client()
        await peer.request(subscribe={"channel": "price.99", "tf": PRICEY})
        await peer.request(subscribe={"channel": "price.*", "tf": PRICEY})
        net.broker.push(peer.fd, "end")
        first, second = await receive_pushes(peer, 2)
        assert first["pub"]["tags"] == {"price": "101", "retained": "true", "topic": "price.101"}
        assert "message" in second
        plain = await net.open_plain()
        net.broker.add_subscription(plain.fd, "price.99")
        assert await plain.receive_text() == "99"
