"""Queue groups over nodes: each publication goes to one member, wherever that is.

Every node posts how many members it has in each group. Memberships and publications are in one log, so
all nodes know the same at each place of it, and reckon the same owner for each publication: exactly one
node deals it out, and none has to ask another.

Rules:

1. The owner is found by the place of the publication in the log, over all members: nodes with more of them
   own more. The publications that fall to a node go to its members in turn, as on one node.
2. An owner whose members have just gone, or want none of it, passes it on, to each other node once.
3. Not promised: that the publications of a node that has died are dealt out before its death is known
   (`LEASE_SECONDS`); that a member gets something before the log has its membership, some milliseconds later.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Final, TypeAlias, cast

import attrs

from broker.config.settings import TopicRules
from broker.core.queue_group import QueueGroup
from broker.core.session import Parcel, SlowRule
from broker.core.topics import PatternIndex, is_pattern
from broker.core.work import ASKED, AUDIENCE, PUBLICATION
from broker.errors import Refused
from broker.routing.mail import Dealt
from broker.routing.neighbours import Neighbours
from broker.routing.open_calls import Answer
from broker.routing.queue_groups import GroupRecipient
from broker.routing.router import Router

GROUP: Final = "group "
"""How the notice of a group begins; then its name and the name of what it listens to, by a NUL, which no
topic has. It says how many members the node has."""

_MIX: Final = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio (Knuth, 6.4): places in the log may all be multiples of one number."""

Shares: TypeAlias = "dict[str, tuple[list[str], list[int]]]"
"""By group: its nodes in order, and how many members they have up to each."""


@attrs.define(eq=False)
class _Name:
    """The groups that listen to one topic or pattern."""

    name: str
    members: dict[str, dict[str, int]] = attrs.field(factory=dict)
    """By group and node."""
    shares: Shares = attrs.field(factory=dict)

    def put(self, group: str, node: str, count: int) -> None:
        nodes = self.members.setdefault(group, {})
        if count:
            nodes[node] = count
        else:
            nodes.pop(node, None)
        if nodes:
            ids = sorted(nodes)
            self.shares[group] = ids, list(accumulate(nodes[each] for each in ids))
        else:
            del self.members[group]
            self.shares.pop(group, None)

    def owner(self, group: str, place: int) -> str:
        nodes, up_to = self.shares[group]
        at = ((place * _MIX) % 2**64 >> 16) % up_to[-1]
        return nodes[bisect_right(up_to, at)]


