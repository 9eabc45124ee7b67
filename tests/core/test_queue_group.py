"""Turns of the members of a queue group, and groups in the hub."""

from broker.core.hub import Hub, HubStatistics
from broker.core.queue_group import QueueGroup
from broker.core.session import Subscription
from tests.core.conftest import Listener, attach
from tests.core.conftest import join as subscribed


def join(hub: Hub[Listener], name: str, group: str) -> Subscription:
    """A new member of a group; of none with ""."""
    subscription = subscribed(attach(hub), name, group=group)
    hub.subscribe(subscription)
    return subscription


def test_members_take_turns_and_the_unfit_keep_their_place() -> None:
    group = QueueGroup()
    a, b, c = members = [join(Hub[Listener](), "jobs", "workers") for _ in "abc"]
    for member in members:
        group.members[member.subscriber] = member
    assert [group.next(lambda _: True) for _ in range(4)] == [a, b, c, a]
    assert group.next(lambda member: member is not b) is c
    assert group.next(lambda _: True) is b
    assert group.next(lambda _: False) is None
    assert len(group) == 3


def test_members_are_in_no_audience_but_they_are_present() -> None:
    hub = Hub[Listener]()
    one, two = join(hub, "jobs", "workers"), join(hub, "jobs", "workers")
    other = join(hub, "jobs", "auditors")
    (listeners,) = hub.listeners("jobs")
    assert listeners.audiences == {}
    assert {name: list(group.members.values()) for name, group in listeners.groups.items()} == {
        "workers": [one, two],
        "auditors": [other],
    }
    assert len(listeners) == 3
    assert list(listeners) == [one, two, other]
    assert set(hub.presence("jobs")) == {"1", "2", "3"}
    assert hub.topics() == {"jobs": 3}


def test_a_group_and_its_topic_end_with_the_last_member() -> None:
    for name in ("jobs", "jobs.*"):
        hub = Hub[Listener]()
        one, two = join(hub, name, "workers"), join(hub, name, "workers")
        assert hub.unsubscribe(one.subscriber, name) is one
        assert hub.topics() == {name: 1}
        assert hub.leave_all(two.subscriber) == [two]
        assert hub.topics() == {}
        assert hub.statistics() == HubStatistics(2, 0, 0, 0)


def test_an_audience_may_go_while_a_group_stays() -> None:
    hub = Hub[Listener]()
    plain, member = join(hub, "jobs", ""), join(hub, "jobs", "workers")
    hub.unsubscribe(plain.subscriber, "jobs")
    (listeners,) = hub.listeners("jobs")
    assert list(listeners) == [member]
