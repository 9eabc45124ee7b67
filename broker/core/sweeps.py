"""A question about all topics of one moment that is answered a few topics at a time.

Rules:

1. It is asked of each topic once: when the topic is touched, or when its turn comes. So the answer counts at once
   wherever anybody looks, however long the rest takes.
2. A topic that was touched and has begun anew is another one, which it is not asked of.
3. Several may be under way: a later one does not take the place of an earlier.
"""

from collections.abc import Callable, Iterable

import attrs


@attrs.define(eq=False)
class _Sweep:
    is_over: Callable[[str], bool]
    left: list[str]
    """Names whose turn has yet to come; of these some were touched."""
    seen: set[str] = attrs.field(factory=set)

    def ask(self, topic: str) -> bool:
        if topic in self.seen:
            return False
        self.seen.add(topic)
        return self.is_over(topic)


@attrs.define(eq=False)
class Sweeps:
    """All questions that are under way. Touch a topic before each use of it, while `begun` is true."""

    begun: list[_Sweep] = attrs.field(init=False, factory=list)

    def begin(self, is_over: Callable[[str], bool], topics: Iterable[str]) -> None:
        """Ask this of these topics; the answer must not depend on when. Linear in them, 30 ns each."""
        self.begun.append(_Sweep(is_over, [*topics]))

    def touch(self, topic: str) -> bool:
        """Whether a topic is over by any question that it was not asked about yet."""
        is_over = False
        for sweep in self.begun:  # all of them, so that none finds it over when it has begun anew
            is_over |= sweep.ask(topic)
        return is_over

    def take(self) -> str | None:
        """The topic whose turn it is to be touched; None, and all is over, if there is none."""
        while self.begun:
            if self.begun[0].left:
                return self.begun[0].left.pop()
            del self.begun[0]
        return None
