"""The desk: a session at the dashboard's door, where an operator logs in and asks for things (ADR 30).

It speaks the protocol of all clients, and shares nothing with them but that: its `connect` shows a key,
its `rpc` calls are those of the room `admin`, and every other command is refused. So the rights of an
operator are decided here, whatever the app's hooks, tokens and rules say of clients; and the key passes by no
hook.
"""

from collections.abc import Awaitable, Callable
from typing import ClassVar, Final

import attrs
import trio
from msgspec import Raw, Struct

from broker.access.operators import KeyRefused, Method, Operator, Role
from broker.access.proxies import was_passed_on
from broker.core.json_reader import BadJson, read
from broker.core.messages import Fd, Publication
from broker.core.session import PhaseEvent
from broker.errors import CloseCode, Disconnect, ErrorCode, Refused
from broker.protocols.centrifuge_json import CENTRIFUGE_JSON
from broker.protocols.codec import Codec, Result
from broker.protocols.commands import Command
from broker.protocols.json_text import to_json, written
from broker.session.commands import Handler
from broker.session.connect import NAME_LENGTH, ping_fields
from broker.session.connection import Connection
from broker.session.dispatch import Dispatcher
from broker.session.replies import Client
from broker.version import VERSION

TOPIC: Final = "$admin"
"""Publications under this name bring operators the news that they did not ask for. It is no topic: nobody
subscribes to it, and nothing that is published to a topic of this name comes here."""

BEHIND_BYTES: Final = 64 * 2**10
"""Bytes that may wait for an operator before he is told nothing more: about two minutes of statistics."""

_MAX_LOGIN: Final = 1024
"""Bytes of what is shown at login."""

_THIS_MACHINE: Final = "this machine"
"""Where somebody comes from whom no address tells apart: by loopback, or over a Unix socket."""

_UNNAMED_PROXY: Final = "a proxy"
"""Where all come from whom a proxy on this machine passes on and does not tell apart. Apart from
`_THIS_MACHINE`: who guesses from the internet does not lock out an operator who sits here."""


class _Shown(Struct):
    """The `data` of a `connect`."""

    key: str = ""


@attrs.frozen
class _Login(Handler):
    desk: "Desk"

    def act(self, client: Client, command: Command, answer: object) -> Result | None:
        request, services, peer = command.connect, client.services, client.peer
        assert request is not None
        connection = client.connection
        place = services.party_of("", connection.address, _THIS_MACHINE)
        if place == _THIS_MACHINE and was_passed_on(connection.headers):
            place = _UNNAMED_PROXY
        about: dict[str, object] = {"fd": peer.fd, "peer": connection.address}
        try:
            shown = _key_in(bytes(request.data))
            operator = services.operators.admit(shown, place, trio.current_time())
        except KeyRefused as refused:
            if place == _UNNAMED_PROXY:
                about["hint"] = "all who come through this proxy count as one: see trusted_proxies"
            services.log.warning("admin_key_refused", reason=str(refused), **about)
            raise Disconnect(CloseCode.INVALID_TOKEN, str(refused)) from None
        peer.codec = client.codec
        peer.transition(PhaseEvent.CONNECT)
        peer.app_name, peer.app_version = (
            request.name[:NAME_LENGTH],
            request.version[:NAME_LENGTH],
        )
        self.desk.open(operator)
        services.log.info("admin_login", role=operator.role.value, **about)
        result = {
            "client": str(peer.fd),
            "version": VERSION,
            **ping_fields(services.config),
            "data": Raw(to_json({"fd": peer.fd, "role": operator.role})),
            "subs": {TOPIC: {}},
        }
        client.reply(command.id, "connect", result)
        client.orders.send_waiting()
        return None


def _key_in(data: bytes) -> str:
    if len(data) > _MAX_LOGIN:
        return ""
    try:
        return read(data or b"{}", _Shown).key
    except BadJson:
        return ""


