"""The last value of each topic that retains one, for clients that subscribe later.

Words: a value's *owner* is the user who published it, else the connection, else the app, as in
`shares`; an owner that replaces a value owns it from then on.

Rules:

- Bounded in bytes. Beyond the bound the owner with the most bytes loses the value it retained longest
  ago, and all strangers together are one such owner: nobody pushes out the values of others.
- The values that a pattern matches are found by the tokens of their topics: the cost follows what
  the first `DEPTH` tokens of the pattern leave over, not the number of values.
- A search is taken in slices, and whatever happens to the values meanwhile it neither fails nor
  finds a value twice, nor one retained after it began: a subscriber gets that as it is published.

Not promised: that a value stays that an open topic's next publisher replaces.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final, TypeVar

import attrs

from broker.core.messages import Publication
from broker.core.session import Parcel
from broker.core.shares import Account, Shares, owner_of, tags_bytes, text_bytes
from broker.core.topics import is_pattern, matches

VALUE_BYTES: Final = 512
"""Bytes of one value besides its data, its tags and the characters of its topic: 480 bytes for the
publication, the topic's text and its places, as tracemalloc counts them on CPython 3.11."""

BRANCH_BYTES: Final = 448
"""Bytes of one branch of the tokens: 420 bytes with one topic below it, measured alike."""

OWNER_BYTES: Final = 768
"""One owner's account, the order of its values and what is known of the client."""

DEPTH: Final = 4
"""So many tokens of a topic have a branch of their own; topics rarely have more, and a topic of a
hundred tokens costs no hundred branches."""

SLICE: Final = 128
"""Branches and topics that a search looks at before it hands out what it has found: 0.4 ms."""


@attrs.frozen
class RetainedStatistics:
    """A snapshot. `values_evicted` counts what the bound on all bytes cost."""

    values: int
    owners: int
    bytes: int
    values_evicted: int


@attrs.define(eq=False)
class _Holder(Account):
    """One owner's topics; that retained longest ago first."""

    topics: OrderedDict[str, None] = attrs.field(factory=OrderedDict, repr=False)


@attrs.frozen
class _Value:
    publication: Publication
    holder: _Holder
    number: int
    """How many were retained before it."""

    @property
    def bytes(self) -> int:
        value = self.publication
        texts = text_bytes(value.topic) + tags_bytes(value.tags)
        return VALUE_BYTES + len(value.data) + texts


@attrs.define(eq=False)
class _Branch:
    """The topics with one beginning, by their next token."""

    below: "dict[str, _Branch]" = attrs.field(factory=dict)
    here: dict[str, str] = attrs.field(factory=dict)
    """Topics that end with the next token; at `DEPTH` by their whole name, however they go on."""


T = TypeVar("T")


def _next(branches: dict[str, T], token: str) -> list[T]:
    """Those that a pattern's token leads to."""
    if token in ("*", ">"):
        return list(branches.values())
    below = branches.get(token)
    return [] if below is None else [below]


