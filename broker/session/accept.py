"""An accepted stream, up to the connection that it becomes: the request head, who may connect, what is refused.

Rules:

1. A fault of one peer ends that peer: no exception that it causes leaves `serve_connection`.
2. The address is taken once, at accept: after a reset there is nobody to ask.
3. A proxy sends requests of many people on one connection. So a later request goes through the same checks
   and the same door as the first.
4. A place among the connections is taken when there is a connection, not before: see `admission`.
"""

from typing import Final
from urllib.parse import unquote

import attrs
import trio

from broker.access.origins import page_policy
from broker.access.proxies import ClientAddress
from broker.core.messages import Transport
from broker.core.work import FIELD, OPENING, USUAL_FIELDS
from broker.errors import HeadError
from broker.routing.turns import Share
from broker.session.admission import Guest
from broker.session.connection import Connection
from broker.session.counts import APP, GAVE_WAY, OTHER, REASONS, SHUTTING_DOWN, TLS
from broker.session.desk import OperatorConnection
from broker.session.ending import close_stream
from broker.session.handshake import UNASKED, RefusedByApp, Welcome, ask_app
from broker.session.services import ServedConnection, Services
from broker.transport.head import (
    CHUNK,
    Head,
    Request,
    below,
    check_upgrade,
    is_websocket_path,
    parse_head,
    read_head,
    refusal,
    route_of,
    whole_head,
)
from broker.transport.proxy_protocol import read_proxy_header
from broker.transport.sockets import (
    HTTP_WITHOUT_TLS,
    address_of,
    answer_and_linger,
    let_go,
    receive_now,
    socket_below,
    tls_fault,
)
from broker.transport.tls_carrier import shake_hands

STREAM: Final = "broker.session.accept.serve_connection"
"""The name of the task that serves a stream, which Trio would else make anew for each."""

HEALTH: Final = ("/healthz", "/readyz")
"""Routes that need no `path_prefix`: a watcher of a process asks that process."""


async def serve_connection(
    services: Services, stream: trio.abc.Stream, *, is_private: bool = False
) -> None:
    """Serve one accepted stream until it is closed. Raises nothing but `trio.Cancelled`.

    One that is private has come to the port of its own that the API has, and gets no more than that.
    """
    address = address_of(stream)
    guest = services.admission.welcome(stream)
    try:
        # Two steps, so that no frame holds on to the request head for as long as the peer stays.
        connection = await _receive(services, stream, address, guest, is_private)
        if connection is not None:
            await connection.run()
    except trio.ClosedResourceError:
        services.log.debug("lost", peer=address)
    except trio.BrokenResourceError:
        services.log.debug("lost", peer=address)
    except Exception:
        services.log.exception("connection_failed", peer=address)
    except BaseExceptionGroup as group:
        failures, ours = group.split(Exception)
        if failures is not None:
            services.log.error("connection_failed", peer=address, exc_info=failures)
        if ours is not None:  # Cancelled, KeyboardInterrupt
            raise ours from None
    finally:
        try:
            await close_stream(services, stream, at_once=guest.gave_way)  # noqa: ASYNC102 - shields itself
        finally:
            let_go(stream)
            services.admission.see_off(stream)


async def _receive(
    services: Services, stream: trio.abc.Stream, address: str, guest: Guest, is_private: bool
) -> ServedConnection | None:
    """Read request heads and see to each; a connection if one asks for it and may have it."""
    connection, answer = None, b""
    assert guest.scope is not None, "it is no connection yet"
    with guest.scope:
        try:
            connection = await _see_to_requests(services, stream, address, guest, is_private)
        except HeadError as error:
            services.counts.note_refused(_reason_of(services, error))
            peer = error.address or address
            services.log.info("refused", status=error.status, reason=error.reason, peer=peer)
            answer = refusal(error.status, error.reason, error.headers)
        except trio.BrokenResourceError as error:
            fault = tls_fault(error)
            if fault is None:
                raise
            services.counts.note_refused(TLS)
            services.log.info("tls_failed", reason=fault, peer=address)
            if fault == HTTP_WITHOUT_TLS and isinstance(stream, trio.SSLStream):
                stream = stream.transport_stream  # where such a peer can read it
                answer = refusal(
                    400, "this port speaks TLS: an address begins with https:// or wss://"
                )
        if answer:
            # Not where the error is still there: it holds the frames it came through, and so a body.
            services.admission.linger(guest)
            await answer_and_linger(stream, answer, services.config.close_seconds)
    if guest.gave_way and not answer:
        services.counts.note_refused(GAVE_WAY)
        services.log.info("refused", reason="no place left: gave way to a newcomer", peer=address)
    return connection


def _reason_of(services: Services, error: HeadError) -> str:
    if isinstance(error, RefusedByApp):
        return APP
    if error.status == 503 and services.draining:
        return SHUTTING_DOWN
    return REASONS.get(error.status, OTHER)