@attrs.define(eq=False)
class GroupShares:
    """See the module. It is the router's `Groups`."""

    neighbours: Neighbours
    router: Router
    _own: set[tuple[str, str]] = attrs.field(init=False, factory=set)
    _topics: dict[str, _Name] = attrs.field(init=False, factory=dict)
    _patterns: PatternIndex[_Name] = attrs.field(init=False, factory=PatternIndex)

    def __attrs_post_init__(self) -> None:
        self.neighbours.on(Dealt, self._take)
        self.neighbours.on_notice(GROUP, self._noticed)
        self.neighbours.on_gone.append(self._gone)
        self.neighbours.on_restate.append(self._restate)
        self.neighbours.on_lapse.append(self._restate)
        self.router.groups = self
        self.router.returns.falls_to_groups = self._falls_here

    # who is in

    def changed(self, name: str, group: str) -> None:
        """Somebody has come to a group here, or left it."""
        found = self.router.hub.group(name, group)
        count = 0 if found is None else len(found)
        if count:
            self._own.add((name, group))
        else:
            self._own.discard((name, group))
        self.neighbours.cluster.post(f"{GROUP}{group}\0{name}", b"%d" % count if count else None)

    def nodes_of(self, topic: str) -> list[str]:
        """The other nodes that have members of groups who listen to a topic, each once."""
        found = [
            node
            for each in self._matching(topic)
            for nodes in each.members.values()
            for node in nodes
        ]
        return [node for node in dict.fromkeys(found) if node != self.neighbours.id]

    def _matching(self, topic: str) -> list[_Name]:
        exact = self._topics.get(topic)
        matching = self._patterns.match(topic) if len(self._patterns) else ()
        return [*([] if exact is None else [exact]), *matching]

    def _noticed(self, node: str, rest: str, value: bytes | None) -> None:
        group, _, name = rest.partition("\0")
        self._put(name, group, node, int(value or 0))

    def _put(self, name: str, group: str, node: str, count: int) -> None:
        found = self._patterns.get(name) if is_pattern(name) else self._topics.get(name)
        if found is None:
            if not count:
                return
            found = _Name(name)
            if is_pattern(name):
                self._patterns.insert(name, found)
            else:
                self._topics[name] = found
        found.put(group, node, count)
        if not found.members:
            if is_pattern(name):
                self._patterns.remove(name)
            else:
                del self._topics[name]

    def _gone(self, node: str) -> None:
        for name in [*self._topics.values(), *self._patterns.values()]:
            for group in [each for each, nodes in name.members.items() if node in nodes]:
                self._put(name.name, group, node, 0)

    def _restate(self) -> None:
        for name, group in list(self._own):
            self.changed(name, group)

    # who gets it

    def recipients(self, topic: str, rules: TopicRules) -> Iterator["GroupShare"]:
        """The groups that listen to a topic and have members here."""
        for name in self._matching(topic):
            for group, nodes in name.members.items():
                if self.neighbours.id in nodes:
                    yield self._share(name.name, group, topic, rules)

    def _falls_here(self, topic: str) -> bool:
        me = self.neighbours.id
        return any(me in nodes for name in self._matching(topic) for nodes in name.members.values())

    def _share(self, name: str, group: str, topic: str, rules: TopicRules) -> "GroupShare":
        admits = None if name == topic else self.router.rights.receiver(rules, topic)
        # Its members may have gone, and the log does not know of it yet.
        members = self.router.hub.group(name, group) or QueueGroup()
        return GroupShare(self, name, group, GroupRecipient(members, admits))

    def is_mine(self, name: str, group: str, place: int) -> bool:
        """Whether what stands at this place in the log falls to this node."""
        found = self._patterns.get(name) if is_pattern(name) else self._topics.get(name)
        return found is not None and found.owner(group, place) == self.neighbours.id

    def pass_on(self, share: "GroupShare", parcel: Parcel, tried: Sequence[str] = ()) -> None:
        """Have another node place what nobody here can take; when all have tried it is lost."""
        name, group = share.name, share.group
        found = self._patterns.get(name) if is_pattern(name) else self._topics.get(name)
        nodes = () if found is None else found.members.get(group, ())
        tried = [*tried, self.neighbours.id]
        for node in nodes:
            if node not in tried:
                publications = [each for batch in parcel.batches for each in batch]
                left_out = list(parcel.exclude)
                dealt = Dealt(name, group, publications, left_out, parcel.rule, tried)
                with suppress(Refused):  # the engine is down: what goes to a group may get lost
                    self.neighbours.note(node, dealt)
                return

    def _take(self, sender: str, dealt: Dealt, answer: Answer) -> float:
        topic = dealt.publications[0].topic
        rules = self.router.rights.book.find(topic)
        if rules is None:
            return ASKED
        share = self._share(dealt.name, dealt.group, topic, rules)
        rule, exclude = cast(SlowRule, dealt.rule), frozenset(dealt.exclude)
        parcel = Parcel(topic, rule, [dealt.publications], exclude)
        if not share.members.deal(parcel):
            self.pass_on(share, parcel, dealt.tried)
        count = len(dealt.publications)
        return AUDIENCE + share.members.group.looks * ASKED + count * PUBLICATION


@attrs.frozen(eq=False)
class GroupShare:
    """A recipient of a parcel: it deals out the part of one group's publications that falls to this node."""

    shares: GroupShares
    name: str
    group: str
    members: GroupRecipient

    def deliver(self, parcel: Parcel) -> None:
        publications = [each for batch in parcel.batches for each in batch]
        mine = [
            each
            for place, each in enumerate(publications, parcel.place)
            if self.shares.is_mine(self.name, self.group, place)
        ]
        share = attrs.evolve(parcel, batches=[mine])
        if mine and not self.members.deal(share):
            self.shares.pass_on(self, share)
