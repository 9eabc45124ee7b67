"""The methods for operators, by name: `admin.*`, called by `rpc` at the dashboard's door.

============================  =================================  =====================================
method                        asks with                          answered with
============================  =================================  =====================================
admin.ticks                                                      the last sample of each node
admin.overview                node                               a node, and the samples that it has kept
admin.connections             search, after, limit, order, node  a page of connections
admin.connection              fd                                 all that is known of it, or of its end
admin.closed                  search, before, limit, node        a page of those that have ended
admin.topics                  search, limit, node                those with the most subscribers
admin.topic                   topic, after, node                 who listens, what is kept, its rules
admin.tree                    fd, node                           the nursery tree, or one connection's
admin.budgets                 node                               memory by part, places, turns
admin.engine                  node                               what is kept, events, hooks, all nodes
admin.config                  node                               settings, each with its source
admin.trace                   one of fd, user, topic             {}; what it sees comes on `$admin`
admin.untrace                                                    {}
admin.kick *                  fd, code, reason                   {}
admin.unsubscribe *           fd, topic                          {}
admin.push *                  fd, data                           {"status"}
admin.publish *               topic, data, retain, skip_history  the report of a publication
============================  =================================  =====================================

Those with a star take the role `full`, and leave a line `admin_act` in the log; all others `view`.

`node` is the id of one. Without it lists are of all nodes, with the name of its own in each row, and `missing`
are those that have not answered; what is a node's alone is of this one. An `fd` may be on any. Of another
node views are asked alone, which change nothing; acts go there as those of the app do.
"""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Annotated, Any, Final

import attrs
import msgspec
import structlog
import trio
from msgspec import Meta, Raw, Struct, structs

from broker import logs
from broker.access.operators import Asker, Method, Role
from broker.admin.gathered import Gathered
from broker.admin.listings import (
    Listings,
    Names,
    NodeId,
    Nothing,
    OneTopic,
    Search,
    SearchClosed,
    SearchTopics,
    Text,
    closed_row,
)
from broker.admin.nurseries import nursery_tree
from broker.admin.samples import Samples
from broker.config.effective import effective
from broker.core.json_reader import AsSent
from broker.core.messages import Delivery, Fd, PushResult
from broker.core.trace import Target
from broker.core.work import COMMAND, ENDING
from broker.errors import CloseCode, ErrorCode, Refused, UnsubscribeCode, check_close_code
from broker.node import Node
from broker.protocols.commands import BadCommand
from broker.protocols.json_text import check_json, written
from broker.routing import mail
from broker.routing.mail import Disconnect
from broker.routing.open_calls import CALL_SECONDS
from broker.routing.publishing import PublishOptions
from broker.session.everywhere import ForFds
from broker.session.rpc import report
from broker.session.views import Views, view_of
from broker.version import VERSION

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker.admin")

TRACE_WAIT: Final = 1.0
"""Seconds that a trace is waited for at once: an operator who has gone meanwhile is noticed after that."""

TOPICS: Final = 1000
"""Of one connection that are shown: 250 KB at most."""

HISTORY: Final = 2000.0
"""Work of all samples that are kept, written: 180 KB."""

TRACE_PAUSE: Final = 0.2
"""Seconds between two of them: as fast as a trace takes entries, and faster than anybody reads."""

_decode: Final = msgspec.json.Decoder().decode

Whole = Annotated[int, Meta(ge=0)]


class OneConnection(Struct, forbid_unknown_fields=True):
    fd: Fd


class OneNode(Struct, forbid_unknown_fields=True):
    node: NodeId = ""


class Tree(Struct, forbid_unknown_fields=True):
    fd: Fd | None = None
    node: NodeId = ""


class Traced(Struct, forbid_unknown_fields=True):
    fd: Whole = 0
    user: Text = ""
    topic: Annotated[str, Meta(max_length=1024)] = ""


class Kick(Struct, forbid_unknown_fields=True):
    fd: Fd
    code: int = int(CloseCode.FORCE_DISCONNECT)
    reason: Annotated[str, Meta(max_length=120)] = "force disconnect"


class Unsubscribe(Struct, forbid_unknown_fields=True):
    fd: Fd
    topic: Annotated[str, Meta(max_length=1024)]


class Push(Struct, forbid_unknown_fields=True):
    fd: Fd
    data: AsSent


class Publish(Struct, forbid_unknown_fields=True):
    topic: Annotated[str, Meta(max_length=1024)]
    data: AsSent
    retain: bool = False
    skip_history: bool = False


