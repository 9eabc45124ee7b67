"""The way of a publication: what is joined into a run, what ends one, and who gets it in which order."""

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from typing import Any

import attrs
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
from broker.config.settings import Config, TopicPattern
from broker.core.hub import Hub
from broker.core.messages import ClientInfo, Fd, Publication
from broker.core.session import Decider, Parcel, PhaseEvent
from broker.core.tags import CompiledFilter
from broker.core.topics import matches
from broker.core.work import (
    ASKED,
    AUDIENCE,
    FILTER_NODE,
    FULL,
    KILOBYTE,
    LEFT,
    LISTENERS,
    PEER,
    PUBLICATION,
    TAG_KILOBYTE,
    WRITE,
    Allowance,
)
from broker.engines.memory import MemoryEngine
from broker.errors import Refused
from broker.hooks import Hooks
from broker.protocols.centrifuge_json import CENTRIFUGE_JSON
from broker.protocols.codec import PeerCodec
from broker.protocols.plain import PLAIN
from broker.routing.publishing import Publisher, PublishOptions
from broker.routing.reader import Reader
from broker.routing.recipients import Peer
from broker.routing.router import ENVELOPE, LARGE, RUN_BYTES, Router
from broker.testing import open_test_broker
from broker.transport import postman
from broker.transport.outbox import Outbox
from broker.transport.postman import open_post_office
from broker.transport.runs import LateRun
from tests.conftest import done, next_pub, received, served, subscribe
from tests.core.test_tags import filters, keys, leaf, texts, tree
from tests.routing.conftest import (
    PRICEY,
    attach,
    end_round,
    listen,
    make_outbox,
    make_router,
    publish,
    receive_pushes,
    runs,
    subscription,
)
from tests.transport.calls import Calls
from tests.transport.test_postman import Subscriber

# runs


