"""Listeners: TCP, TLS over TCP, or a Unix socket; opening them, and accepting what comes.

An address that the system refuses becomes a `ConfigError` that names it and the way out.
"""

import errno
import os
import shutil
import socket
import ssl
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

import attrs
import structlog
import trio

from broker.config.settings import Config, is_loopback
from broker.errors import ConfigError
from broker.transport.gate import GatedListener

AnyListener: TypeAlias = trio.abc.Listener[trio.abc.Stream]

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker")

ACCEPT_PAUSE: Final = 0.1
"""Seconds without an accept after one that failed, as trio and nginx (0.5 s) have it: a file may be
free by then, and to try on at once would use up the processor."""

AT_ONCE: Final = 16
"""Streams that are accepted in one step where so many wait: in a storm a turn of the event loop for each costs
as much as to accept it. So many take half a millisecond."""

_NO_FILES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


async def accept_streams(
    listener: AnyListener,
    take: Callable[[trio.abc.Stream], None],
    make_room: Callable[[], None],
    has_room: Callable[[int], bool] = lambda streams: True,
) -> None:
    """Hand each stream that a listener accepts to `take`, until cancelled; then it is closed.

    Up to `AT_ONCE` that wait come in one step where `has_room` says so of that many, else one.
    An accept that fails ends nothing: it is logged, `make_room` is called if files or memory were
    missing, and the next one comes `ACCEPT_PAUSE` later. Raises `trio.ClosedResourceError` if
    somebody else closes the listener.
    """
    async with listener:
        with _nowait(listener) as accept_nowait:
            while True:
                try:
                    stream = await listener.accept()
                except OSError as error:
                    reason = f"{errno.errorcode.get(error.errno or 0, 'error')}: {error.strerror}"
                    detail = "peers wait in the backlog; accepting again soon"
                    if error.errno in _NO_FILES:
                        make_room()
                        detail = (
                            "raise the limit on open files (`ulimit -n`), or set max_connections"
                        )
                    log.warning("not_accepted", reason=reason, detail=detail)
                    await trio.sleep(ACCEPT_PAUSE)
                else:
                    take(stream)
                    if accept_nowait is not None and has_room(AT_ONCE):
                        _take_waiting(accept_nowait, take)


@contextmanager
def _nowait(listener: AnyListener) -> Iterator[Callable[[], trio.abc.Stream] | None]:
    """Accepts one that waits with a listener already, without a checkpoint; raises `OSError` where nobody does.
    None for a listener on no socket."""
    if isinstance(listener, TlsListener):
        with _nowait(listener.transport_listener) as accept_nowait:
            yield accept_nowait and (lambda: listener.over(accept_nowait()))
    elif isinstance(listener, GatedListener):
        yield listener.accept_nowait
    elif isinstance(listener, trio.SocketListener):
        bare = socket.socket(fileno=listener.socket.fileno())
        bare.setblocking(False)
        try:
            yield lambda: trio.SocketStream(trio.socket.from_stdlib_socket(bare.accept()[0]))
        finally:
            bare.detach()  # it stays the listener's
    else:
        yield None


def _take_waiting(
    accept_nowait: Callable[[], trio.abc.Stream], take: Callable[[trio.abc.Stream], None]
) -> None:
    """Hand on those who wait already. The next accept raises whatever is wrong."""
    with suppress(OSError):
        for _ in range(AT_ONCE - 1):
            take(accept_nowait())


@attrs.define(eq=False)
class TlsListener(trio.abc.Listener[trio.abc.Stream]):
    """TLS over what another listener accepts. The handshake is for whoever reads the stream first."""

    transport_listener: AnyListener
    context: ssl.SSLContext

    async def accept(self) -> trio.abc.Stream:
        return self.over(await self.transport_listener.accept())

    def over(self, stream: trio.abc.Stream) -> trio.abc.Stream:
        """TLS over a stream that was accepted."""
        return trio.SSLStream(stream, self.context, server_side=True, https_compatible=True)

    async def aclose(self) -> None:
        await self.transport_listener.aclose()


async def open_listeners(
    config: Config, context: ssl.SSLContext | None = None
) -> list[AnyListener]:
    """Listen as the config says, over TLS by a context that was read before, or is read now.

    The caller owns the listeners. Raises `ConfigError`.
    """
    context = context or await read_certificate(config)
    return secure(await open_sockets(config), context)


async def open_sockets(config: Config) -> list[trio.SocketListener]:
    """Listen as the config says, but for TLS. The caller owns them. Raises `ConfigError`.

    A name may have several addresses, as `localhost` has. Those that this machine has not, such as
    `::1` where IPv6 is off, are left out with a line in the log, unless there is no other.
    """
    try:
        if config.unix is not None:
            sockets = [
                await open_unix(config.unix, config.backlog, partial(_set_owners, config=config))
            ]
        else:
            sockets = await _open_tcp(config.host, config.port, config.backlog)
    except UnicodeError:  # of the IDNA codec, for what cannot be a host name
        raise ConfigError(_no_such_host(config)) from None
    except OSError as error:
        raise ConfigError(_explain(config, error)) from None
    for listener in sockets:
        # Behind our own heartbeat: the system gives up on a peer that stopped acknowledging.
        give_up = int(min((config.ping_seconds + config.pong_seconds) * 1000, 2**31 - 1))
        with suppress(OSError, AttributeError):  # Unix sockets; systems other than Linux
            listener.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, give_up)
    return sockets


def take_sockets(filenos: Iterable[int]) -> list[trio.SocketListener]:
    """Listen on sockets that another process has opened, which are ours from now on.

    Raises `ConfigError` for a number that is no listening socket of streams.
    """
    taken = []
    for number in filenos:
        try:
            sock = socket.socket(fileno=number)
            if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                sock.close()
                raise OSError(errno.EINVAL, "not a listening socket")
            sock.set_inheritable(False)
            taken.append(trio.SocketListener(trio.socket.from_stdlib_socket(sock)))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"file {number}, given to listen on: {reason}") from None
    return taken


