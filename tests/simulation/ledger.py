"""What was said, and what is true: the books that all clients of a simulation are held to.

Everything that anybody publishes or sends has a number of its own, and numbers only grow. So wherever
one turns up, it is known who sent it when, to whom, and what has changed since.

*Changes* are counted: a bind, a reload, a connect. What was right at any moment between two counts may
happen between them; the narrower the two, the sharper the check.
"""

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import trio

PAD = "x" * 700

KEY_SECONDS = 299.0
"""For how long a key holds, for sure."""


def payload(number: int, large: bool = False) -> Any:
    return [number, PAD] if large else number


def number_of(data: Any) -> int:
    number = data[0] if isinstance(data, list) else data
    assert isinstance(number, int), f"not ours: {data!r}"
    return number


@attrs.frozen
class Sent:
    """One thing that was said. `sender` is who said it, in an order of its own."""

    number: int
    topic: str
    sender: str
    at: int
    """The count of changes by then."""
    tags: Mapping[str, str] | None = None
    not_to: tuple[int, ...] = ()
    once: tuple[str, str, str] | None = None
    """Owner, topic and key, where it may be there once at most."""
    retain: bool = False


@attrs.frozen
class Told:
    """A publication as a witness in the broker's own program tells of it; `at` is virtual time."""

    number: int
    offset: int
    at: float


@attrs.define(eq=False)
class Witness:
    """What one node has delivered, by topic, in order."""

    told: dict[str, list[Told]] = attrs.field(factory=dict)
    order: list[tuple[str, int]] = attrs.field(factory=list)
    place: dict[tuple[str, int], int] = attrs.field(factory=dict)
    newest: dict[tuple[str, str], int] = attrs.field(factory=dict)


@attrs.define(eq=False)
class Ledger:
    changes: int = 0
    sent: dict[int, Sent] = attrs.field(factory=dict)
    acknowledged: dict[int, float] = attrs.field(factory=dict)
    refused: set[int] = attrs.field(factory=set)
    positions: dict[tuple[str, str, int], int] = attrs.field(factory=dict)
    """What stands at a topic, epoch and offset: for ever the same."""
    witnesses: list[Witness] = attrs.field(factory=list)
    decided: dict[object, int] = attrs.field(factory=dict)
    """The count of changes when a hook had said yes to something."""
    group_members: dict[tuple[str, int], int] = attrs.field(factory=dict)
    """By group and number, the fd that has got it."""
    keys: dict[tuple[str, str, str], tuple[int, float]] = attrs.field(factory=dict)
    """By owner, topic and key: what was published, and when."""
    keys_from: int = 0
    """Before this number keys may have been another's, or forgotten."""
    _later: list[Callable[[], None]] = attrs.field(factory=list)

    def changed(self) -> int:
        self.changes += 1
        return self.changes

    def send(self, topic: str, sender: str, **more: Any) -> Sent:
        number = len(self.sent) + 1
        self.sent[number] = sent = Sent(number, topic, sender, self.changes, **more)
        return sent

    def check_later(self, check: Callable[[], None]) -> None:
        """Once the witnesses have told all there is by now."""
        self._later.append(check)

    def check(self) -> None:
        later, self._later = self._later, []
        for check in later:
            check()

    def saw(self, topic: str, epoch: str, offset: int, number: int) -> None:
        """Somebody saw this there."""
        before = self.positions.setdefault((topic, epoch, offset), number)
        assert before == number, f"{topic} {epoch} {offset} was {before}, and is {number}"

    def witnessed(self, witness: Witness, topic: str, data: Any, offset: int) -> None:
        """A node has delivered something."""
        number = number_of(data)
        sent = self.sent[number]
        assert sent.topic == topic, f"{number} was sent to {sent.topic}, and came on {topic}"
        assert number not in self.refused or sent.once, f"{number} was refused, and is delivered"
        assert (topic, number) not in witness.place, f"{number} was published twice"
        newest = witness.newest.get((topic, sent.sender), 0)
        assert newest < number, f"{number} of {sent.sender} came behind {newest}"
        witness.newest[topic, sent.sender] = number
        witness.place[topic, number] = len(witness.order)
        witness.order.append((topic, number))
        witness.told.setdefault(topic, []).append(Told(number, offset, trio.current_time()))
        if sent.once is not None and number > self.keys_from:
            now = trio.current_time()
            first, at = self.keys.setdefault(sent.once, (number, now))
            if now - at > KEY_SECONDS:
                self.keys[sent.once] = number, now
            else:
                assert first == number, f"the key of {number} was used by {first} before"

    def void_keys(self) -> None:
        """Keys count from now on: owners have changed, or what had them is forgotten."""
        self.keys, self.keys_from = {}, len(self.sent)

    def was_published(self, number: int) -> bool:
        """Whether any node has delivered it, or what had its key."""
        sent = self.sent[number]
        if sent.once is not None and (sent.once in self.keys or self.keys_from):
            return True  # or what had its key before keys were counted anew
        return any((sent.topic, number) in each.place for each in self.witnesses)
