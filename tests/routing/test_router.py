"""The way of a publication: what is joined into a run, what ends one, and who gets it in which order."""

import json
from collections.abc import AsyncIterator, Callable
from itertools import count
from typing import Any

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, assert_no_checkpoints, wait_all_tasks_blocked

from broker import Broker
from broker.config.settings import Config, TopicRules
from broker.core.hub import Hub
from broker.core.messages import ClientInfo, Fd, Publication
from broker.core.session import Happening, Session, Subscription
from broker.core.topics import matches
from broker.engines.memory import MemoryEngine
from broker.errors import Refused
from broker.protocols.centrifuge_json import CENTRIFUGE_JSON
from broker.protocols.plain import PLAIN
from broker.routing.router import IN_PROCESS, RUN_BYTES, Router, direct_fd
from broker.testing import open_test_broker
from broker.transport.outbox import Outbox, Run
from broker.transport.postman import PostOffice


@attrs.define(eq=False)
class Box:
    """An outbox as a post office sees it, which keeps all runs that it was given."""

    runs: list[Run] = attrs.field(factory=list)


class Office:
    """A post office that puts runs into boxes and keeps no count: what the router does is seen."""

    def deliver(self, run: Run, outboxes: list[Box]) -> int:
        for box in outboxes:
            box.runs.append(run)
        return len(outboxes)

    def wake(self) -> None:
        """A round is what each test makes of it: it calls `flush`, as the postman would."""


@attrs.define(eq=False)
class Reader:
    """A subscriber in this program."""

    codec: object = IN_PROCESS
    taken: list[list[Publication]] = attrs.field(factory=list)
    subscriptions: dict[str, Subscription] = attrs.field(factory=dict)

    @property
    def outbox(self) -> "Reader":
        return self

    def take(self, publications: list[Publication]) -> None:
        self.taken.append(list(publications))


def make_router(**rules: int) -> Router:
    config = Config(topics=TopicRules(**{"history_size": 0, **rules}))  # type: ignore[arg-type]
    return Router(Hub(), MemoryEngine(2**20), Office(), config)  # type: ignore[arg-type]


def attach(router: Router, codec: object = CENTRIFUGE_JSON) -> Session:
    def make(fd: Fd) -> Session:
        return Session(fd, codec, Box(), ClientInfo(str(fd)))

    return router.hub.sessions.attach(make)


def listen(router: Router, *names: str, codec: object = CENTRIFUGE_JSON) -> Session:
    session = attach(router, codec)
    for name in names:
        router.subscribe(Subscription(session, name, session.info))
    return session


def runs(session: Session) -> list[list[Any]]:
    """What a session got: of each run, the data of its publications."""
    assert isinstance(session.outbox, Box)
    return [[data_of(frame) for frame in run.frames] for run in session.outbox.runs]


def data_of(frame: bytes) -> Any:
    text = frame[4 if frame[1] == 126 else 2 :]
    try:
        push = json.loads(text)["push"]
    except (ValueError, TypeError, KeyError):
        return text.decode()
    return next(v["data"] if k == "pub" else k for k, v in push.items() if k != "channel")


# runs


async def test_publications_to_one_topic_in_a_row_are_one_run_for_all() -> None:
    router = make_router()
    one, two = listen(router, "a"), listen(router, "a")
    for data in (b"1", b"2", b"3"):
        router.publish("a", data)
    assert runs(one) == []
    router.flush()
    assert runs(one) == runs(two) == [[1, 2, 3]]
    assert isinstance(one.outbox, Box)
    assert isinstance(two.outbox, Box)
    assert one.outbox.runs[0] is two.outbox.runs[0]
    assert (one.outbox.runs[0].topic, one.outbox.runs[0].rule) == ("a", "close")
    assert router.published == 3


async def test_publishers_who_follow_one_another_share_a_run() -> None:
    router = make_router()
    listener = listen(router, "a")
    for publisher in (attach(router), attach(router)):
        router.publish("a", b"1", publisher.info)
    router.flush()
    assert runs(listener) == [[1, 1]]


async def test_a_run_ends_at_its_bound_without_a_flush() -> None:
    router = make_router()
    listener = listen(router, "a")
    data = b'"%b"' % (b"x" * 1000)
    published = 0
    while not runs(listener):
        router.publish("a", data)
        published += 1
    assert published * len(data) > RUN_BYTES >= (published - 1) * len(data)
    assert len(runs(listener)[0]) == published