async def test_rooms_that_have_filled_a_bag_are_written_to_before_another_is_published_to(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    monkeypatch.setattr(postman, "BAG", 3)
    monkeypatch.setattr(postman, "_BAG_MOST", 5)
    async with open_rooms(6) as (router, outboxes):
        for first in (0, 1):
            for number, _ in enumerate(outboxes):
                publish(router, f"room{number}", b"1")
            waits = [bool(outbox.mail) for outbox in outboxes]
            assert waits == ([True] * 5 if first == 0 else [False] * 3 + [True] * 2) + [False]
            await trio.sleep(1)
            assert not any(outbox.mail for outbox in outboxes)


@asynccontextmanager
async def open_rooms(count: int) -> AsyncGenerator[tuple[Router, list[Outbox]], None]:
    """A router with a postman, and one socket for each room."""
    rights = Rights(Settings(Config(topics=TopicRules(history_size=0))), Hooks())
    sockets: list[Subscriber] = []
    async with open_post_office() as office, trio.open_nursery() as nursery:
        router = Router(Hub(), MemoryEngine(2**20, 2**20), office, rights)
        try:
            for number in range(count):
                sockets.append(Subscriber(office, nursery))
                peer = attach(router)
                peer.outbox = sockets[-1].outbox
                router.subscribe(subscription(peer, f"room{number}"))
            yield router, [one.outbox for one in sockets]
        finally:
            for one in sockets:
                one.close()


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


async def test_a_run_goes_by_what_the_last_one_found_until_that_changes() -> None:
    router = make_router()
    one = listen(router, "a")
    asked = []
    resolve = router._resolve

    def counted(topic: str, tags: Any) -> object:
        asked.append(topic)
        return resolve(topic, tags)

    router._resolve = counted  # type: ignore[method-assign,assignment]

    def round_of(data: bytes) -> None:
        publish(router, "a", data)
        end_round(router)

    round_of(b"1")
    round_of(b"2")
    assert asked == ["a"]
    two = listen(router, "a", codec=PLAIN)
    round_of(b"3")
    assert (runs(one), runs(two)) == ([[1], [2], [3]], [["3"]])
    router.unsubscribe(two, "a")
    round_of(b"4")
    assert (runs(one), runs(two)) == ([[1], [2], [3], [4]], [["3"]])
    three = listen(router, "*")
    for data in (b"5", b"5"):  # those who listen by a pattern are asked about each time
        round_of(data)
    assert (runs(one)[4:], runs(three)) == ([[5], [5]], [[5], [5]])
    router.unsubscribe(three, "*")
    round_of(b"6")
    rules = TopicRules(history_size=2, history_ttl=60)
    router.settings.replace(attrs.evolve(router.settings.config, topics=rules))
    round_of(b"7")
    assert (runs(one)[6:], router.latest[0].offset) == ([[6], [7]], 1)
    assert asked == ["a"] * 7


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
    assert router.weigh("a") == PUBLICATION, "the run is open, and encoded for two audiences"
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
    size = len(data) + ENVELOPE
    published = 0
    while not runs(listener):
        publish(router, "a", data)
        published += 1
    assert published * size > RUN_BYTES >= (published - 1) * size
    assert len(runs(listener)[0]) == published


@pytest.mark.parametrize(("patterns", "longest"), [(0, 1000), (1, 1000), (19, 200), (199, 20)])
async def test_a_run_is_as_much_shorter_as_more_audiences_have_it_encoded(
    patterns: int, longest: int
) -> None:
    """So to send it out is a step of about one length."""
    router = make_router()
    tokens = [f"t{n}" for n in range(9)]
    shapes = (["*" if bits >> n & 1 else t for n, t in enumerate(tokens)] for bits in count(1))
    topic = ".".join(tokens)
    listener = listen(router, topic, *(".".join(next(shapes)) for _ in range(patterns)))
    for _ in range(1000):
        publish(router, topic, b"1")
    end_round(router)
    assert len(listener.outbox.mail) >= patterns + 1
    assert longest / 2 < max(len(run.frames) for run in listener.outbox.mail) <= longest
    router.weigh(topic)
    assert router.takes_together([1] * 10)
    assert router.takes_together([1] * 512) is (patterns < 7)
    assert router.takes_together([100_000] * 10) is (patterns < 1)


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
    "somebody leaves": (lambda router, session: router.leave(attach(router)), [[1], [2]]),
    "who gets it leaves": (lambda router, session: router.leave(session), [[1]]),
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
    router.watchers.joined(newcomer)
    publish(router, "a", b"2")
    router.leave(other)
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
    assert router.engine.statistics().history.publications == 0


async def test_to_publish_is_one_atomic_step() -> None:
    router = make_router(history_size=10)
    session = listen(router, "a", "*")
    with assert_no_checkpoints():
        publish(router, "a", b"1")
        publish(router, "fd:1", b"2")
        router.subscribe(subscription(session, "b"))
        router.unsubscribe(session, "b")
        router.leave(session)
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
                router.leave(sessions[int(which)])
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


# tags, and what a fan-out is charged

FILTERS = st.one_of(st.none(), filters.map(CompiledFilter))
NAMES = st.sampled_from(["a.b", "a.b", "a.*", "*.b", "a.>", ">", "a.c"])


@given(
    st.lists(st.tuples(NAMES, FILTERS, st.sampled_from([CENTRIFUGE_JSON, PLAIN])), max_size=12),
    st.lists(st.one_of(st.integers(0, 11), st.dictionaries(keys, texts)), max_size=12),
)
@settings(max_examples=150, deadline=None)
def test_a_publication_reaches_those_who_want_its_tags(
    listeners: list[tuple[str, CompiledFilter | None, PeerCodec]],
    steps: list[int | dict[str, str]],
) -> None:
    """Each number ends one subscription, each set of tags is a publication; {} is none of them, which
    the client's way has, too."""

    async def main() -> None:
        router = make_router()
        peers = {attach(router, codec): (name, wanted) for name, wanted, codec in listeners}
        for peer, (name, wanted) in peers.items():
            router.subscribe(subscription(peer, name, wanted=wanted))
        due: dict[Peer, list[int]] = {peer: [] for peer in peers}
        for number, step in enumerate(steps):
            if isinstance(step, int):
                for peer in list(peers)[step : step + 1]:
                    router.leave(peer)
                continue
            if step or number % 2:
                options = PublishOptions(tags=step)
                Publisher(router).publish("a.b", b"%d" % number, options=options)
            else:
                publish(router, "a.b", b"%d" % number)
            for peer, (name, wanted) in peers.items():
                is_here = bool(peer.subscriptions) and matches(name, "a.b")
                if is_here and (wanted is None or wanted.matches(step)):
                    due[peer].append(number)
        end_round(router)
        for peer in peers:
            assert [int(number) for run in runs(peer) for number in run] == due[peer]

    trio.run(main)


def work_of(router: Router, act: Callable[[], object]) -> float:
    """The work that is charged for something."""
    before = router.meter.done
    act()
    return router.meter.done - before


def publish_tagged(router: Router, topic: str, **tags: str) -> Delivery:
    delivery = Publisher(router).publish(topic, b"1", options=PublishOptions(tags=tags))
    assert delivery is not None, "nothing is kept first"
    return delivery


async def test_a_publication_is_charged_for_those_it_reaches_and_not_for_all_filters() -> None:
    router = make_router()
    for name in ("one", "many"):
        for number in range(500 if name == "many" else 1):
            room = CompiledFilter(leaf("room", "eq", str(number)))
            router.subscribe(subscription(attach(router), name, wanted=room))
    for tags in ({"room": "0"}, {"room": "none"}, {}):
        one, many = [
            work_of(router, lambda: publish_tagged(router, name, **tags))  # noqa: B023
            for name in ("one", "many")
        ]
        assert one == pytest.approx(many)
    one, many = [work_of(router, lambda: router.weigh(name)) for name in ("one", "many")]  # noqa: B023
    assert one == pytest.approx(many)


async def test_filters_that_are_asked_are_charged_by_their_nodes_and_the_tags_length() -> None:
    router = make_router()
    for number in range(100):
        wanted = CompiledFilter(tree("or", *[leaf("a", "ct", f"{number}x{n}") for n in range(9)]))
        router.subscribe(subscription(attach(router), "news", wanted=wanted))
    nothing = work_of(router, lambda: publish_tagged(router, "news"))
    short = work_of(router, lambda: publish_tagged(router, "news", a="-"))
    long = work_of(router, lambda: publish_tagged(router, "news", a="-" * 10_240))
    assert short - nothing == pytest.approx(1000 * FILTER_NODE, rel=0.1)
    assert long - short == pytest.approx(1000 * 10 * TAG_KILOBYTE, rel=0.1)


async def test_each_audience_is_charged_for_all_that_is_encoded_for_it() -> None:
    router = make_router()
    listen(router, "a")
    listen(router, "b.c", "b.*", "*.c", "b.>")

    def work(topic: str, count: int, size: int) -> float:
        def act() -> None:
            router.publish_all(topic, [b"x" * size] * count)
            end_round(router)

        return work_of(router, act)

    for count_, size in ((20, LARGE), (100, 1)):
        less, more = work("a", count_, size), work("b.c", count_, size)
        assert more == pytest.approx(4 * less, rel=0.1)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(
    ("topic", "size", "is_late"),
    [("a", 60_000, False), ("b.c", 60_000, True), ("b.c", LARGE, False)],
)
async def test_many_audiences_share_what_is_large(
    topic: str, size: int, is_late: bool, apart: bool
) -> None:
    router = make_router()
    peers = [listen(router, name) for name in ("a", "b.c", "b.*", "*.c", "b.>")]
    data = b'"%b"' % (b"x" * (size - 2))

    def act() -> None:
        if apart:
            Publisher(router).publish(topic, data)
        else:
            publish(router, topic, data)
            end_round(router)

    work = work_of(router, act)
    runs = [run for peer in peers for run in peer.outbox.mail]
    assert len(runs) == (1 if topic == "a" else 4)
    assert [isinstance(run, LateRun) for run in runs] == [is_late] * len(runs)
    assert all(data in bytes(run.data) for run in runs)
    copies = 1 if is_late else len(runs)
    work -= len(runs) * (AUDIENCE + WRITE)
    assert work == pytest.approx(copies * size / 1024 * KILOBYTE, rel=0.2, abs=20)


async def test_those_who_are_asked_whether_they_may_have_it_are_charged() -> None:
    router = make_router(may_subscribe="users")
    for _ in range(100):
        listen(router, "a.b", user="ann")
        listen(router, "*.c", user="ann")
    by_name, by_pattern = [
        work_of(router, partial(publish_tagged, router, topic)) for topic in ("a.b", "a.c")
    ]
    assert by_pattern - by_name == pytest.approx(100 * ASKED + LISTENERS)


async def test_the_first_publisher_of_a_run_is_charged_for_the_writes_whoever_ends_it() -> None:
    router = make_router()
    for _ in range(100):
        listen(router, "a")
    first, second = Allowance(), Allowance()
    for payer in (first, second):
        router.publish_all("a", (b"1",), payer=payer)
    before, left = router.meter.done, first.left
    router.send(attach(router), ())
    assert router.meter.done == before
    assert left - first.left == pytest.approx(100 * WRITE)
    assert second.left == Allowance().left


async def test_an_outbox_that_holds_something_by_then_needs_no_other_write() -> None:
    router = make_router()
    peers = [listen(router, "a") for _ in range(100)]
    for peer in peers[:40]:
        router.send(peer, (b"{}",))
    alone, together = [work_of(router, lambda: publish_tagged(router, "a")) for _ in "12"]
    assert alone - together == pytest.approx(60 * WRITE)


async def test_the_work_of_a_step_is_told_without_the_writes_that_come_later() -> None:
    router = make_router()
    for _ in range(100):
        listen(router, "a")
    parcels = [Parcel("a", "close", [[Publication("a", b"1")]]) for _ in "12"]
    before = router.meter.done
    first, second = [router.fan_out(parcel, retain=False) for parcel in parcels]
    assert first == pytest.approx(second)
    assert router.meter.done - before == pytest.approx(100 * WRITE)


@pytest.mark.parametrize("patterns", [0, 4])
async def test_a_full_outbox_is_charged_once_however_often_a_fan_out_reaches_it(
    patterns: int,
) -> None:
    router = make_router()
    peer = attach(router)
    peer.outbox = make_outbox(router.office, max_messages=patterns + 1)
    names = ["a.b.c", "a.b.*", "a.*.c", "*.b.c", "a.>"]
    for name in names[: patterns + 1]:
        router.subscribe(subscription(peer, name))
    first, second = [work_of(router, lambda: publish_tagged(router, "a.b.c")) for _ in "12"]
    assert second - first == pytest.approx(FULL - WRITE)
    publish(router, "a.b.c", b"1")
    before = router.meter.done
    end_round(router)
    assert router.meter.done - before == pytest.approx(FULL)


async def test_members_of_a_group_are_charged_when_they_were_looked_at() -> None:
    router = make_router()
    members = [listen(router, "jobs", group="workers") for _ in range(100)]
    ready = work_of(router, lambda: publish_tagged(router, "jobs"))
    for member in members:
        member.outbox.blocked = True
    publish_tagged(router, "jobs")
    assert work_of(router, lambda: publish_tagged(router, "jobs")) > ready + 99 * ASKED


async def test_a_peer_that_goes_leaves_as_much_as_the_work_goes_for() -> None:
    router = make_router()
    names = [f"t{n}" for n in range(100)]
    peer = listen(router, *names)
    router.leave(peer, 10 * LEFT)
    assert list(peer.subscriptions) == names[10:]
    router.leave(peer, 0)
    assert list(peer.subscriptions) == names[10:]
    watcher = attach(router)
    for name in names:
        router.subscribe(subscription(watcher, name, join_leave=True))
    # They are told, which is work as well.
    assert router.watchers.weigh_leaving(peer) == LEFT + PEER + WRITE
    router.leave(peer, LEFT + PEER)
    assert list(peer.subscriptions) == names[10:]
    router.leave(peer, LEFT + PEER + WRITE)
    assert list(peer.subscriptions) == names[11:]
    router.leave(peer)
    assert peer.subscriptions == {}
    assert router.watchers.weigh_leaving(peer) == 0
    assert len(watcher.outbox.mail) == 90


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
                owner=Calls(start=nursery.start_soon),
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
        net.broker.publish_nowait("temp.kitchen", "not retained")
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
        net.broker.publish_nowait("temp.kitchen", 22, retain=True, skip_history=True)
        later = await net.open_client()
        await subscribe(later, "temp.kitchen", recover=True, offset=3, epoch=got["epoch"])
        assert (await next_pub(later))["data"] == 22
        net.broker.add_subscription(publisher.fd, "temp.kitchen")
        assert "subscribe" in (await publisher.receive_json())["push"]
        assert (await next_pub(publisher))["data"] == 22


async def test_null_clears_what_is_retained(autojump_clock: MockClock) -> None:
    async with served() as net:
        net.broker.publish_nowait("temp", 1, retain=True)
        net.broker.publish_nowait("temp", None, retain=True)
        peer = await net.open_client()
        await subscribe(peer, "temp")
        assert await received(net, peer) == []


async def test_a_rule_retains_what_anyone_publishes(autojump_clock: MockClock) -> None:
    async with served(topics=TopicRules(retain=True)) as net:
        publisher = await net.open_client()
        await publisher.send_json(*({"publish": {"channel": "t", "data": n}} for n in range(3)))
        await wait_all_tasks_blocked()
        assert await net.broker.publish("u", 1) == Delivery(
            0, 0, 0, (), (await net.broker.history("u"))[1]
        )
        peer = await net.open_client()
        await subscribe(peer, "t")
        assert (await next_pub(peer))["data"] == 2
        await subscribe(peer, "u")
        assert (await next_pub(peer))["data"] == 1


async def test_a_retained_value_is_for_those_who_pick_it(autojump_clock: object) -> None:
    async with open_test_broker(Broker()) as net:
        for n in (99, 101):
            net.broker.publish_nowait(f"price.{n}", n, tags={"price": str(n)}, retain=True)
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


async def test_topics_are_looked_at_when_rules_that_keep_none_have_changed(
    autojump_clock: MockClock,
) -> None:
    keeps, drops = TopicRules(), TopicRules(history_size=0)
    async with open_test_broker(Broker(Config(topics=keeps))) as net:
        router, settings = net.node.router, net.node.services.settings
        asked: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(router.engine), "forget", lambda engine, is_over: asked.append("x"))
            settings.replace(Config(topics=TopicRules(history_size=9)))
            assert not asked  # all keep some
            settings.replace(Config(topics=drops))
            assert len(asked) == 1
            settings.replace(Config(topics=drops, max_topics=7))
            assert len(asked) == 1  # by the same rules
            settings.replace(Config(topics=keeps, patterns=(TopicPattern("a", drops),)))
            assert len(asked) == 2