def admin_methods(node: Node, samples: Samples) -> Mapping[str, Method]:
    """The methods of one node, by name."""
    gathered, shown = Gathered(node), _Shown(node, samples)
    looks, acts = _Looks(node, gathered), _Acts(node)
    shown.add_to(node.views)
    view, full = Role.VIEW, Role.FULL
    return {
        "admin.ticks": Method(Nothing, view, look=looks.ticks),
        "admin.overview": Method(OneNode, view, look=partial(looks.of_node, "overview")),
        "admin.connections": Method(Search, view, look=looks.connections),
        "admin.connection": Method(OneConnection, view, look=looks.connection),
        "admin.closed": Method(SearchClosed, view, look=looks.closed),
        "admin.topics": Method(SearchTopics, view, look=looks.topics),
        "admin.topic": Method(OneTopic, view, look=looks.topic),
        "admin.tree": Method(Tree, view, look=looks.tree),
        "admin.budgets": Method(OneNode, view, look=partial(looks.of_node, "budgets")),
        "admin.engine": Method(OneNode, view, look=looks.engine),
        "admin.config": Method(OneNode, view, look=partial(looks.of_node, "config")),
        "admin.trace": Method(Traced, view, look=looks.trace),
        "admin.untrace": Method(Nothing, view, look=looks.untrace),
        "admin.kick": Method(Kick, full, look=acts.kick),
        "admin.unsubscribe": Method(Unsubscribe, full, look=acts.unsubscribe),
        "admin.push": Method(Push, full, act=acts.push),
        "admin.publish": Method(Publish, full, look=acts.publish),
    }


class _Shown:
    """The views of this node, for its own operators and those of other nodes. They change nothing."""

    def __init__(self, node: Node, samples: Samples) -> None:
        self._node = node
        self._samples = samples
        self._lists = Listings(node)

    def add_to(self, views: Views) -> None:
        lists = self._lists
        kinds: list[tuple[str, type[Struct], Callable[[Any], Awaitable[object]]]] = [
            ("tick", Nothing, self._tick),
            ("overview", Nothing, self._overview),
            ("connections", Search, lists.connections),
            ("connection", OneConnection, self._connection),
            ("closed", SearchClosed, lists.closed),
            ("topics", SearchTopics, lists.topics),
            ("counts", Names, lists.counts),
            ("members", OneTopic, lists.members),
            ("kept", OneTopic, self._kept),
            ("tree", Tree, self._tree),
            ("budgets", Nothing, self._budgets),
            ("engine", Nothing, self._engine),
            ("config", Nothing, self._config),
        ]
        for name, params, look in kinds:
            views.add(name, view_of(params, look))

    async def _tick(self, params: Nothing) -> object:
        return self._samples.last

    async def _overview(self, params: Nothing) -> object:
        node = self._node
        self._node.router.meter.add(HISTORY)
        return {
            "node": node.name,
            "id": node.views.here.id,
            "version": VERSION,
            "started_at": node.figures.started_at,
            "now": node.now(),
            "draining": node.draining,
            "encrypted": node.config.tls_cert is not None,
            "memory_limit": node.services.memory.limit,
            "places": node.services.admission.capacity.connections,
            "samples": self._samples.history(),
        }

    async def _connection(self, params: OneConnection) -> object:
        node, fd = self._node, params.fd
        here = node.services.connections.get(fd)
        if here is not None:
            most = min(node.config.max_topics, TOPICS)
            return {"here": self._lists.connection(here, topics=most)}
        closed = node.closed_connection(fd)
        if closed is None:
            text = f"no connection has fd {fd}, nor is it among the last that ended"
            raise Refused(ErrorCode.UNKNOWN_CHANNEL, text)
        return {"closed": closed_row(closed, topics=len(closed.details.topics))}

    async def _kept(self, params: OneTopic) -> object:
        return await self._lists.kept(params.topic)

    async def _tree(self, params: Tree) -> object:
        return attrs.asdict(await nursery_tree(self._node.services, params.fd))

    async def _budgets(self, params: Nothing) -> object:
        services, router = self._node.services, self._node.router
        places = services.admission.capacity
        return {
            "memory": attrs.asdict(services.memory.statistics()),
            "connection_room": services.memory.connection_room,
            "connections": len(services.connections),
            "streams": services.admission.count(),
            "places": attrs.asdict(places),
            "turns_waiting": router.turns.waiting,
            "work": router.meter.done,
            "requests": len(services.requests),
            "traces": len(self._node.traces),
            "history_bytes": services.config.history_bytes,
            "retained_bytes": services.config.retained_bytes,
        }

    async def _engine(self, params: Nothing) -> object:
        node = self._node
        stats = node.figures.statistics()
        hooks = [
            {
                "hook": hook,
                "asked": asked,
                "calls": each.seconds.count,
                "seconds": each.seconds.sum,
                "failures": each.failures,
            }
            for (hook, asked), each in stats.hooks.items()
        ]
        return {
            "kind": node.config.engine.partition(":")[0],
            "durability": node.router.engine.durability,
            "engine": attrs.asdict(stats.engine),
            "retained": attrs.asdict(stats.retained),
            "recoveries": stats.recoveries,
            "gaps": stats.ends.gaps,
            "events": [
                {
                    "reader": name,
                    "waiting": each.waiting,
                    "delivered": each.delivered,
                    "dropped": each.dropped,
                    "failures": each.failures,
                }
                for name, each in stats.events.items()
            ],
            "hooks": hooks,
            "namespaces": stats.namespaces,
            "log_lines_dropped": logs.statistics().lines_dropped,
        }

    async def _config(self, params: Nothing) -> object:
        settings = self._node.services.settings
        rows = [
            {
                "name": each.name,
                "value": _in_words(each.value),
                "source": each.source,
                "restart": each.needs_restart,
            }
            for each in effective(settings.config, settings.sources)
        ]
        return {"rows": rows}