async def test_the_postman_delivers_what_nobody_flushed(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        client = await net.open_client()
        await client.request(subscribe={"channel": "a"})
        router = net.node.services.router
        router.publish("a", b"1")
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
        router.publish("a.b", data)
    router.flush()
    assert runs(exact) == runs(pattern) == runs(plain) == [["x", "y"]]
    assert runs(both) == [["x", "y"], ["x", "y"]]


ENDS: dict[str, tuple[Callable[[Router, Session], object], list[list[Any]]]] = {
    "nothing": (lambda router, session: None, [[1, 2]]),
    "flush": (lambda router, session: router.flush(), [[1], [2]]),
    "another topic": (lambda router, session: router.publish("b", b"0"), [[1], [0], [2]]),
    "a topic nobody reads": (lambda router, session: router.publish("c", b"0"), [[1], [2]]),
    "a direct message": (
        lambda router, session: router.publish(f"fd:{session.fd}", b"0"),
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
async def test_what_ends_a_run(what: str) -> None:
    act, expected = ENDS[what]
    router = make_router()
    session = listen(router, "a", "b")
    router.publish("a", b"1")
    act(router, session)
    router.publish("a", b"2")
    router.flush()
    assert runs(session) == expected


@pytest.mark.parametrize("bad", ["", "*", "fd:99", "fd:x", "a\x00"])
async def test_a_publish_that_is_refused_harms_no_run(bad: str) -> None:
    router = make_router()
    session = listen(router, "a")
    router.publish("a", b"1")
    for _ in range(2):
        with pytest.raises(Refused):
            router.publish(bad, b"0")
    router.publish("a", b"2")
    router.flush()
    router.flush()
    assert runs(session) == [[1], [2]]
    assert router.published == 2


async def test_a_join_stands_behind_what_was_published_before_it() -> None:
    router = make_router()
    watcher = attach(router)
    router.subscribe(Subscription(watcher, "a", watcher.info, join_leave=True))
    router.publish("a", b"1")
    other = attach(router)
    subscription = Subscription(other, "a", other.info)
    router.subscribe(subscription)
    router.announce(subscription)
    router.publish("a", b"2")
    router.leave_all(other)
    assert runs(watcher) == [[1], ["join"], [2], ["leave"]]
    assert runs(other) == [[2]]


# who gets it


async def test_a_direct_message_reaches_that_fd_alone() -> None:
    router = make_router()
    sender, receiver, others = attach(router), attach(router), listen(router, "*", ">")
    router.publish(f"fd:{receiver.fd}", b'"hi"', sender.info)
    router.flush()
    assert runs(receiver) == [["hi"]]
    assert runs(others) == runs(sender) == []


async def test_who_is_closing_is_not_there_for_direct_messages() -> None:
    router = make_router()
    session = router.hub.sessions.attach(lambda fd: Session(fd, PLAIN, Box(), ClientInfo("1")))
    session.note(Happening.CLOSE)
    with pytest.raises(Refused, match="102"):
        router.publish("fd:1", b"1")
    router.flush()
    assert runs(session) == []


@pytest.mark.parametrize(
    "topic, fd",
    [
        ("news", None),
        ("fd", None),
        ("FD:1", None),
        ("fd:1", 1),
        ("fd:123456789012345678", 123456789012345678),
        ("fd:0", Refused),
        ("fd:01", Refused),
        ("fd:", Refused),
        ("fd:+1", Refused),
        ("fd:1_0", Refused),
        ("fd:²", Refused),
        ("fd:1234567890123456789", Refused),
    ],
)
def test_one_connection_has_one_name(topic: str, fd: object) -> None:
    if fd is Refused:
        with pytest.raises(Refused, match="102"):
            direct_fd(topic)
    else:
        assert direct_fd(topic) == fd


async def test_readers_in_process_get_publications_as_they_are() -> None:
    router = make_router(history_size=10)
    reader = Reader()
    router.subscribe(Subscription(reader, "a"))
    info = ClientInfo("7")
    router.publish("a", b"1", info)
    router.publish("a", b"2")
    router.flush()
    assert reader.taken == [[Publication("a", b"1", info, 1), Publication("a", b"2", None, 2)]]


async def test_nothing_is_kept_of_direct_messages() -> None:
    router = make_router(history_size=10)
    session = attach(router)
    router.publish(f"fd:{session.fd}", b"1")
    assert router.engine.statistics().publications == 0


async def test_to_publish_is_one_atomic_step() -> None:
    router = make_router(history_size=10)
    session = listen(router, "a", "*")
    with assert_no_checkpoints():
        router.publish("a", b"1")
        router.publish("fd:1", b"2")
        router.subscribe(Subscription(session, "b"))
        router.unsubscribe(session, "b")
        router.leave_all(session)
        router.flush()


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
                router.publish(name, b"%d" % number)
                for fd in due:
                    if name.startswith("fd:"):
                        copies = int(name == f"fd:{fd}")
                    else:
                        copies = sum(matches(pattern, name) for pattern in listening[fd])
                    due[fd] += [(name, number)] * copies
            elif action == "flush":
                router.flush()
            elif action == "subscribe" and name not in listening[int(which)]:
                session = sessions[int(which)]
                router.subscribe(Subscription(session, name))
                listening[int(which)].add(name)
            elif action == "leave" and name:
                router.unsubscribe(sessions[int(which)], name)
                listening[int(which)].discard(name)
            elif action == "leave":
                router.leave_all(sessions[int(which)])
                listening[int(which)].clear()
        router.flush()
        for fd, session in sessions.items():
            got = [number for run in runs(session) for number in run]
            assert sorted(got) == sorted(number for _, number in due[fd])
            for topic in {topic for topic, _ in due[fd]}:
                # The runs of two names that match one topic come one after the other.
                firsts = dict.fromkeys(number for number in got if (topic, number) in due[fd])
                assert list(firsts) == sorted(firsts)

    trio.run(main)


# with the real post office


@pytest.fixture
async def office(nursery: trio.Nursery) -> AsyncIterator[PostOffice]:
    office = PostOffice()
    nursery.start_soon(office._carry)
    yield office
    nursery.cancel_scope.cancel()


async def test_who_has_left_gets_nothing_more_but_what_was_published_before(
    office: PostOffice, nursery: trio.Nursery
) -> None:
    router = Router(Hub(), MemoryEngine(2**20), office, Config())
    ours, theirs = trio.testing.memory_stream_pair()

    def make(fd: Fd) -> Session:
        outbox = Outbox(
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
        return Session(fd, PLAIN, outbox, ClientInfo(str(fd)))

    session = router.hub.sessions.attach(make)
    router.subscribe(Subscription(session, "a"))
    router.publish("a", b"1")
    router.unsubscribe(session, "a")
    router.publish("a", b"2")
    router.flush()
    await wait_all_tasks_blocked()
    assert await theirs.receive_some() == b"\x81\x011"