def listening_on(config: Config, filenos: Iterable[int]) -> Config:
    """The config with the place of sockets that another process has opened: of the first that other
    machines can reach, else of the first."""
    places = []
    for number in filenos:
        with suppress(OSError), socket.socket(fileno=os.dup(number)) as sock:
            places.append(sock.getsockname())
    for name in sorted(places, key=_is_local)[:1]:
        if isinstance(name, tuple):
            return attrs.evolve(config, host=name[0], port=name[1], unix=None)
        return attrs.evolve(config, unix=Path(os.fsdecode(name)))
    return config


def _is_local(name: object) -> bool:
    return not isinstance(name, tuple) or is_loopback(name[0])


def secure(
    plain: Sequence[trio.abc.Listener[trio.SocketStream]], context: ssl.SSLContext | None
) -> list[AnyListener]:
    """The same listeners, with TLS where there is a certificate."""
    if context is None:
        return list(plain)
    return [TlsListener(listener, context) for listener in plain]


_NOT_HERE: Final = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})


async def _open_tcp(host: str, port: int, backlog: int) -> list[trio.SocketListener]:
    """A listener for each address of a name, all on one port. Raises `OSError`, with nothing open."""
    found = await trio.socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    listeners: list[trio.SocketListener] = []
    absent: list[tuple[str, OSError]] = []
    try:
        for family, address in dict.fromkeys((family, where) for family, _, _, _, where in found):
            chosen = listeners[0].socket.getsockname()[1] if listeners else port
            try:
                where = (address[0], chosen, *address[2:])
                listeners.append(await _listen(family, where, backlog))
            except OSError as error:
                # Of a port that the system chose, the other family may have been taken by another.
                if error.errno not in _NOT_HERE and not (listeners and port == 0):
                    raise
                absent.append((str(address[0]), error))
        if not listeners:
            raise absent[0][1]
    except BaseException:
        for listener in listeners:
            listener.socket.close()
        raise
    for name, why in absent:
        log.info("address_left_out", address=name, reason=why.strerror, detail="others are open")
    return listeners


async def _listen(family: int, address: tuple[str | int, ...], backlog: int) -> trio.SocketListener:
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # `::` is IPv6 alone, as IPv4 has a socket of its own where it is asked for.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        await sock.bind(address)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return trio.SocketListener(sock)


async def open_unix(
    path: Path, backlog: int = 128, prepare: Callable[[Path], None] = lambda _: None
) -> trio.SocketListener:
    """Listen on a Unix socket; one that nobody listens on any more is replaced. Raises `OSError`.

    `prepare` is called with it before anybody can connect.
    """
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        await _remove_stale(path)
        await listener.bind(os.fspath(path))
        prepare(path)
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return trio.SocketListener(listener)


def _set_owners(path: Path, config: Config) -> None:
    """Give a new socket to the group, and the mode, of the settings. Raises `ConfigError`."""
    if config.unix_group is not None:
        try:
            shutil.chown(path, group=config.unix_group)
        except LookupError:
            raise ConfigError(
                f"unix_group is {config.unix_group!r}: there is no such group"
            ) from None
        except PermissionError:
            raise ConfigError(
                f"unix_group is {config.unix_group!r}: only a member of that group may give it the "
                f"socket {path} (systemd: SupplementaryGroups={config.unix_group})"
            ) from None
    mode = config.unix_mode or ("0660" if config.unix_group is not None else None)
    if mode is not None:
        path.chmod(int(mode, 8))


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


async def read_certificate(
    config: Config, into: ssl.SSLContext | None = None
) -> ssl.SSLContext | None:
    """The certificate of the settings, read in a thread; None without one. Raises `ConfigError`.

    With `into`, a context that listeners have, all who come from then on are shown it.
    """
    if config.tls_cert is None or config.tls_key is None:
        return None
    # Files, which a loop that serves must not wait for.
    context = await trio.to_thread.run_sync(_tls_context, config, abandon_on_cancel=True)
    if into is None:
        return context
    # It has been read: so it can be, and does not leave a certificate with another's key.
    into.load_cert_chain(config.tls_cert, config.tls_key, password="")
    return into


def _tls_context(config: Config) -> ssl.SSLContext:
    assert config.tls_cert is not None
    assert config.tls_key is not None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    # A signature for each time that a peer asks. OpenSSL 3 grants none by itself, 1.1.1 does.
    context.options |= ssl.OP_NO_RENEGOTIATION
    for path in (config.tls_cert, config.tls_key):
        if not os.access(path, os.R_OK):
            raise ConfigError(f"cannot read {path}: {_why_unreadable(path)}")
    try:
        # Without a password an encrypted key asks for it on the terminal, and hangs a service.
        context.load_cert_chain(config.tls_cert, config.tls_key, password="")
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"{config.tls_cert} and {config.tls_key} are not a PEM certificate and its unencrypted "
            f"key: {error.strerror or error}"
        ) from None
    return context


def _why_unreadable(path: Path) -> str:
    if not path.exists():
        return "there is no such file that this user can see; tls_cert and tls_key name it"
    return "this user may not; let its group, as the how-to page on TLS has it"


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
    if isinstance(listener, TlsListener | trio.SSLListener):
        scheme = "wss"
        listener = listener.transport_listener
    if not isinstance(listener, trio.SocketListener | GatedListener):
        return "memory:"
    name = listener.socket.getsockname()
    if not isinstance(name, tuple):
        return f"unix:{name}"
    host, port = name[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
