"""The owners of the bytes of the histories: what each has published, and what is charged to it.

Words are those of `history`; a topic's *members* are the owners of which publications may be left there, its
*payer* the one that is charged for the topic itself.

Rules:

- Nothing is charged until `begin`: a publication costs nothing more while there is room. From then on what was
  kept before is charged along with what comes, and when all is, `is_behind` is false.
- `bytes` counts all that is kept, whether it is charged to somebody or not yet.
- A topic is charged to one who has publications there: whoever has none left hands it on.
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Final

import attrs

from broker.core.messages import ClientInfo, Publication
from broker.core.shares import Shares, owner_of
from broker.core.topic_history import History, Publisher

LOOKS: Final = 8
"""Of the topics in which an owner's publications lie behind others', so many are looked at for one
whose front has become its own before another's front is dropped: each look costs 0.2 µs."""

OWNER_BYTES: Final = 1536
"""Bytes of one owner that is charged for something: its account, the orders of its topics and
what is known of the client come to 1,510 bytes."""


@attrs.define(eq=False)
class Charges:
    """The bytes of all topics, and the accounts of those who have published them. Every method is one step."""

    charge_from: float
    """Beyond so many bytes publications are charged; below 0 once they are."""
    bytes: int = attrs.field(init=False, default=0)
    """All that is kept, besides the accounts."""
    shares: Shares[Publisher] = attrs.field(
        init=False, factory=lambda: Shares(Publisher, OWNER_BYTES)
    )
    # Topics that may hold what is not charged yet; those least recently published to last.
    _uncharged: list[History] = attrs.field(init=False, factory=list)

    @property
    def held(self) -> int:
        """All that is kept, with the accounts."""
        return self.bytes + OWNER_BYTES * len(self.shares)

    def add(self, size: int, payer: Publisher | None) -> None:
        """So many bytes more are kept, or fewer, and charged to an owner at once if there is one."""
        self.bytes += size
        if payer is not None:
            self.shares.charge(payer, size)

    def drop_oldest(self, history: History) -> int:
        """Drop the front and take its bytes, which come back, from its owner's account."""
        ring = history.ring
        offset, info = history.top + 1 - ring.count, ring.info(0)
        less = ring.drop(1)
        if offset <= history.charged:
            self.shares.charge(self.shares.account(owner_of(info)), -less)
        return less

    def sole_publisher(
        self, history: History, payer: Publisher, publications: Sequence[Publication]
    ) -> Publisher | None:
        """Its payer, if that is the owner of all that is kept of a topic and of all that comes, and
        everything is charged already: then a sum is charged, in a fifth of the time."""
        info = publications[0].info
        for each in publications:
            if each.info is not info:
                return None
        return self.payer_if_sole(history, payer, info)

    def payer_if_sole(
        self, history: History, payer: Publisher, info: ClientInfo | None
    ) -> Publisher | None:
        """The same where one publisher has said all that comes."""
        if self._uncharged or len(history.members) > 1:
            return None
        if history.charged < history.top or payer not in history.members:
            return None
        return payer if owner_of(info) == payer.owner else None

    def charge_sole(self, history: History, payer: Publisher, more: int) -> None:
        """Charge a new publication, less those that it pushed out, to the sole publisher of a topic."""
        history.members[payer] = history.charged = history.top
        if history in payer.own:
            payer.own.move_to_end(history)
        if more:  # not so where a full topic keeps messages of one size
            self.shares.charge(payer, more)

    def begin(self, kept: Iterable[History]) -> None:
        """Charge from now on; `kept` are all topics, those least recently published to first."""
        if self.charge_from >= 0:
            self.charge_from = -1
            self._uncharged = list(reversed([*kept]))

    def put_off(self, charge_from: float) -> None:
        """Charge no more until there are so many bytes."""
        self.charge_from = charge_from
        self._uncharged = []

    @property
    def is_behind(self) -> bool:
        """Whether there may be publications that are not charged yet."""
        return bool(self._uncharged)

    def catch_up(self, size: float) -> None:
        """Charge about so many bytes of what was put off."""
        while size > 0 and self._uncharged:
            size -= self.charge_topic(self._uncharged.pop())

    def charge_topic(self, history: History) -> int:
        """Charge what has not been charged of a topic, and say how many bytes that was."""
        # Of a topic that has gone since it was listed there is none.
        ring, charged = history.ring, history.charged
        first = max(0, charged + ring.count - history.top)
        if first == ring.count:
            return 0
        total = 0
        for place in range(first, ring.count):
            size = ring.weight(place)
            account = self.shares.account(owner_of(ring.info(place)))
            self.shares.charge(account, size)
            total += size
            if account not in history.members:
                self._join(history, account, is_front=not place)
            history.members[account] = history.top + 1 - ring.count + place
        history.charged = history.top
        if history.payer is None:
            history.payer = self._owner_of_front(history)
            self.shares.charge(history.payer, history.bytes)
            total += history.bytes
        if len(history.members) == 1 and history in history.payer.own:
            history.payer.own.move_to_end(history)
        return total

    def _join(self, history: History, account: Publisher, *, is_front: bool) -> None:
        (account.own if is_front else account.shared)[history] = None
        # Of a busy topic, those go who have nothing left there; constant per member.
        if len(history.members) > 2 * history.ring.count + 16:
            for each in [each for each in history.members if self._is_gone(history, each)]:
                self._leave(history, each)

    def _owner_of_front(self, history: History) -> Publisher:
        return self.shares.account(owner_of(history.ring.info(0)))

    def _is_gone(self, history: History, account: Publisher) -> bool:
        """Whether all that `account` has published to this topic has been dropped."""
        return history.members[account] <= history.top - history.ring.count

    def _leave(self, history: History, account: Publisher) -> None:
        """Take a topic from a member that has nothing left there; the payer hands it on."""
        del history.members[account]
        account.own.pop(history, None)
        account.shared.pop(history, None)
        if account is history.payer:
            history.payer = self._owner_of_front(history)
            self.shares.charge(history.payer, history.bytes)
            self.shares.charge(account, -history.bytes)

    def close(self, history: History) -> None:
        """Take a topic whose ring is empty from all who have it."""
        for account in history.members:
            account.own.pop(history, None)
            account.shared.pop(history, None)
        self.add(-history.bytes, history.payer)

    def topic_to_trim(self, account: Publisher) -> History | None:
        """The topic whose front goes when this owner is the heaviest.

        None if it has no publication any more in a topic looked at: ask again.
        """
        while account.own:
            history = next(iter(account.own))
            if self._owner_of_front(history) is account:
                return history
            del account.own[history]
            account.shared[history] = None
        for history in list(islice(account.shared, LOOKS)):
            if self._is_gone(history, account):
                self._leave(history, account)
            elif self._owner_of_front(history) is account:
                del account.shared[history]
                account.own[history] = None
                return history
        if not account.shared:
            return None
        history = next(iter(account.shared))
        account.shared.move_to_end(history)
        return None if self._is_gone(history, account) else history