@attrs.define(eq=False)
class Retained:
    """The last values. It is filled as an in-process subscriber is: by `take`."""

    max_bytes: int
    _values: dict[str, _Value] = attrs.field(init=False, factory=dict)
    _shares: Shares[_Holder] = attrs.field(init=False)
    _root: _Branch = attrs.field(init=False, factory=_Branch)
    _branches: int = attrs.field(init=False, default=0)
    _number: int = attrs.field(init=False, default=0)
    _evicted: int = attrs.field(init=False, default=0)

    def __attrs_post_init__(self) -> None:
        self._shares = Shares(_Holder, OWNER_BYTES)

    def __len__(self) -> int:
        return len(self._values)

    def resize(self, max_bytes: int) -> None:
        """Go by another bound; values beyond it are forgotten at once."""
        self.max_bytes = max_bytes
        self._trim(max_bytes)

    @property
    def heaviest_bytes(self) -> int:
        """The bytes of the owner that would give way first."""
        heaviest = self._shares.heaviest()
        return 0 if heaviest is None else heaviest.bytes

    def give_back(self, size: int) -> int:
        """Forget values of so many bytes, as when there is less room; how many that were."""
        before = self.bytes_held
        self._trim(before - size)
        return before - self.bytes_held

    def take(self, publications: Sequence[Publication]) -> int:
        """Retain the last of these publications, all of one topic, in place of what was there.

        The value null clears the topic. A value larger than all the room is not retained, and
        clears it too.
        """
        last = publications[-1]
        former = self._values.pop(last.topic, None)
        if former is not None:
            del former.holder.topics[last.topic]
            self._shares.charge(former.holder, -former.bytes)
        if last.data == b"null":
            if former is not None:
                self._prune(last.topic)
            return len(publications)
        holder = self._shares.account(owner_of(last.info))
        self._number += 1
        value = self._values[last.topic] = _Value(last, holder, self._number)
        holder.topics[last.topic] = None
        self._shares.charge(holder, value.bytes)
        if former is None:
            self._plant(last.topic)
        self._trim(self.max_bytes)
        return len(publications)

    def deliver(self, parcel: Parcel) -> None:
        """Retain the last publication of a parcel, as `take` does. It counts as nobody's receipt."""
        self.take(parcel.batches[-1][-1:])

    def matching(self, name: str) -> Iterator[Publication]:
        """The values that a new subscriber to this topic or pattern gets; see `slices`."""
        for found in self.slices(name):
            yield from found

    def slices(self, name: str, looks: int = SLICE) -> Iterator[list[Publication]]:
        """The same in slices, so that a search can be left and taken up again at any time.

        Each is what has been found after about `looks` more topics, and may be empty. One look-up
        for a topic.
        """
        # The search begins now, and not with the first slice that is taken.
        return self._slices(name, looks, self._number)

    def get(self, topic: str) -> Publication | None:
        """The value of a topic, None without one."""
        value = self._values.get(topic)
        return None if value is None else value.publication

    def values(self) -> Iterator[Publication]:
        """All values; that retained longest ago first. They may be taken one by one, whatever happens meanwhile:
        one that was retained after the first was taken is not among them."""
        newest = self._number
        for topic in list(self._values):  # `take` puts the last one to the end
            value = self._values.get(topic)
            if value is not None and value.number <= newest:
                yield value.publication

    def statistics(self) -> RetainedStatistics:
        return RetainedStatistics(
            values=len(self._values),
            owners=len(self._shares),
            bytes=self.bytes_held,
            values_evicted=self._evicted,
        )

    @property
    def bytes_held(self) -> int:
        return self._shares.bytes + BRANCH_BYTES * self._branches

    def _slices(self, name: str, looks: int, newest: int) -> Iterator[list[Publication]]:
        found: list[Publication] = []
        looked = 0
        for topic in self._topics(name) if is_pattern(name) else (name,):
            if topic:
                value = self._values.get(topic)
                if value is not None and value.number <= newest:
                    found.append(value.publication)
            looked += 1
            if looked >= looks:
                yield found
                found, looked = [], 0
        if found:
            yield found

    def _topics(self, pattern: str) -> Iterator[str]:
        """The topics that may match, with "" for each look at something that does not.

        Each branch is copied as it is reached, so that it may change meanwhile.
        """
        tokens = pattern.split(".")
        waiting = [(self._root, 0)]
        while waiting:
            branch, depth = waiting.pop()
            yield ""
            if depth == DEPTH:
                for topic in list(branch.here):
                    yield topic if matches(pattern, topic) else ""
                continue
            token = tokens[depth] if depth < len(tokens) else ">"  # below `>` all goes
            is_last = depth >= len(tokens) - 1
            if is_last:
                yield from _next(branch.here, token)
            if token == ">" or not is_last:
                waiting += [(below, depth + 1) for below in _next(branch.below, token)]

    def _trim(self, most: int) -> None:
        while self.bytes_held > most:
            holder = self._shares.heaviest()
            if holder is None:
                break
            topic, _ = holder.topics.popitem(last=False)
            self._shares.charge(holder, -self._values.pop(topic).bytes)
            self._prune(topic)
            self._evicted += 1

    def _plant(self, topic: str) -> None:
        branch, tokens = self._root, topic.split(".", DEPTH)
        for token in tokens[:-1]:
            below = branch.below.get(token)
            if below is None:
                below = branch.below[token] = _Branch()
                self._branches += 1
            branch = below
        branch.here[topic if len(tokens) > DEPTH else tokens[-1]] = topic

    def _prune(self, topic: str) -> None:
        path, tokens = [self._root], topic.split(".", DEPTH)
        for token in tokens[:-1]:
            path.append(path[-1].below[token])
        del path[-1].here[topic if len(tokens) > DEPTH else tokens[-1]]
        while len(path) > 1 and not path[-1].below and not path[-1].here:
            path.pop()
            del path[-1].below[tokens[len(path) - 1]]
            self._branches -= 1
