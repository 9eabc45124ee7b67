"""The counts of a router: publications by namespace, and recoveries.

Publications are counted by namespace when their run has ended, and only where their topic may have one:
to a publication that joins a run, and to topics without a colon, it costs nothing.
"""

from collections.abc import Iterable, Mapping

import attrs

from broker.core.names import PRIVATE, RESERVED_NAMESPACES


@attrs.define(eq=False)
class Recoveries:
    """Recoveries of clients since `serve` began, by their outcome: `recovered` without a loss, or with a
    `gap`, of which the client was told."""

    recovered: int = 0
    gap: int = 0


@attrs.define(eq=False)
class Tallies:
    """Publications by namespace: those of the settings, `fd` and `user` for what goes to connections. One
    that a reload takes away keeps what it has counted."""

    _counts: dict[str, int] = attrs.field(init=False, factory=dict)
    _names: dict[str, str] = attrs.field(init=False, factory=dict)
    """Namespaces by how topics begin, colon and all: a private topic is one of its namespace."""

    def __attrs_post_init__(self) -> None:
        self.count_by(RESERVED_NAMESPACES)

    def count_by(self, namespaces: Iterable[str]) -> None:
        """Count topics of these namespaces apart from now on."""
        for name in namespaces:
            self._counts.setdefault(name, 0)
            self._names |= {f"{name}:": name, f"{PRIVATE}{name}:": name}

    def note(self, topic: str, count: int) -> None:
        """So many publications to a topic. One without a namespace need not be noted."""
        name = self._names.get(topic[: topic.find(":") + 1])
        if name is not None:
            self._counts[name] += count

    def by_namespace(self, published: int) -> Mapping[str, int]:
        """A snapshot. "" has what is left of all that was `published`."""
        return {"": published - sum(self._counts.values()), **self._counts}