@attrs.define(eq=False)
class _Following:
    """The trace that an operator is told of."""

    trace: str
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)


class _Looks:
    """The methods for operators that change nothing, about any node."""

    def __init__(self, node: Node, gathered: Gathered) -> None:
        self._node = node
        self._gathered = gathered
        self._following: dict[Fd, _Following] = {}

    async def of_node(self, view: str, params: OneNode, asker: Asker) -> object:
        return Raw(await self._node.views.of(params.node, view, Nothing()))

    async def ticks(self, params: Nothing, asker: Asker) -> object:
        return {"nodes": await self._gathered.ticks()}

    async def connections(self, params: Search, asker: Asker) -> object:
        return await self._gathered.connections(params)

    async def connection(self, params: OneConnection, asker: Asker) -> object:
        return await self._gathered.connection(params.fd)

    async def closed(self, params: SearchClosed, asker: Asker) -> object:
        return await self._gathered.closed(params)

    async def topics(self, params: SearchTopics, asker: Asker) -> object:
        return await self._gathered.topics(params)

    async def topic(self, params: OneTopic, asker: Asker) -> object:
        return await self._gathered.topic(params)

    async def tree(self, params: Tree, asker: Asker) -> object:
        node = self._node
        where = params.node
        if params.fd is not None:
            where = node.everywhere.node_of(params.fd) or ""
        return Raw(await node.views.of(where, "tree", Tree(params.fd)))

    async def engine(self, params: OneNode, asker: Asker) -> object:
        nodes = await self._node.everywhere.nodes()
        shown = await self._node.views.of(params.node, "engine", Nothing())
        return {"nodes": [structs.asdict(each) for each in nodes], **_decode(shown)}

    # traces

    async def trace(self, params: Traced, asker: Asker) -> object:
        """Begin a trace in place of the one that this operator has."""
        if sum(map(bool, (params.fd, params.user, params.topic))) != 1:
            raise Refused(ErrorCode.BAD_REQUEST, "trace one of fd, user and topic")
        await self._end_trace(asker)
        target = Target(params.fd, params.user, params.topic)
        following = _Following(await self._node.inspection.begin(target))
        self._following[asker.fd] = following
        asker.start_task(partial(self._follow, asker, following))
        return {"trace": following.trace}

    async def untrace(self, params: Nothing, asker: Asker) -> object:
        await self._end_trace(asker)
        return {}

    async def _end_trace(self, asker: Asker) -> None:
        following = self._following.pop(asker.fd, None)
        if following is not None:
            following.scope.cancel()
            # It has ended, or its node does not answer: then it ends unread.
            with suppress(Refused):
                await self._node.inspection.end(following.trace)

    async def _follow(self, asker: Asker, following: "_Following") -> None:
        """Tell an operator what a trace sees, as fast as he reads; what he has no time for is counted."""
        try:
            with following.scope:
                has_ended = False
                while not has_ended:
                    if not asker.is_behind:
                        has_ended = await self._tell_trace(asker, following.trace)
                    await trio.sleep(TRACE_PAUSE)
        finally:
            if self._following.get(asker.fd) is following:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + CALL_SECONDS):
                    await self._end_trace(asker)

    async def _tell_trace(self, asker: Asker, trace: str) -> bool:
        """Wait until there is something, and tell it; whether it was the last."""
        told: dict[str, object] = {"trace": trace}
        try:
            read = await self._node.inspection.read(trace, TRACE_WAIT)
        except Refused as refusal:
            asker.tell(written({**told, "entries": [], "ended": True, "why": refusal.message}))
            return True
        if read.entries or read.missed or read.has_ended:
            more = {"entries": read.entries, "missed": read.missed, "ended": read.has_ended}
            asker.tell(written(told | more))
        return read.has_ended


