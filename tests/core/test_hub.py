"""Who listens to what: tables, and a model of plain sets beside the hub."""

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from broker.core.hub import Hub, HubStatistics
from broker.core.messages import ClientInfo, Fd
from broker.core.session import Phase, Session, Subscriber, Subscription
from broker.core.topics import matches


class Outbox:
    """The hub asks of an outbox that it is one of its own kind."""


def make(codec: str = "plain") -> Callable[[Fd], Session]:
    return lambda fd: Session(fd, codec, Outbox(), ClientInfo(str(fd)))


def attach(hub: Hub, codec: str = "plain") -> Session:
    return hub.sessions.attach(make(codec))


def outboxes(hub: Hub, topic: str) -> list[tuple[str, object, list[object]]]:
    """What a fan-out would go through: name, codec and outboxes."""
    return [
        (listeners.name, codec, list(audience))
        for listeners in hub.listeners(topic)
        for codec, audience in listeners.audiences.items()
    ]


EMPTY = HubStatistics(sessions=0, topics=0, patterns=0, subscriptions=0)


def test_nobody_listens_to_a_new_hub() -> None:
    hub = Hub()
    assert list(hub.listeners("news")) == []
    assert list(hub.watchers("news")) == []
    assert hub.presence("news") == {}
    assert hub.statistics() == EMPTY


def test_who_listens_is_found_by_codec_in_order_of_arrival() -> None:
    hub = Hub()
    peers = [attach(hub, codec) for codec in ("plain", "json", "plain", "json")]
    for peer in peers:
        hub.subscribe(Subscription(peer, "news"))
    assert outboxes(hub, "news") == [
        ("news", "plain", [peers[0].outbox, peers[2].outbox]),
        ("news", "json", [peers[1].outbox, peers[3].outbox]),
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
    hub = Hub()
    peer = attach(hub)
    for name in names:
        hub.subscribe(Subscription(peer, name))
    assert [listeners.name for listeners in hub.listeners(topic)] == reached


def test_nobody_subscribes_twice_to_one_name() -> None:
    hub = Hub()
    peer = attach(hub)
    first = Subscription(peer, "news")
    hub.subscribe(first)
    with pytest.raises(KeyError, match="news"):
        hub.subscribe(Subscription(peer, "news", join_leave=True))
    assert peer.subscriptions == {"news": first}
    assert list(hub.watchers("news")) == []
    assert hub.statistics().subscriptions == 1


def test_to_leave_what_one_does_not_listen_to_changes_nothing() -> None:
    hub = Hub()
    here, other = attach(hub), attach(hub)
    hub.subscribe(Subscription(here, "news"))
    assert hub.unsubscribe(other, "news") is None
    assert hub.unsubscribe(here, "olds") is None
    assert hub.unsubscribe(here, "*") is None
    assert outboxes(hub, "news") == [("news", "plain", [here.outbox])]


@pytest.mark.parametrize("name", ["news", "news.*"])
def test_a_name_that_nobody_listens_to_any_more_is_dropped(name: str) -> None:
    hub = Hub()
    one, two = attach(hub, "plain"), attach(hub, "json")
    subscriptions = [Subscription(peer, name) for peer in (one, two)]
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
    hub = Hub()
    one, two, three = (attach(hub) for _ in range(3))
    hub.subscribe(Subscription(one, "news", ClientInfo("1", "alice")))
    hub.subscribe(Subscription(two, "news", None))  # not a client: a piece of the program
    hub.subscribe(Subscription(three, "*", ClientInfo("3")))
    assert hub.presence("news") == {"1": ClientInfo("1", "alice")}


def test_watchers_are_those_who_asked_as_long_as_they_listen() -> None:
    hub = Hub()
    one, two, three = (attach(hub) for _ in range(3))
    hub.subscribe(Subscription(one, "news", join_leave=True))
    hub.subscribe(Subscription(two, "news"))
    hub.subscribe(Subscription(three, "news", join_leave=True))
    assert list(hub.watchers("news")) == [one, three]
    hub.unsubscribe(one, "news")
    assert list(hub.watchers("news")) == [three]


def test_leave_all_returns_what_was_left() -> None:
    hub = Hub()
    one, two = attach(hub), attach(hub)
    mine = [Subscription(one, name) for name in ("a", "b.*", "c")]
    for subscription in mine:
        hub.subscribe(subscription)
    hub.subscribe(Subscription(two, "a"))
    assert hub.leave_all(one) == mine
    assert one.subscriptions == {}
    assert outboxes(hub, "a") == [("a", "plain", [two.outbox])]
    assert hub.leave_all(one) == []


def test_a_session_is_here_for_as_long_as_the_block_also_when_that_fails() -> None:
    hub = Hub()
    with pytest.raises(ZeroDivisionError), hub.attached(make()) as session:  # noqa: PT012
        assert hub.sessions.get(session.fd) is session
        hub.subscribe(Subscription(session, "news"))
        raise ZeroDivisionError
    assert session.phase is Phase.CLOSED
    assert hub.sessions.get(session.fd) is None
    assert hub.statistics() == EMPTY


NAMES = st.sampled_from(["a", "b", "a.b", "a.c", "a.*", "*.b", "a.>", ">", "*"])
TOPICS = ["a", "b", "a.b", "a.c", "a.b.c", "c"]


class HubModel(RuleBasedStateMachine):
    """Beside the hub: a set of (fd, name, watches), and nothing else."""

    peers = Bundle("peers")

    def __init__(self) -> None:
        super().__init__()
        self.hub = Hub()
        self.here: dict[Fd, Session] = {}
        self.listening: dict[tuple[Fd, str], bool] = {}

    @rule(target=peers, codec=st.sampled_from(["plain", "json"]))
    def attach(self, codec: str) -> Session:
        peer = attach(self.hub, codec)
        self.here[peer.fd] = peer
        return peer

    @rule(peer=peers, name=NAMES, watches=st.booleans())
    def subscribe(self, peer: Session, name: str, watches: bool) -> None:
        subscription = Subscription(peer, name, peer.info, watches)
        if (peer.fd, name) in self.listening:
            with pytest.raises(KeyError):
                self.hub.subscribe(subscription)
        else:
            self.hub.subscribe(subscription)
            self.listening[peer.fd, name] = watches

    @rule(peer=peers, name=NAMES)
    def unsubscribe(self, peer: Session, name: str) -> None:
        left = self.hub.unsubscribe(peer, name)
        was = self.listening.pop((peer.fd, name), None)
        assert (left is None) == (was is None)
        if left is not None:
            assert (left.subscriber, left.name, left.join_leave) == (peer, name, was)

    @rule(peer=consumes(peers))
    def leave(self, peer: Session) -> None:
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
        assert isinstance(subscriber, Session)
        return subscriber.fd


HubModel.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_the_hub_agrees_with_naive_sets = HubModel.TestCase
