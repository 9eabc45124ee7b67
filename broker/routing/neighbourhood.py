"""A node that has neighbours: the parts of it, and the tasks that keep them true."""

from collections.abc import Awaitable, Callable

import attrs
import trio

from broker.routing.distant_reports import DistantReports
from broker.routing.distant_requests import DistantRequests
from broker.routing.fd_leases import FdLeases
from broker.routing.forwarding import Forwarding
from broker.routing.group_shares import GroupShares
from broker.routing.neighbours import Neighbours
from broker.routing.publishing import Publisher
from broker.routing.reaper import Reaper
from broker.routing.requests import Requests
from broker.routing.roster import CardRoster
from broker.routing.router import Router
from broker.routing.wills import Wills


@attrs.define(eq=False)
class Neighbourhood:
    """See the module. Made before `Engine.running`, so that nothing of what comes is missed."""

    router: Router
    wills: Wills
    publisher: Publisher
    requests: Requests
    neighbours: Neighbours
    forwarding: Forwarding = attrs.field(init=False)
    groups: GroupShares = attrs.field(init=False)
    roster: CardRoster = attrs.field(init=False)
    leases: FdLeases = attrs.field(init=False)
    reaper: Reaper = attrs.field(init=False)
    _tasks: trio.Nursery | None = attrs.field(init=False, default=None)

    def __attrs_post_init__(self) -> None:
        router, neighbours = self.router, self.neighbours
        self.forwarding = Forwarding(neighbours, router)
        router.ways = self.forwarding
        self.groups = GroupShares(neighbours, router)
        self.roster = CardRoster(neighbours, router, self.wills, self.groups)
        self.leases = FdLeases(neighbours, router.hub.sessions, router.engine.next_fd - 1)
        DistantReports(neighbours, router, self.publisher)
        DistantRequests(neighbours, self.groups, self.requests)
        self.reaper = Reaper(neighbours, router, self.publisher, router.events)
        neighbours.calls.settle = router.returns.settled

    def start_soon(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do what another node has asked for, in a task of its own; nothing while this one starts or
        stops, which is no answer."""
        if self._tasks is not None:
            self._tasks.start_soon(work)

    async def begin(self) -> None:
        """Tell the others that this node is here, and get numbers for its connections. Raises `Refused`.
        The engine is running by then."""
        self.neighbours.introduce()
        self.roster.begin()
        await self.leases.lease()

    async def run(self) -> None:
        """Keep all of it true, until cancelled."""
        try:
            async with trio.open_nursery() as tasks:
                self._tasks = tasks
                tasks.start_soon(self.neighbours.calls.keep_time)
                tasks.start_soon(self.leases.keep)
                tasks.start_soon(self.roster.keep)
                tasks.start_soon(self.reaper.run)
        finally:
            self._tasks = None
            self.roster.end()  # everybody has left, or everything is being cut with us