def _in_words(value: object) -> str:
    """The value of a setting, as a file has it; "" for none."""
    if value is None or value in ([], {}):
        return ""
    return value if isinstance(value, str) else written(value).decode()


class _Acts:
    """The methods that change something. Each act is logged, with the operator who asked for it."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def kick(self, params: Kick, asker: Asker) -> object:
        try:
            check_close_code(params.code)
        except ValueError as error:
            raise Refused(ErrorCode.BAD_REQUEST, str(error)) from None

        def make(fds: list[Fd]) -> ForFds:
            return Disconnect(fds, params.code, params.reason)

        about = {"target": params.fd, "code": params.code, "reason": params.reason}
        if not await self._order("kick", asker, params.fd, make, about):
            text = f"no connection has fd {params.fd}, or it is closing already"
            raise Refused(ErrorCode.UNKNOWN_CHANNEL, text)
        return {}

    async def unsubscribe(self, params: Unsubscribe, asker: Asker) -> object:
        def make(fds: list[Fd]) -> ForFds:
            why = int(UnsubscribeCode.SERVER), "server unsubscribe"
            return mail.Unsubscribe(fds, params.topic, *why)

        about = {"target": params.fd, "topic": params.topic}
        if not await self._order("unsubscribe", asker, params.fd, make, about):
            text = f"fd {params.fd} is not subscribed to it, or not here"
            raise Refused(ErrorCode.UNKNOWN_CHANNEL, text)
        return {}

    async def _order(
        self,
        act: str,
        asker: Asker,
        fd: Fd,
        make: Callable[[list[Fd]], ForFds],
        about: Mapping[str, Any],
    ) -> bool:
        """Give an order to a connection, wherever it is; whether it has followed. Raises `Refused` (100)
        where its node does not answer: not known whether it was done, and noted all the same."""
        # No checkpoint between this and the act, as far as it is this node's.
        asker.check(Role.FULL)
        self._node.router.meter.add(ENDING)
        is_done = True
        try:
            is_done = bool(await self._node.everywhere.order([fd], make))
        finally:
            if is_done:
                self._note(act, asker, **about)
        return is_done

    def push(self, params: Push, asker: Asker) -> object:
        status = self._node.push(params.fd, Raw(_json(params.data)))
        if status is PushResult.CLOSED:
            text = f"no connection has fd {params.fd}, or it is closing"
            raise Refused(ErrorCode.UNKNOWN_CHANNEL, text)
        self._note("push", asker, target=params.fd, bytes=len(params.data), status=status)
        return {"status": status}

    async def publish(self, params: Publish, asker: Asker) -> object:
        node, data = self._node, _json(params.data)
        options = PublishOptions(retain=params.retain, skip_history=params.skip_history)
        await node.router.turns.wait(COMMAND + node.router.weigh(params.topic))
        await node.wait_room()
        # No checkpoint between this and the act: the key may have gone meanwhile.
        asker.check(Role.FULL)
        publishing = node.publish_soon(params.topic, data, options)
        self._note("publish", asker, topic=params.topic, bytes=len(data))
        delivery: Delivery = await publishing.wait()
        position = delivery.position
        return {**report(delivery), "offset": None if position is None else position.offset}

    def _note(self, act: str, asker: Asker, **about: object) -> None:
        log.info("admin_act", act=act, fd=asker.fd, peer=asker.address, **about)


def _json(data: Raw) -> bytes:
    """A payload in one line. Raises `Refused` (107)."""
    try:
        return check_json(bytes(data))
    except BadCommand as error:
        raise Refused(ErrorCode.BAD_REQUEST, f"data: {error}") from None
