"""Turns of the members of a queue group, and groups in the hub."""

from hypothesis import given
from hypothesis import strategies as st

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
    assert [group.deal(1, lambda _: True) for _ in range(4)] == [[a], [b], [c], [a]]
    assert group.deal(1, lambda member: member is not b) == [c]
    assert group.deal(1, lambda _: True) == [b]
    assert group.deal(1, lambda _: False) == []
    assert len(group) == 3


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.booleans(), min_size=4, max_size=4)), max_size=6
    )
)
def test_many_turns_are_dealt_out_as_if_one_by_one(deals: list[tuple[int, list[bool]]]) -> None:
    """The members that keep up differ from deal to deal, and not within one."""
    members = [join(Hub[Listener](), "jobs", "workers") for _ in "abcd"]
    together, apart = QueueGroup(), QueueGroup()
    for member in members:
        together.members[member.subscriber] = apart.members[member.subscriber] = member
    for count, fit in deals:
        are_fit = dict(zip(members, fit, strict=True))
        one_by_one = [each for _ in range(count) for each in apart.deal(1, are_fit.__getitem__)]
        assert together.deal(count, are_fit.__getitem__) == one_by_one
        assert list(together.members) == list(apart.members)


def test_each_member_is_looked_at_once_at_most() -> None:
    group = QueueGroup()
    members = [join(Hub[Listener](), "jobs", "workers") for _ in range(10)]
    for member in members:
        group.members[member.subscriber] = member
    group.deal(3, lambda _: True)
    assert group.looks == 3
    group.deal(100, lambda member: member is members[9])
    assert group.looks == 10
    group.deal(1, lambda _: False)
    assert group.looks == 10


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
