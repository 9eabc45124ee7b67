"""Audiences found by the tags of a publication: tables, and plain evaluation of all filters beside it."""

from collections.abc import Mapping

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from broker.core.audience_index import AudienceIndex
from broker.core.hub import Hub
from broker.core.session import Subscription
from broker.core.tags import CompiledFilter, FilterNode, matches
from tests.core.conftest import Listener, attach, join
from tests.core.test_tags import filters, keys, leaf, texts, tree


def member(node: FilterNode, codec: str = "plain") -> Subscription:
    """The subscription of a new client that wants what `node` says."""
    return join(attach(Hub[Listener](), codec), "news", wanted=CompiledFilter(node))


def index_of(*nodes: FilterNode) -> tuple[AudienceIndex, list[Subscription]]:
    index, members = AudienceIndex(), [member(node) for node in nodes]
    for each in members:
        index.add(each)
    return index, members


def wanting(index: AudienceIndex, tags: Mapping[str, str] | None) -> list[Subscription]:
    """Those who get what carries these tags."""
    audiences, _ = index.wanting(tags)
    return [each for audience in audiences for each in audience]


def asked(index: AudienceIndex, tags: Mapping[str, str] | None) -> int:
    """How many nodes of filters are looked at for these tags."""
    _, nodes = index.wanting(tags)
    return nodes


ROOM_7 = leaf("room", "eq", "7")
CHEAP = leaf("price", "lt", "10")


@pytest.mark.parametrize(
    ("node", "tags", "nodes"),
    [
        (ROOM_7, {"room": "7"}, 0),
        (ROOM_7, {"room": "8"}, 0),
        (ROOM_7, {"price": "7"}, 0),
        (leaf("room", "in", "", "7", "8"), {"room": "8", "price": "1"}, 0),
        (tree("or", ROOM_7, leaf("room", "eq", "8")), {"room": "8"}, 0),
        (tree("and", ROOM_7, CHEAP), {"room": "7", "price": "1"}, 3),
        (tree("and", ROOM_7, CHEAP), {"room": "8", "price": "1"}, 0),
        (tree("or", ROOM_7, tree("and", CHEAP, leaf("room", "eq", "8"))), {"room": "8"}, 5),
        (CHEAP, {"room": "7"}, 1),
        (leaf("room", "neq", "7"), {"room": "7"}, 1),
        (leaf("room", "in", "", "7", ""), {"room": "8"}, 1),
        (tree("not", ROOM_7), {"room": "8"}, 2),
    ],
    ids=repr,
)
def test_filters_are_asked_only_where_their_tags_lead_and_do_not_decide(
    node: FilterNode, tags: dict[str, str], nodes: int
) -> None:
    index, members = index_of(node)
    assert wanting(index, tags) == (members if matches(node, tags) else [])
    assert asked(index, tags) == nodes


def test_a_thousand_rooms_cost_one_look_up() -> None:
    index, members = index_of(*(leaf("room", "eq", str(n)) for n in range(1000)))
    assert wanting(index, {"room": "7"}) == [members[7]]
    assert asked(index, {"room": "7", "price": "8"}) == 0


def test_what_has_no_tags_asks_nobody() -> None:
    index, members = index_of(ROOM_7, CHEAP, tree("not", ROOM_7), leaf("price", "nex"))
    nothing: list[dict[str, str] | None] = [None, {}]
    for tags in nothing:
        assert wanting(index, tags) == members[2:]
        assert asked(index, tags) == 0


def test_a_filter_goes_where_few_are() -> None:
    """A tag that all have in common tells nobody apart."""
    sale = leaf("type", "eq", "sale")
    index, members = index_of(
        *(tree("and", sale, leaf("room", "eq", str(n))) for n in range(100)),
        tree("and", sale, leaf("room", "in", "", *map(str, range(100)))),
    )
    tags = {"type": "sale", "room": "7"}
    assert set(wanting(index, tags)) == {members[7], members[100]}
    assert asked(index, tags) <= 9  # of 303: one room, the first of all, and the last


def test_those_with_an_equal_filter_and_one_codec_share_an_audience() -> None:
    same = tree("and", CHEAP, ROOM_7), tree("and", ROOM_7, CHEAP)
    members = [member(node, codec) for node in same for codec in ("json", "plain")]
    index = AudienceIndex()
    for each in members:
        index.add(each)
    assert len(index) == 2
    assert [list(audience) for audience in index] == [members[::2], members[1::2]]
    assert asked(index, {"room": "7", "price": "1"}) == 6


def test_nothing_is_left_behind_by_those_who_leave() -> None:
    nodes = (
        *(ROOM_7, CHEAP, tree("and", ROOM_7, leaf("a", "in", "", "1", "2")), tree("not", CHEAP)),
        *(leaf("b", "in"), tree("and", CHEAP, leaf("b", "in"))),  # one of none, which nothing is
    )
    index, members = index_of(*nodes, *nodes)
    assert wanting(index, {"b": ""}) == [members[3], members[9]]
    for each in members:
        index.remove(each)
    assert len(index) == 0
    assert not index._filed
    assert not index._places
    assert not index._others
    assert not index._untagged


TAGS = st.one_of(st.none(), st.dictionaries(keys, texts))


class IndexModel(RuleBasedStateMachine):
    """Beside the index: a list of those who listen, each of whom is asked."""

    members = Bundle("members")

    def __init__(self) -> None:
        super().__init__()
        self.index = AudienceIndex()
        self.here: dict[Subscription, FilterNode] = {}

    def add(self, node: FilterNode, codec: str) -> Subscription:
        subscription = member(node, codec)
        self.index.add(subscription)
        self.here[subscription] = node
        return subscription

    @rule(target=members, node=filters, codec=st.sampled_from(["plain", "json"]))
    def come(self, node: FilterNode, codec: str) -> Subscription:
        return self.add(node, codec)

    @rule(target=members, other=members)
    def come_too(self, other: Subscription) -> Subscription:
        """Somebody with an equal filter."""
        node = self.here.get(other)
        return self.add(node, "plain") if node is not None else other

    @rule(subscription=consumes(members))
    def leave(self, subscription: Subscription) -> None:
        if self.here.pop(subscription, None) is not None:
            self.index.remove(subscription)

    @rule(tags=TAGS)
    def publish(self, tags: dict[str, str] | None) -> None:
        found = wanting(self.index, tags)
        assert len(found) == len(set(found)), "somebody gets it twice"
        assert set(found) == {each for each, node in self.here.items() if matches(node, tags or {})}

    @invariant()
    def everybody_is_in_one_audience(self) -> None:
        everybody = [each for audience in self.index for each in audience]
        assert len(everybody) == len(self.here)
        assert set(everybody) == set(self.here)
        assert all(len(audience) for audience in self.index)


IndexModel.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
test_the_index_finds_whom_asking_everybody_finds = IndexModel.TestCase
