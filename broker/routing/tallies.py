"""What a router counts: publications by namespace, and recoveries.

A run knows its tally, so a publication that joins it adds to that as it would to one counter for all:
nothing is looked up but when a run begins.
"""

from collections.abc import Iterable, Mapping

import attrs

from broker.core.names import PRIVATE, RESERVED_NAMESPACES


@attrs.define(eq=False)
class Tally:
    """Publications of one namespace since `serve` began."""

    published: int = 0


@attrs.define(eq=False)
class Recoveries:
    """Recoveries of clients since `serve` began, by their outcome: `recovered` without a loss, or with a
    `gap`, of which the client was told."""

    recovered: int = 0
    gap: int = 0


@attrs.define(eq=False)
class Tallies:
    """Tallies by namespace: those of the settings, "" for topics of none, `fd` and `user` for what goes
    to connections. One that a reload takes away keeps what it has counted."""

    others: Tally = attrs.field(init=False, factory=Tally)
    _named: dict[str, Tally] = attrs.field(init=False, factory=dict)
    _by_prefix: dict[str, Tally] = attrs.field(init=False, factory=dict)
    """By how topics begin, colon and all: a private topic is one of its namespace."""

    def __attrs_post_init__(self) -> None:
        self.count_by(RESERVED_NAMESPACES)

    def count_by(self, namespaces: Iterable[str]) -> None:
        """Count topics of these namespaces apart from now on."""
        for name in namespaces:
            if name not in self._named:
                tally = self._named[name] = Tally()
                self._by_prefix |= {f"{name}:": tally, f"{PRIVATE}{name}:": tally}

    def of(self, topic: str) -> Tally:
        """The tally of a topic. 0.1 µs."""
        return self._by_prefix.get(topic[: topic.find(":") + 1], self.others)

    @property
    def published(self) -> int:
        """All publications."""
        return self.others.published + sum([each.published for each in self._named.values()])

    def by_namespace(self) -> Mapping[str, int]:
        """A snapshot."""
        named = {name: each.published for name, each in self._named.items()}
        return {"": self.others.published, **named}
