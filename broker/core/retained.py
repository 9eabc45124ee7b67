"""The last value of each topic that retains one, for whoever subscribes later.

Rule: bounded in bytes. Beyond the bound the value retained longest ago is forgotten.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import attrs

from broker.core.messages import Publication
from broker.core.session import Parcel
from broker.core.topics import is_pattern, matches

VALUE_BYTES: Final = 512
"""What one value costs besides its data: the publication, the topic's name and its place."""


@attrs.define(eq=False)
class Retained:
    """The last values. It is filled as an in-process subscriber is: by `take`."""

    max_bytes: int
    _values: OrderedDict[str, Publication] = attrs.field(init=False, factory=OrderedDict)
    _bytes: int = attrs.field(init=False, default=0)

    def __len__(self) -> int:
        return len(self._values)

    def resize(self, max_bytes: int) -> None:
        """Go by another bound; what is over it is forgotten at once."""
        self.max_bytes = max_bytes
        self._trim()

    def take(self, publications: Sequence[Publication]) -> int:
        """Retain the last of these publications, all of one topic, in place of what was there.

        The value null clears the topic.
        """
        last = publications[-1]
        self._forget(last.topic)
        if last.data != b"null":
            self._values[last.topic] = last
            self._bytes += VALUE_BYTES + len(last.data)
            self._trim()
        return len(publications)

    def deliver(self, parcel: Parcel) -> None:
        """Retain the last publication of a parcel, as `take` does. It counts as nobody's receipt."""
        self.take(parcel.batches[-1][-1:])

    def matching(self, name: str) -> list[Publication]:
        """What a new subscriber to this topic or pattern gets.

        One look-up for a topic; for a pattern linear in all values, about a microsecond each.
        """
        if is_pattern(name):
            return [value for topic, value in self._values.items() if matches(name, topic)]
        value = self._values.get(name)
        return [] if value is None else [value]

    def _trim(self) -> None:
        while self._bytes > self.max_bytes:
            self._forget(next(iter(self._values)))

    def _forget(self, topic: str) -> None:
        value = self._values.pop(topic, None)
        if value is not None:
            self._bytes -= VALUE_BYTES + len(value.data)
