"""Audiences that pick by tags, found by what they pick: those who listen under one name.

A filter that asks for one of some values of a tag is filed under these values, so a publication is
shown to those filters alone that its own tags lead to. By example::

    room == "7"                      filed under room=7, and never asked: its place says it all
    room in ["7", "8"]               filed under room=7 and room=8, the same
    type == "sale" and price > 100   filed under type=sale, and asked
    type == "sale" and room == "7"   under room=7 where that place has fewer than type=sale, and asked
    price > 100,  room != "7"        filed nowhere, and asked for each publication that has tags

A publication without tags finds those who want it, and no filter is asked.

Rules:

1. Never waits: each method is one atomic step.
2. One audience for all with an equal filter who get the same, frame by frame. It goes with its last
   member, and leaves nothing behind.
3. An audience stays where it was filed, however full that place becomes.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping

import attrs

from broker.core.session import Audience, Subscription
from broker.core.tags import CompiledFilter, Equality

Asked = dict[Audience, CompiledFilter | None]
"""Audiences with the filter that has to be asked; None where the place decides."""


@attrs.frozen
class _Filed:
    audience: Audience
    equality: Equality | None
    """The places where it is filed; None: nowhere."""


@attrs.define(eq=False)
class AudienceIndex:
    """The audiences of one topic or pattern that pick by tags; see the module."""

    _filed: dict[Hashable, _Filed] = attrs.field(init=False, factory=dict)
    # By tag, then by value.
    _places: dict[str, dict[str, Asked]] = attrs.field(init=False, factory=dict)
    _others: Asked = attrs.field(init=False, factory=dict)
    _untagged: dict[Audience, None] = attrs.field(init=False, factory=dict)

    def __len__(self) -> int:
        """How many audiences these are."""
        return len(self._filed)

    def __iter__(self) -> Iterator[Audience]:
        for filed in self._filed.values():
            yield filed.audience

    def add(self, subscription: Subscription) -> None:
        """Add a subscription that has a filter. Linear in the values that the filter asks for, if it
        is the first of its audience."""
        wanted = subscription.wanted
        assert wanted is not None, "those without a filter are found without an index"
        key = (subscription.subscriber.audience_key, wanted)
        filed = self._filed.get(key)
        if filed is None:
            audience = subscription.subscriber.new_audience(subscription.name)
            filed = self._filed[key] = _Filed(audience, self._emptiest(wanted.equalities))
            self._file(filed, wanted)
        filed.audience.add(subscription)

    def remove(self, subscription: Subscription) -> None:
        """Remove a subscription that is here."""
        key = (subscription.subscriber.audience_key, subscription.wanted)
        filed = self._filed[key]
        filed.audience.remove(subscription)
        if not len(filed.audience):
            del self._filed[key]
            self._unfile(filed)

    def wanting(self, tags: Mapping[str, str] | None) -> tuple[list[Audience], int]:
        """Those who want what carries these tags; and how many nodes of filters were asked.

        The cost follows these two, and the tags.
        """
        if not tags:
            return list(self._untagged), 0
        found: list[Audience] = []
        nodes = 0
        for asked in self._candidates(tags):
            for audience, wanted in asked.items():
                if wanted is not None:
                    nodes += wanted.nodes
                    if not wanted.matches(tags):
                        continue
                found.append(audience)
        return found, nodes

    def _candidates(self, tags: Mapping[str, str]) -> Iterator[Asked]:
        """All who may want these tags, each once."""
        places = self._places
        keys: Iterable[str] = tags if len(tags) < len(places) else places
        for key in keys:
            if key in tags and key in places:
                asked = places[key].get(tags[key])
                if asked is not None:
                    yield asked
        yield self._others

    def _emptiest(self, equalities: Iterable[Equality]) -> Equality | None:
        """Of the ways to file a filter, that with the fewest neighbours; the first of equals."""

        def neighbours(equality: Equality) -> int:
            here = self._places.get(equality.key, {})
            return max([len(here.get(value, ())) for value in equality.values], default=0)

        return min(equalities, key=neighbours, default=None)

    def _file(self, filed: _Filed, wanted: CompiledFilter) -> None:
        audience, equality = filed.audience, filed.equality
        if wanted.matches(None):
            self._untagged[audience] = None
        if equality is None:
            self._others[audience] = wanted
            return
        for value in equality.values:  # none in an empty list, which nothing passes
            here = self._places.setdefault(equality.key, {}).setdefault(value, {})
            here[audience] = None if equality.decides else wanted

    def _unfile(self, filed: _Filed) -> None:
        audience, equality = filed.audience, filed.equality
        self._untagged.pop(audience, None)
        if equality is None:
            del self._others[audience]
            return
        for value in equality.values:
            here = self._places[equality.key]
            del here[value][audience]
            if not here[value]:
                del here[value]
            if not here:
                del self._places[equality.key]