async def _see_to_requests(
    services: Services, stream: trio.abc.Stream, address: str, guest: Guest, is_private: bool
) -> ServedConnection | None:
    request = await _first_request(services, stream, address)
    services.admission.ask(guest)
    if request is None:
        return None
    while True:
        client = services.proxies.address_of(request.peer, request.head.header)
        try:
            outcome = await _route(services, stream, request, client, is_private)
        except HeadError as error:
            error.address = client
            raise
        if isinstance(outcome, Request):
            request = outcome
            continue
        if outcome is not None:
            if services.router.hub.sessions.fds_left <= 0:
                raise HeadError(503, "no number for a connection: the engine gives none now")
            services.admission.connect(guest)
        return outcome


async def _first_request(
    services: Services, stream: trio.abc.Stream, address: str
) -> Request | None:
    """The first request; None if nothing comes."""
    config = services.config
    both, begun = None, b""
    is_told = config.proxy_protocol and services.proxies.trusts(address)
    if not is_told:
        # In a storm the request is here by the time that its peer is accepted: no wait, and no timer.
        begun = receive_now(stream, min(CHUNK, config.head_bytes))
        both = whole_head(begun)
    if both is None:
        with trio.move_on_after(config.open_seconds) as opening:
            if is_told:
                carrier = socket_below(stream)
                told = None if carrier is None else await read_proxy_header(carrier)
                address = ClientAddress(told or address, address)
            if isinstance(stream, trio.SSLStream):
                turns = services.router.turns
                await shake_hands(stream, turns.enter, Share(turns=turns))
            both = await read_head(stream, config.head_bytes, begun)
        if opening.cancelled_caught:
            raise HeadError(408, f"no request within {config.open_seconds:g} s")
    if both is None:
        return None
    raw, behind = both
    fields = raw.count(b"\n")
    if fields > USUAL_FIELDS:
        await services.router.turns.pay(OPENING + fields * FIELD)
    else:
        await services.router.turns.enter(OPENING)
    return Request(parse_head(raw), behind, address)


async def _route(
    services: Services, stream: trio.abc.Stream, request: Request, address: str, is_private: bool
) -> ServedConnection | Request | None:
    """See to one request, the first of its connection or any later: the one place that tells by its
    head which door it came to."""
    prefix, head = services.config.path_prefix, request.head
    if prefix:
        within = below(head, prefix)
        if within is None and head.route not in HEALTH:
            raise HeadError(404, f"nothing is here; all is below {prefix}/")
        if head.path == prefix and not head.is_upgrade:  # or the page's own links would lead astray
            raise HeadError(308, f"it is at {prefix}/", (("Location", f"{prefix}/"),))
        head = within or head
    path = route_of(unquote(head.path))  # as the pages are told apart, in the end
    for_backends = path.startswith("/api/") or path == "/metrics"
    if is_private:
        if head.is_upgrade or (not for_backends and path not in HEALTH):
            raise HeadError(404, "this port has /api, /metrics, /healthz and /readyz")
    elif for_backends and services.config.api_listen:
        raise HeadError(404, "this is at api_listen")
    request = attrs.evolve(request, head=head, address=address)
    upgrades = head.is_upgrade
    if upgrades and services.operators.guards(head.route):
        check_upgrade(head)
        check_welcome(services, head)  # the app has no say about operators
        return OperatorConnection(services, stream, head, request.behind, address)
    if not (upgrades and is_websocket_path(head.path, services.config.websocket_paths)):
        return await services.serve_http(services, stream, request, address)
    check_upgrade(head)
    welcome = await ask_welcome(services, head, address, "websocket")
    return Connection(services, stream, head, request.behind, address, welcome=welcome)


async def ask_welcome(
    services: Services, head: Head, address: str, transport: Transport, held: int = 0
) -> Welcome:
    """Ask the app whether a peer that may connect by our own rules may do so by its, too; see `ask_app`.
    Raises `HeadError`."""
    check_welcome(services, head)
    welcome = await ask_app(services, head, address, transport, held)
    if welcome is not UNASKED:
        check_welcome(services, head)  # the broker may be stopping by now, or full
    return welcome


def check_welcome(services: Services, head: Head) -> None:
    """Raise `HeadError` if nobody may connect now, or not from where this request comes.

    Asked as early as can be. There may be no place left by the time the connection is made.
    """
    if services.draining:
        raise HeadError(503, "shutting down")
    check_page(services, head)
    services.admission.check_connections()
    if services.memory.is_exhausted:
        raise HeadError(503, "memory is short")


def check_page(services: Services, head: Head) -> None:
    """Raise `HeadError` if a request comes from a page that must not be served."""
    policy = page_policy(
        services.config,
        loopback_bind=services.loopback_bind,
        users_matter=services.tokens.enabled or bool(services.config.webhooks.connect_url),
    )
    reason = policy.refusal(head)
    if reason is not None:
        raise HeadError(403, reason)
