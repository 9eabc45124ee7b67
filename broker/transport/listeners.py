"""Listeners: TCP, TLS over TCP, or a Unix socket; opening them, and accepting what comes.

An address that the system refuses becomes a `ConfigError` that names it and the way out.
"""

import errno
import os
import socket
import ssl
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeAlias

import structlog
import trio

from broker.config.settings import Config
from broker.errors import ConfigError

AnyListener: TypeAlias = trio.abc.Listener[trio.abc.Stream]

log = structlog.get_logger("broker")

ACCEPT_PAUSE: Final = 0.1
"""Seconds without an accept after one that failed, as trio and nginx (0.5 s) have it: a file may be
free by then, and to try on at once would use up the processor."""

_NO_FILES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


async def accept_streams(
    listener: AnyListener,
    take: Callable[[trio.abc.Stream], None],
    make_room: Callable[[], None],
) -> None:
    """Hand each stream that a listener accepts to `take`, until cancelled; then it is closed.

    An accept that fails ends nothing: it is logged, `make_room` is called if files or memory were
    missing, and the next one comes `ACCEPT_PAUSE` later. Raises `trio.ClosedResourceError` if
    somebody else closes the listener.
    """
    async with listener:
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:
                reason = f"{errno.errorcode.get(error.errno or 0, 'error')}: {error.strerror}"
                detail = "peers wait in the backlog; accepting again soon"
                if error.errno in _NO_FILES:
                    make_room()
                    detail = "raise the limit on open files (`ulimit -n`), or set max_connections"
                log.warning("not_accepted", reason=reason, detail=detail)
                await trio.sleep(ACCEPT_PAUSE)
            else:
                take(stream)


async def open_listeners(config: Config) -> list[AnyListener]:
    """Listen as the config says. The caller owns the listeners. Raises `ConfigError`."""
    context = None
    if config.tls_cert is not None:  # it reads files, which a loop that serves must not wait for
        context = await trio.to_thread.run_sync(_tls_context, config, abandon_on_cancel=True)
    try:
        if config.unix is not None:
            plain = [await _open_unix(config.unix, config.backlog)]
        else:
            plain = await _open_tcp(config.host, config.port, config.backlog)
    except UnicodeError:  # of the IDNA codec, for what cannot be a host name
        raise ConfigError(_no_such_host(config)) from None
    except OSError as error:
        raise ConfigError(_explain(config, error)) from None
    for listener in plain:
        # Behind our own heartbeat: the system gives up on a peer that stopped acknowledging.
        give_up = int(min((config.ping_seconds + config.pong_seconds) * 1000, 2**31 - 1))
        with suppress(OSError, AttributeError):  # Unix sockets; systems other than Linux
            listener.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, give_up)
    if context is None:
        return list(plain)
    return [trio.SSLListener(listener, context, https_compatible=True) for listener in plain]


async def _open_tcp(host: str, port: int, backlog: int) -> list[trio.SocketListener]:
    listeners = await trio.open_tcp_listeners(port, host=host or None, backlog=backlog)
    if port == 0 and len(listeners) > 1:
        # The system chose a port for each family: have one for all.
        first, *others = listeners
        listeners = [first]
        for other in others:
            address = other.socket.getsockname()[0]
            await other.aclose()
            chosen = first.socket.getsockname()[1]
            with suppress(OSError):
                listeners += await trio.open_tcp_listeners(chosen, host=address, backlog=backlog)
    return listeners


async def _open_unix(path: Path, backlog: int) -> trio.SocketListener:
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        await _remove_stale(path)
        await listener.bind(os.fspath(path))
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return trio.SocketListener(listener)


async def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens on any more; raise EADDRINUSE if somebody does."""
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise FileExistsError(errno.EEXIST, "exists and is not a socket")
    except FileNotFoundError:
        return
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            await probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
        else:
            raise OSError(errno.EADDRINUSE, "in use")


def _tls_context(config: Config) -> ssl.SSLContext | None:
    if config.tls_cert is None or config.tls_key is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    for path in (config.tls_cert, config.tls_key):
        if not os.access(path, os.R_OK):
            raise ConfigError(f"cannot read {path}: give --tls-cert and --tls-key readable files")
    try:
        # Without a password an encrypted key asks for it on the terminal, and hangs a service.
        context.load_cert_chain(config.tls_cert, config.tls_key, password="")
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"{config.tls_cert} and {config.tls_key} are not a PEM certificate and its unencrypted "
            f"key: {error.strerror or error}"
        ) from None
    return context


def _explain(config: Config, error: OSError) -> str:
    where = f"unix socket {config.unix}" if config.unix else f"port {config.port} on {config.host}"
    option = "--unix" if config.unix else "--port"
    if error.errno == errno.EADDRINUSE:
        return (
            f"{where} is already in use: stop what listens there, or choose another with {option}"
        )
    if error.errno == errno.EACCES:
        return f"{where} is not allowed for this user: choose another with {option}"
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return _no_such_host(config)
    return f"cannot listen on {where}: {error.strerror or error}"


def _no_such_host(config: Config) -> str:
    return f"cannot listen on {config.host}: not an address of this machine; see --host"


def describe(listeners: Sequence[AnyListener]) -> list[str]:
    """Where these listen, as URLs: `ws://127.0.0.1:9501`, `wss://…`, `unix:/run/broker.sock`."""
    return [_describe(listener) for listener in listeners]


def _describe(listener: AnyListener) -> str:
    scheme = "ws"
    if isinstance(listener, trio.SSLListener):
        scheme = "wss"
        listener = listener.transport_listener
    if not isinstance(listener, trio.SocketListener):
        return "memory:"
    name = listener.socket.getsockname()
    if not isinstance(name, tuple):
        return f"unix:{name}"
    host, port = name[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