@attrs.frozen
class _Call(Handler):
    """A call of one of the methods of operators. The right is asked for before it, and once more in the
    step that acts or answers."""

    desk: "Desk"

    def must_ask(self, client: Client, command: Command) -> bool:
        method = self._find(client, command)
        return method is not None and method.look is not None

    async def ask(self, client: Client, command: Command) -> object:
        method = self._find(client, command)
        assert method is not None, "must_ask is false without it"
        assert method.look is not None, "the same"
        self.desk.check(method.role)
        return Raw(written(await method.look(_params(method, command), self.desk)))

    def act(self, client: Client, command: Command, answer: object) -> Result | None:
        method = self._find(client, command)
        if method is None:
            raise Refused(ErrorCode.METHOD_NOT_FOUND)
        self.desk.check(method.role)
        if method.act is None:
            return {"data": answer}
        result = method.act(_params(method, command), self.desk)
        return {"data": Raw(written(result))}

    def _find(self, client: Client, command: Command) -> Method | None:
        assert command.rpc is not None
        return client.services.admin.get(command.rpc.method)


def _params(method: Method, command: Command) -> Struct:
    assert command.rpc is not None
    try:
        return read(bytes(command.rpc.data) or b"{}", method.params)
    except BadJson as error:
        raise Refused(ErrorCode.BAD_REQUEST, f"{command.rpc.method}: {error}") from None


class _Closed(Handler):
    def act(self, client: Client, command: Command, answer: object) -> Result | None:
        raise Refused(ErrorCode.PERMISSION_DENIED, "this is the dashboard's door: rpc alone")


_CLOSED: Final = _Closed()


@attrs.define(eq=False)
class Desk(Dispatcher):
    """Carries out what an operator asks for; see the module."""

    operator: Operator | None = attrs.field(init=False, default=None)
    """None until he has logged in."""
    _doors: dict[str, Handler] = attrs.field(init=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        Dispatcher.__attrs_post_init__(self)
        self._doors = {"connect": _Login(self), "rpc": _Call(self)}

    @property
    def fd(self) -> Fd:
        return self.peer.fd

    @property
    def address(self) -> str:
        return self.connection.address

    @property
    def is_behind(self) -> bool:
        return self.peer.outbox.bytes > BEHIND_BYTES

    def start_task(self, work: Callable[[], Awaitable[object]]) -> None:
        self.peer.start_soon(work)

    def open(self, operator: Operator) -> None:
        """He has logged in."""
        self.operator = operator
        self.services.desks[self.fd] = self

    def check(self, role: Role) -> None:
        """Raise `Refused` (103) unless he may do what takes this role, by the keys of now."""
        operator = self.operator
        if operator is None or not self.services.operators.may(operator, role):
            raise Refused(ErrorCode.PERMISSION_DENIED)

    def check_login(self) -> None:
        connection = self.services.connections.get(self.fd)
        if (
            self.operator is not None
            and connection is not None
            and not self.services.operators.may(self.operator, Role.VIEW)
        ):
            connection.close(CloseCode.INVALID_TOKEN, "the key has changed")

    def tell(self, data: bytes) -> bool:
        if self.is_behind or not self.peer.is_established:
            return False
        self.peer.take(TOPIC, (Publication(TOPIC, data),), "latest")
        return True

    def let_go(self) -> None:
        if self.services.desks.get(self.fd) is self:
            del self.services.desks[self.fd]
        self._doors = {}
        Dispatcher.let_go(self)

    def _take_publishes(self, batch: object) -> int:
        return 0  # the way on which nobody is asked for rights

    def _handler(self, command: Command) -> tuple[Handler, str]:
        handler, method = Dispatcher._handler(self, command)
        return (self._doors.get(method, _CLOSED), method) if method else (handler, method)


class OperatorConnection(Connection):
    """A connection at the dashboard's door. The app is not told of it."""

    __slots__ = ()

    default_codec: ClassVar[Codec | None] = CENTRIFUGE_JSON
    dispatches: ClassVar[type[Dispatcher]] = Desk
    is_apps = False
