"""The present end of the log: a node that others are ahead of reads up to there.

A client that comes from another node may have had what this one has yet to read, which is late, or has no link
just now. To such a client what is known here is no answer: it would be told of a loss that there was not.

Rule: one question at a time is asked of Redis. Those who come while it is on its way share the next one, however many
they are.
"""

from typing import Any

import attrs
import trio

from broker.engines.redis_log import SharedLog
from broker.engines.redis_wire import LinkLost


@attrs.define(eq=False)
class Present:
    """See the module."""

    shared: SharedLog
    _asking: trio.Lock = attrs.field(init=False, factory=trio.Lock)
    _asked: int = attrs.field(init=False, default=0)
    _answer: Any = attrs.field(init=False, default=None)
    """That to the last question; None while there is none."""

    async def wait_read(self) -> None:
        """Return when all is read that was in the log when this was called; for as long as Redis is away it does
        not. Raises one of `UNREADABLE`. Cancelled, nothing happens."""
        while not await self._is_read():
            pass

    async def _is_read(self) -> bool:
        """Ask and wait; false where the log was lost meanwhile, and its end is another one."""
        shared, ours = self.shared, self.shared.lineage
        answer = await self._ask(self._asked)
        if answer is None:
            return False
        lineage, end = answer
        while shared.lineage.encode() != lineage or shared.place < int(end or 0):
            if shared.lineage != ours:
                return False
            await shared.wait_moved()
        return True

    async def _ask(self, before: int) -> Any:
        """The lineage and the end of the log, by a question later than `before`; None if the link is lost."""
        shared = self.shared
        async with self._asking:
            if self._asked == before or self._answer is None:
                self._asked, self._answer = self._asked + 1, None
                link = await shared.wait_link()
                try:
                    self._answer = await link.reader.call(
                        b"HMGET", shared.key + ":state", b"l", b"b"
                    )
                except LinkLost as error:
                    shared.lose(str(error))
            return self._answer
