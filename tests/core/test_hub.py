"""Listeners and names: tables, and a model of plain sets beside the hub."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from broker.core.hub import Hub, HubStatistics
from broker.core.messages import ClientInfo, Fd
from broker.core.session import (
    Phase,
    Subscriber,
)
from broker.core.tags import CompiledFilter, FilterNode
from broker.core.topics import matches
from broker.routing.reader import Reader
from tests.core.conftest import Listener, attach, join


def outboxes(hub: Hub[Listener], topic: str) -> list[tuple[str, object, list[Subscriber]]]:
    """The way of a fan-out: name, codec, and those who get it."""
    return [
        (listeners.name, codec, [each.subscriber for each in audience])
        for listeners in hub.listeners(topic)
        for codec, audience in listeners.audiences.items()
    ]


def picky(hub: Hub[Listener], topic: str) -> list[list[Subscriber]]:
    """Those who pick by tags, by audience."""
    return [
        [each.subscriber for each in audience]
        for listeners in hub.listeners(topic)
        for audience in listeners.picky or ()
    ]


A_IS_HERE = CompiledFilter(FilterNode(key="a", cmp="ex"))
EMPTY = HubStatistics(sessions=0, topics=0, patterns=0, subscriptions=0)


def test_nobody_listens_to_a_new_hub() -> None:
    hub: Hub[Listener] = Hub()
    assert list(hub.listeners("news")) == []
    assert list(hub.watchers("news")) == []
    assert hub.presence("news") == {}
    assert hub.statistics() == EMPTY


def test_listeners_are_found_by_codec_in_order_of_arrival() -> None:
    hub: Hub[Listener] = Hub()
    peers = [attach(hub, codec) for codec in ("plain", "json", "plain", "json")]
    for peer in peers:
        hub.subscribe(join(peer, "news"))
    assert outboxes(hub, "news") == [
        ("news", "plain", [peers[0], peers[2]]),
        ("news", "json", [peers[1], peers[3]]),
    ]
    assert [s.subscriber for listeners in hub.listeners("news") for s in listeners] == [
        *(peers[0], peers[2]),
        *(peers[1], peers[3]),
    ]
    assert [len(listeners) for listeners in hub.listeners("news")] == [4]


@pytest.mark.parametrize(
    "names, topic, reached",
    [
        (["news"], "news", ["news"]),
        (["news"], "newsroom", []),
        (["news.*"], "news.eu", ["news.*"]),
        (["news.*"], "news.eu.fr", []),
        (["news.*", "news.eu", "other"], "news.eu", ["news.eu", "news.*"]),
        (
            ["news.>", "*.eu", "news.eu", "news.*"],
            "news.eu",
            ["news.eu", "news.>", "news.*", "*.eu"],
        ),
        ([">"], "anything", [">"]),
    ],
)
def test_those_of_the_topic_come_first_then_those_of_each_pattern(
    names: list[str], topic: str, reached: list[str]
) -> None:
    hub: Hub[Listener] = Hub()
    peer = attach(hub)
    for name in names:
        hub.subscribe(join(peer, name))
    assert [listeners.name for listeners in hub.listeners(topic)] == reached


def test_nobody_subscribes_twice_to_one_name() -> None:
    hub: Hub[Listener] = Hub()
    peer = attach(hub)
    first = join(peer, "news")
    hub.subscribe(first)
    with pytest.raises(KeyError, match="news"):
        hub.subscribe(join(peer, "news", join_leave=True))
    assert peer.subscriptions == {"news": first}
    assert list(hub.watchers("news")) == []
    assert hub.statistics().subscriptions == 1


def test_to_leave_what_one_does_not_listen_to_changes_nothing() -> None:
    hub: Hub[Listener] = Hub()
    here, other = attach(hub), attach(hub)
    hub.subscribe(join(here, "news"))
    assert hub.unsubscribe(other, "news") is None
    assert hub.unsubscribe(here, "olds") is None
    assert hub.unsubscribe(here, "*") is None
    assert outboxes(hub, "news") == [("news", "plain", [here])]


@pytest.mark.parametrize("name", ["news", "news.*"])
def test_a_name_that_nobody_listens_to_any_more_is_dropped(name: str) -> None:
    hub: Hub[Listener] = Hub()
    one, two = attach(hub, "plain"), attach(hub, "json")
    subscriptions = [join(peer, name) for peer in (one, two)]
    for subscription in subscriptions:
        hub.subscribe(subscription)
    is_pattern = int("*" in name)
    counts = {"sessions": 2, "topics": 1 - is_pattern, "patterns": is_pattern}
    assert hub.statistics() == HubStatistics(**counts, subscriptions=2)
    assert hub.unsubscribe(one, name) is subscriptions[0]
    assert hub.statistics() == HubStatistics(**counts, subscriptions=1)
    assert hub.unsubscribe(two, name) is subscriptions[1]
    assert hub.statistics() == HubStatistics(sessions=2, topics=0, patterns=0, subscriptions=0)


def test_presence_lists_the_clients_of_the_topic_itself() -> None:
    hub: Hub[Listener] = Hub()
    one, three = attach(hub), attach(hub)
    hub.sessions.bind(one, "alice")
    hub.subscribe(join(one, "news"))
    hub.subscribe(join(Reader(1), "news"))  # not a client: a piece of the program
    hub.subscribe(join(three, "*"))
    assert hub.presence("news") == {"1": ClientInfo("1", "alice")}


def test_watchers_are_those_who_asked_as_long_as_they_listen() -> None:
    hub: Hub[Listener] = Hub()
    one, two, three = (attach(hub) for _ in range(3))
    hub.subscribe(join(one, "news", join_leave=True))
    hub.subscribe(join(two, "news"))
    hub.subscribe(join(three, "news", join_leave=True))
    assert list(hub.watchers("news")) == [one, three]
    hub.unsubscribe(one, "news")
    assert list(hub.watchers("news")) == [three]
    hub.stop_watching(two)
    hub.stop_watching(three)
    assert list(hub.watchers("news")) == []
    assert hub.count("news") == 2
    assert hub.unsubscribe(three, "news") is not None


def test_leave_all_returns_what_was_left() -> None:
    hub: Hub[Listener] = Hub()
    one, two = attach(hub), attach(hub)
    mine = [join(one, name) for name in ("a", "b.*", "c")]
    for subscription in mine:
        hub.subscribe(subscription)
    hub.subscribe(join(two, "a"))
    assert hub.leave_all(one) == mine
    assert one.subscriptions == {}
    assert outboxes(hub, "a") == [("a", "plain", [two])]
    assert hub.leave_all(one) == []


def test_a_session_that_goes_leaves_nothing_here() -> None:
    hub: Hub[Listener] = Hub()
    session = hub.attach(Listener)
    assert hub.sessions.get(session.fd) is session
    hub.subscribe(join(session, "news"))
    hub.detach(session)
    assert session.phase is Phase.CLOSED
    assert hub.sessions.get(session.fd) is None
    assert hub.statistics() == EMPTY


def test_those_who_pick_other_tags_are_another_audience() -> None:
    hub: Hub[Listener] = Hub()
    all_of_it, two, three = (attach(hub) for _ in range(3))
    hub.subscribe(join(all_of_it, "news"))
    for peer in (two, three):
        hub.subscribe(join(peer, "news", wanted=A_IS_HERE))
    assert outboxes(hub, "news") == [("news", "plain", [all_of_it])]
    assert picky(hub, "news") == [[two, three]]
    (listeners,) = hub.listeners("news")
    assert [listeners.is_plain] == [False]
    assert len(listeners) == 3
    assert [each.subscriber for each in listeners] == [all_of_it, two, three]
    for peer in (two, three):
        hub.unsubscribe(peer, "news")
    assert listeners.is_plain
    assert listeners.picky is None
    hub.unsubscribe(all_of_it, "news")
    assert hub.topics() == {}


def test_topics_are_counted_by_their_subscriptions() -> None:
    hub: Hub[Listener] = Hub()
    one, two = attach(hub), attach(hub)
    for peer, name in ((one, "a"), (two, "a"), (one, "b.*")):
        hub.subscribe(join(peer, name))
    assert hub.topics() == {"a": 2, "b.*": 1}


NAMES = st.sampled_from(["a", "b", "a.b", "a.c", "a.*", "*.b", "a.>", ">", "*"])
TOPICS = ["a", "b", "a.b", "a.c", "a.b.c", "c"]


class HubModel(RuleBasedStateMachine):
    """Beside the hub: a set of (fd, name, watches), and nothing else."""

    peers = Bundle("peers")

    def __init__(self) -> None:
        super().__init__()
        self.hub = Hub[Listener]()
        self.here: dict[Fd, Listener] = {}
        self.listening: dict[tuple[Fd, str], bool] = {}

    @rule(target=peers, codec=st.sampled_from(["plain", "json"]))
    def attach(self, codec: str) -> Listener:
        peer = attach(self.hub, codec)
        self.here[peer.fd] = peer
        return peer

    @rule(peer=peers, name=NAMES, watches=st.booleans(), picks=st.booleans())
    def subscribe(self, peer: Listener, name: str, watches: bool, picks: bool) -> None:
        subscription = join(peer, name, join_leave=watches, wanted=A_IS_HERE if picks else None)
        if (peer.fd, name) in self.listening:
            with pytest.raises(KeyError):
                self.hub.subscribe(subscription)
        else:
            self.hub.subscribe(subscription)
            self.listening[peer.fd, name] = watches

    @rule(peer=peers, name=NAMES)
    def unsubscribe(self, peer: Listener, name: str) -> None:
        left = self.hub.unsubscribe(peer, name)
        was = self.listening.pop((peer.fd, name), None)
        assert (left is None) == (was is None)
        if left is not None:
            assert (left.subscriber, left.name, left.join_leave) == (peer, name, was)

    @rule(peer=consumes(peers))
    def leave(self, peer: Listener) -> None:
        left = {subscription.name for subscription in self.hub.leave_all(peer)}
        assert left == {name for fd, name in self.listening if fd == peer.fd}
        self.listening = {k: w for k, w in self.listening.items() if k[0] != peer.fd}
        self.hub.sessions.detach(peer.fd)
        del self.here[peer.fd]

    @invariant()
    def everybody_is_reached_once_per_matching_name(self) -> None:
        for topic in TOPICS:
            found = sorted(
                (self.fd_of(subscription.subscriber), listeners.name)
                for listeners in self.hub.listeners(topic)
                for subscription in listeners
            )
            assert found == sorted(k for k in self.listening if matches(k[1], topic))
            for name, _, audience in outboxes(self.hub, topic):
                assert audience, f"{name} has an empty audience"
            assert all(picky(self.hub, topic))

    @invariant()
    def presence_and_watchers_agree(self) -> None:
        for topic in TOPICS:
            fds = {fd for fd, name in self.listening if name == topic}
            assert self.hub.presence(topic) == {str(fd): ClientInfo(str(fd)) for fd in fds}
            watching = {
                fd for (fd, name), watches in self.listening.items() if name == topic and watches
            }
            assert {self.fd_of(watcher) for watcher in self.hub.watchers(topic)} == watching

    @invariant()
    def the_mirrors_agree_and_empties_are_dropped(self) -> None:
        for fd, peer in self.here.items():
            assert set(peer.subscriptions) == {n for f, n in self.listening if f == fd}
        names = {name for _, name in self.listening}
        patterns = {name for name in names if "*" in name or ">" in name}
        assert self.hub.statistics() == HubStatistics(
            len(self.here), len(names - patterns), len(patterns), len(self.listening)
        )

    @staticmethod
    def fd_of(subscriber: Subscriber) -> Fd:
        return subscriber.fd


HubModel.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_the_hub_agrees_with_naive_sets = HubModel.TestCase