async def test_what_is_yet_to_be_forgotten_after_a_reload_is_given_to_nobody(
    autojump_clock: MockClock,
) -> None:
    keeps, drops = TopicRules(history_size=9), TopicRules(history_size=0)
    async with open_test_broker(Broker(Config(topics=keeps))) as net:
        for topic in ("a", "b"):
            net.broker.publish_nowait(topic, 1)
        settings = net.node.services.settings
        peer = await net.open_client()
        before = (await peer.request(history={"channel": "a", "limit": -1}))["history"]
        assert [each["data"] for each in before["publications"]] == [1]
        kept = net.node.router.engine.statistics
        settings.replace(Config(topics=drops))
        assert (await peer.request(history={"channel": "a"}))["error"]["code"] == 108
        net.broker.publish_nowait("a", 2)
        settings.replace(Config(topics=keeps))
        assert kept().history.topics >= 1, "b has been in nobody's way"
        after = (await peer.request(history={"channel": "a", "limit": -1}))["history"]
        assert after.get("publications", []) == []
        assert after["epoch"] != before["epoch"]
        since = {"recover": True, "offset": before["offset"], "epoch": before["epoch"]}
        reply = (await peer.request(subscribe={"channel": "a", **since}))["subscribe"]
        assert not reply.get("recovered", False)
        net.broker.publish_nowait("b", 3)
        found = (await peer.request(history={"channel": "b", "limit": -1}))["history"]
        assert [each["data"] for each in found["publications"]] == [3]
        await trio.sleep(2)
        assert kept().history.topics == 1
