"""The acts of `Broker.cluster`, on the connections of all nodes."""

from collections.abc import Callable

import attrs

from broker.core.messages import ConnectionInfo, Fd
from broker.errors import CloseCode, UnsubscribeCode, check_close_code
from broker.protocols.json_text import to_json
from broker.routing.mail import Bind, Disconnect, Expire, Subscribe, Unsubscribe
from broker.session.everywhere import Everywhere
from broker.session.figures import NodeReport
from broker.session.search import ConnectionQuery


@attrs.frozen
class Cluster:
    """The connections of all nodes that share an engine; where there is one node, its own.

    Each method is as that of `Broker` of the same name, for any node, and so has to wait. Each raises
    `Refused` (100, temporary) where a node or the engine does not answer: then nobody knows whether it
    was done. Cancelled, it may be done or not.
    """

    everywhere: Callable[[], Everywhere]
    """Raises `RuntimeError` unless the broker serves."""

    async def disconnect(
        self, fd: Fd, code: int = CloseCode.FORCE_DISCONNECT, reason: str = "force disconnect"
    ) -> bool:
        """Close a connection once it has got what is queued for it; false if it is nowhere."""
        check_close_code(code)
        return bool(await self.everywhere().order([fd], lambda fds: Disconnect(fds, code, reason)))

    async def expire(self, fd: Fd, when: float | None = None) -> bool:
        """Let a client's connection end at `when`, in Unix seconds; None for never."""
        return bool(await self.everywhere().order([fd], lambda fds: Expire(fds, when)))

    async def add_subscription(
        self,
        fd: Fd,
        topic: str,
        *,
        info: object = None,
        data: object = None,
        join_leave: bool = False,
    ) -> bool:
        """Subscribe a connection to a topic or pattern, without its asking; false if it is subscribed
        already, or nowhere."""
        shown = None if info is None else to_json(info)
        told = None if data is None else to_json(data)
        return bool(
            await self.everywhere().order(
                [fd], lambda fds: Subscribe(fds, topic, shown, told, join_leave)
            )
        )

    async def end_subscription(
        self,
        fd: Fd,
        topic: str,
        code: int = UnsubscribeCode.SERVER,
        reason: str = "server unsubscribe",
    ) -> bool:
        """End a connection's subscription, whoever began it; false if there is none."""
        return bool(
            await self.everywhere().order([fd], lambda fds: Unsubscribe(fds, topic, code, reason))
        )

    async def bind(self, fd: Fd, user: str) -> None:
        """Say who a connection belongs to; empty for nobody. Raises `KeyError` if it is nowhere."""
        if not await self.everywhere().order([fd], lambda fds: Bind(fds, user)):
            raise KeyError(fd)

    async def connections(self, after: Fd = 0, limit: int = 100) -> list[ConnectionInfo]:
        """Up to `limit` connections in order of their fd, from the first beyond `after` on. All nodes have
        answered, or it raises."""
        query = ConnectionQuery(after)
        return [*(await self.everywhere().connections(query, limit)).connections]

    async def connection_info(self, fd: Fd) -> ConnectionInfo | None:
        """A snapshot of one connection; None if it is nowhere."""
        return await self.everywhere().connection_details(fd)

    async def fds_of(self, user: str) -> list[Fd]:
        """All connections of a user that are not closing."""
        return await self.everywhere().fds_of(user)

    async def topics(self) -> dict[str, int]:
        """The topics and patterns that are subscribed to, with how many subscriptions each has. Raises
        `Refused` (106) where a node has more than one message holds, some thousand."""
        return await self.everywhere().topics()

    async def nodes(self) -> list[NodeReport]:
        """How all nodes are, this one first. Those that do not answer are there, and not `alive`."""
        return await self.everywhere().nodes()
