"""The methods for operators, by name: `admin.*`, called by `rpc` at the dashboard's door.

============================  =================================  =====================================
method                        asks with                          answered with
============================  =================================  =====================================
admin.overview                                                   the node, your role, the samples kept
admin.connections             search, after, limit, order        a page of connections
admin.connection              fd                                 all that is known of it, or of its end
admin.closed                  search, skip, limit                a page of those that have ended
admin.topics                  search, limit                      those with the most subscribers
admin.topic                   topic, after                       who listens, what is kept, its rules
admin.tree                    fd                                 the nursery tree, or one connection's
admin.budgets                                                    memory by part, places, turns
admin.engine                                                     what is kept, events, hooks, all nodes
admin.config                                                     settings, each with its source
admin.trace                   one of fd, user, topic             {}; what it sees comes on `$admin`
admin.untrace                                                    {}
admin.kick *                  fd, code, reason                   {}
admin.unsubscribe *           fd, topic                          {}
admin.push *                  fd, data                           {"status"}
admin.publish *               topic, data, retain, skip_history  the report of a publication
============================  =================================  =====================================

Those with a star take the role `full`, and leave a line `admin_act` in the log; all others `view`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Final

import attrs
import structlog
import trio
from msgspec import Meta, Raw, Struct, structs

from broker import logs
from broker.access.operators import Asker, Method, Role
from broker.admin.listings import Listings, Search, SearchClosed, SearchTopics, Text, closed_row
from broker.admin.nurseries import nursery_tree
from broker.admin.samples import Samples
from broker.config.effective import effective
from broker.core.json_reader import AsSent
from broker.core.messages import Delivery, Fd
from broker.core.trace import Target
from broker.core.work import COMMAND, ENDING
from broker.errors import CloseCode, ErrorCode, Refused, UnsubscribeCode
from broker.node import Node
from broker.protocols.commands import BadCommand
from broker.protocols.json_text import check_json, written
from broker.routing.publishing import PublishOptions
from broker.session.rpc import report
from broker.session.tracing import Trace
from broker.version import VERSION

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker.admin")

TRACED_AT_ONCE: Final = 100
"""Entries of a trace in one publication: a page."""

TRACE_PAUSE: Final = 0.2
"""Seconds between two of them: as fast as a trace takes entries, and faster than anybody reads."""

Whole = Annotated[int, Meta(ge=0)]


class Nothing(Struct, forbid_unknown_fields=True):
    pass


class OneConnection(Struct, forbid_unknown_fields=True):
    fd: Fd


class OneTopic(Struct, forbid_unknown_fields=True):
    topic: Annotated[str, Meta(max_length=1024)]
    after: Whole = 0


class Tree(Struct, forbid_unknown_fields=True):
    fd: Fd | None = None


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
    looks, acts = _Looks(node, samples), _Acts(node)
    view, full = Role.VIEW, Role.FULL
    return {
        "admin.overview": Method(Nothing, view, act=looks.overview),
        "admin.connections": Method(Search, view, look=looks.connections),
        "admin.connection": Method(OneConnection, view, act=looks.connection),
        "admin.closed": Method(SearchClosed, view, look=looks.closed),
        "admin.topics": Method(SearchTopics, view, look=looks.topics),
        "admin.topic": Method(OneTopic, view, look=looks.topic),
        "admin.tree": Method(Tree, view, look=looks.tree),
        "admin.budgets": Method(Nothing, view, act=looks.budgets),
        "admin.engine": Method(Nothing, view, look=looks.engine),
        "admin.config": Method(Nothing, view, act=looks.config),
        "admin.trace": Method(Traced, view, act=looks.trace),
        "admin.untrace": Method(Nothing, view, act=looks.untrace),
        "admin.kick": Method(Kick, full, act=acts.kick),
        "admin.unsubscribe": Method(Unsubscribe, full, act=acts.unsubscribe),
        "admin.push": Method(Push, full, act=acts.push),
        "admin.publish": Method(Publish, full, look=acts.publish),
    }


class _Looks:
    """The methods that change nothing."""

    def __init__(self, node: Node, samples: Samples) -> None:
        self._node = node
        self._samples = samples
        self._lists = Listings(node)
        self._following: dict[Fd, trio.CancelScope] = {}

    def overview(self, params: Nothing, asker: Asker) -> object:
        node = self._node
        return {
            "node": node.name,
            "version": VERSION,
            "started_at": node.started_at,
            "now": node.now(),
            "draining": node.draining,
            "encrypted": node.config.tls_cert is not None,
            "memory_limit": node.services.memory.limit,
            "places": node.services.admission.places.connections,
            "samples": self._samples.history(),
        }

    async def connections(self, params: Search, asker: Asker) -> object:
        return await self._lists.connections(params)

    def connection(self, params: OneConnection, asker: Asker) -> object:
        node, fd = self._node, params.fd
        here = node.services.connections.get(fd)
        if here is not None:
            return {"here": self._lists.connection(here, topics=node.config.max_topics)}
        closed = node.closed_connection(fd)
        if closed is None:
            text = f"no connection has fd {fd}, nor is it among the last that ended"
            raise Refused(ErrorCode.UNKNOWN_CHANNEL, text)
        return {"closed": closed_row(closed, topics=len(closed.details.topics))}

    async def closed(self, params: SearchClosed, asker: Asker) -> object:
        return await self._lists.closed(params)

    async def topics(self, params: SearchTopics, asker: Asker) -> object:
        return await self._lists.topics(params)

    async def topic(self, params: OneTopic, asker: Asker) -> object:
        return await self._lists.topic(params.topic, params.after)

    async def tree(self, params: Tree, asker: Asker) -> object:
        return attrs.asdict(await nursery_tree(self._node.services, params.fd, asker.fd))

    def budgets(self, params: Nothing, asker: Asker) -> object:
        services, router = self._node.services, self._node.router
        places = services.admission.places
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

    async def engine(self, params: Nothing, asker: Asker) -> object:
        node = self._node
        nodes = await node.everywhere.nodes()
        stats = node.stats()
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
            "nodes": [structs.asdict(each) for each in nodes],
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

    def config(self, params: Nothing, asker: Asker) -> object:
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

    # traces

    def trace(self, params: Traced, asker: Asker) -> object:
        """Begin a trace in place of the one that this operator has."""
        if sum(map(bool, (params.fd, params.user, params.topic))) != 1:
            raise Refused(ErrorCode.BAD_REQUEST, "trace one of fd, user and topic")
        self._end_trace(asker)
        trace = self._node.traces.begin(Target(params.fd, params.user, params.topic))
        scope = self._following[asker.fd] = trio.CancelScope()
        asker.start_task(partial(self._follow, asker, trace, scope))
        return {"trace": trace.id}

    def untrace(self, params: Nothing, asker: Asker) -> object:
        self._end_trace(asker)
        return {}

    def _end_trace(self, asker: Asker) -> None:
        scope = self._following.pop(asker.fd, None)
        if scope is not None:
            scope.cancel()

    async def _follow(self, asker: Asker, trace: Trace, scope: trio.CancelScope) -> None:
        """Tell an operator what a trace sees, as fast as he reads; what he has no time for is counted."""
        try:
            with scope:
                has_ended = False
                while not has_ended:
                    await trace.wait()
                    if not asker.is_behind:
                        entries = trace.buffer.take(TRACED_AT_ONCE)
                        has_ended = not entries
                        told = {"trace": trace.id, "entries": entries, "ended": has_ended}
                        asker.tell(written(told))
                    await trio.sleep(TRACE_PAUSE)
        finally:
            self._node.traces.end(trace)
            if self._following.get(asker.fd) is scope:
                del self._following[asker.fd]


def _in_words(value: object) -> str:
    """The value of a setting, as a file has it; "" for none."""
    if value is None or value in ([], {}):
        return ""
    return value if isinstance(value, str) else written(value).decode()


class _Acts:
    """The methods that change something. Each act is logged, with the operator who asked for it."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def kick(self, params: Kick, asker: Asker) -> object:
        self._check_here(params.fd)
        try:
            is_done = self._node.disconnect(params.fd, params.code, params.reason)
        except ValueError as error:
            raise Refused(ErrorCode.BAD_REQUEST, str(error)) from None
        self._node.router.meter.add(ENDING)
        self._note("kick", asker, target=params.fd, code=params.code, reason=params.reason)
        if not is_done:
            raise Refused(ErrorCode.UNKNOWN_CHANNEL, f"fd {params.fd} is closing already")
        return {}

    def unsubscribe(self, params: Unsubscribe, asker: Asker) -> object:
        self._check_here(params.fd)
        why = UnsubscribeCode.SERVER, "server unsubscribe"
        if not self._node.end_subscription(params.fd, params.topic, *why):
            text = f"fd {params.fd} is not subscribed to it"
            raise Refused(ErrorCode.UNKNOWN_CHANNEL, text)
        self._note("unsubscribe", asker, target=params.fd, topic=params.topic)
        return {}

    def push(self, params: Push, asker: Asker) -> object:
        self._check_here(params.fd)
        status = self._node.push(params.fd, Raw(_json(params.data)))
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

    def _check_here(self, fd: Fd) -> None:
        if fd not in self._node.services.connections:
            raise Refused(ErrorCode.UNKNOWN_CHANNEL, f"no connection has fd {fd}")

    def _note(self, act: str, asker: Asker, **about: Any) -> None:
        log.info("admin_act", act=act, fd=asker.fd, peer=asker.address, **about)


def _json(data: Raw) -> bytes:
    """A payload in one line. Raises `Refused` (107)."""
    try:
        return check_json(bytes(data))
    except BadCommand as error:
        raise Refused(ErrorCode.BAD_REQUEST, f"data: {error}") from None
