"""`python -m broker serve`: settings from the command line, signals, reload, exit status."""

import gc
import importlib
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

import attrs
import click
import structlog
import trio

from broker import logs
from broker.cli.errors import (
    Mistake,
    ending_cause,
    exit_status,
    nearest_command,
    origin_of,
    single_cause,
)
from broker.cli.seat import Given, Seat, as_worker, take_given
from broker.cli.supervisor import supervise
from broker.cli.systemd import Notifier, take_listen_fds
from broker.config.loading import Loaded, load_with_sources
from broker.config.settings import Config, LogFormat, LogLevel, TopicRules
from broker.core.scopes import name_scope
from broker.core.session import SlowRule
from broker.errors import ConfigError
from broker.process import signals
from broker.process.signals import CUT_SHORT
from broker.transport.listeners import (
    AnyListener,
    listening_on,
    read_certificate,
    secure,
    take_sockets,
)
from broker.transport.places import open_api_sockets

if TYPE_CHECKING:
    from broker.app import Broker

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker")

RELOAD_SECONDS: Final = 5.0
"""How long a config file may take to be read, as from a mount that hangs, or a FIFO. A disk takes
milliseconds, a network mount a second; a person who reloads should hear of it while he
looks."""

_PATH: Final = click.Path(path_type=Path)

_TOPIC_RULES: Final = {field.name for field in attrs.fields(TopicRules)}


# `Any`: what click takes for an option goes on to it as it is.
def _setting(flag: str, words: str, *, field: str, **settings: Any) -> Callable[[Any], Any]:
    """An option that overrides one field of `Config`, or of its topic rules."""
    default = getattr(TopicRules() if field in _TOPIC_RULES else Config(), field)
    if default is None or default == ():
        shown = ""
    elif isinstance(default, float):
        shown = f"  [default: {default:g}]"
    else:
        shown = f"  [default: {default}]"
    return click.option(flag, field, default=None, help=words + shown, **settings)


# Settings that are changed often enough to be typed. Every field can be set by file and environment.
_SETTINGS: Final = (
    _setting(
        "--host",
        "Address or name to listen on; 0.0.0.0 is IPv4 alone, :: IPv6 alone, an empty one both.",
        field="host",
    ),
    _setting("--port", "TCP port; 0 lets the system choose.", field="port", type=int),
    _setting(
        "--api-listen", "A place of its own for the API, metrics and health: localhost:9502.",
        field="api_listen",
    ),
    _setting("--unix", "Listen on this Unix socket instead of TCP.", field="unix", type=_PATH),
    _setting(
        "--unix-mode", "Who may connect to the Unix socket, as for chmod: 0660.", field="unix_mode"
    ),
    _setting("--unix-group", "The group of the Unix socket, such as www-data.", field="unix_group"),
    _setting(
        "--workers", "Processes that serve, on one port, joined by Redis.",
        field="workers", type=int,
    ),
    _setting("--tls-cert", "PEM file: certificate and chain.", field="tls_cert", type=_PATH),
    _setting("--tls-key", "PEM file: the certificate's key.", field="tls_key", type=_PATH),
    _setting(
        "--allowed-origin",
        'Web origin that may connect, such as https://example.com; "*" is all. May be repeated.',
        field="allowed_origins", multiple=True,
    ),
    _setting(
        "--engine",
        "What keeps history: memory, sqlite:PATH for a file that survives a restart, or redis://HOST to share it with other nodes.",
        field="engine",
    ),
    _setting(
        "--max-connections",
        "Connections at once; by default as many as the limit on open files allows.",
        field="max_connections", type=int,
    ),
    _setting(
        "--max-message-bytes", "Largest message a client may send, in bytes.",
        field="max_message_bytes", type=int,
    ),
    _setting(
        "--history-size", "Publications kept per topic; 0 keeps none.",
        field="history_size", type=int,
    ),
    _setting(
        "--history-ttl", "Seconds a publication is kept.", field="history_ttl", type=float
    ),
    _setting(
        "--slow-consumer", "What to do with a subscriber that cannot follow.",
        field="slow_consumer", type=click.Choice(get_args(SlowRule)),
    ),
    _setting(
        "--ping-seconds", "Silence after which a client is asked whether it is there.",
        field="ping_seconds", type=float,
    ),
    _setting(
        "--drain-seconds", "Longest time a stop waits for messages to be delivered.",
        field="drain_seconds", type=float,
    ),
    _setting(
        "--log-format",
        "console for people, json for machines (both to stderr), article for the tutorial's "
        "lines on stdout.",
        field="log_format", type=click.Choice(get_args(LogFormat)),
    ),
    _setting(
        "--log-level", "debug shows every message.",
        field="log_level", type=click.Choice(get_args(LogLevel)),
    ),
)  # fmt: skip


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_SETTINGS):
        command = option(command)
    return command


class _Serve(click.Command):
    """Takes one argument; says of two that the first is no app, if it is none."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption:
            raise
        except click.UsageError:
            app = self.make_parser(ctx).parse_args(args=given)[0].get("app")
            if isinstance(app, str) and ":" not in app:
                raise Mistake(nearest_command(app, ctx)) from None
            raise


@click.command(cls=_Serve, short_help="Run the broker; the default command.")
@click.argument("app", metavar="[MODULE:ATTR]", required=False)
@click.option(
    "--config", "file", type=_PATH,
    help="TOML file with settings. Environment variables (BROKER_PORT=9000) override it, "
    "options override both.",
)  # fmt: skip
@_with_settings
def serve(app: str | None, file: Path | None, **options: object) -> None:
    """Run the broker until SIGINT (Ctrl-C) or SIGTERM.

    MODULE:ATTR is where your own Broker is, such as chat.server:broker; MODULE is looked for in
    the current directory as well. Its own settings are the defaults of file, environment and
    options. Without it the built-in app answers every plain message.

    The first signal drains: clients are told, what is queued is delivered, then the exit status
    is 0. The second signal ends it at once, with status 1. SIGHUP reads the settings, the TLS
    certificate and the keys of tokens again, and nobody is disconnected.
    """
    with signals.process.installed():
        _serve_with(app, file, options)


def _serve_with(app: str | None, file: Path | None, options: Mapping[str, object]) -> None:
    signals.process.begin_serving()
    signals.process.before_exit = logs.flush
    given, inherited, notifier = take_given(), take_listen_fds(), Notifier.of()
    overrides: dict[str, Any] = {"topics": {}}
    for key, value in options.items():
        if value is not None and value != ():
            (overrides["topics"] if key in _TOPIC_RULES else overrides)[key] = value
    broker = None if app is None else _find(app)
    base = None if broker is None else broker.config

    def read() -> Loaded:
        loaded = load_with_sources(file, overrides, base=base)
        if given is not None:
            return attrs.evolve(loaded, config=as_worker(given, loaded.config))
        return attrs.evolve(loaded, config=listening_on(loaded.config, inherited))

    try:
        loaded = read()
    except ConfigError as error:
        raise Mistake(str(error)) from error
    config = loaded.config
    worker = None if given is None else given.number
    logs.configure(config.log_format, config.log_level, worker=worker)
    logs.capture_strays()
    if given is None:
        for unknown in loaded.unknown:
            log.warning("unknown_setting", detail=str(unknown))
    if given is None and config.workers > 1:
        places = [] if broker is None else broker.places[1:]
        status = _run(partial(supervise, config, places, inherited, notifier))
        if status:
            sys.exit(status)
        return
    if broker is None:
        from broker.cli import default_app as builtin

        broker = builtin.create(config)
    broker.config, broker.config_sources = config, loaded.sources
    # The process is ours, and its objects stay: with Python's defaults the collector walks all
    # connections again and again while they come in (3,000 connects: 1,700/s, with these 3,100/s).
    # And it is never long at it: of new objects 20,000 or so are walked at once, in 4 ms (`SWEEP`), and all of
    # them seldom: 500,000 in 60.
    gc.freeze()
    gc.set_threshold(5_000, 2, 1_700)
    broker.collect = partial(gc.collect, 1)
    broker.worker = worker
    source = _Source("the settings" if file is None else str(file), read)
    if given is None:
        status = _run(partial(_serve_alone, broker, source, inherited, notifier))
    else:
        status = _run(partial(_serve_as_worker, broker, source, given))
    if status:
        sys.exit(status)


def _run(main: Callable[[], Awaitable[int]]) -> int:
    """Serve until the end; return the exit status. Raises `Mistake`, and what is a bug."""
    try:
        return trio.run(main)
    except BaseException as error:  # around `trio.run` nothing is cancelled
        ending = ending_cause(error)
        if ending is not None:
            log.critical(
                "ended",
                by=repr(ending)[:200],  # a repr may hold what a peer sent, a megabyte of it
                at=origin_of(ending),
                detail="raised in the app's own code; to end the broker, call its stop()",
            )
            return exit_status(ending)  # noqa: ASYNC104
        cause = single_cause(error)
        if isinstance(cause, ConfigError):
            raise Mistake(str(cause)) from error  # noqa: ASYNC104
        raise


@attrs.frozen
class _Source:
    """Where the config comes from, and what reads it anew."""

    name: str
    read: Callable[[], Loaded]


async def _serve_alone(
    broker: "Broker", source: _Source, inherited: Sequence[int], notifier: Notifier
) -> int:
    """Serve in this one process; the exit status. systemd, if it is there, is told how it goes."""
    listeners, api_listeners = None, list[AnyListener]()
    if inherited:
        broker.tls_context = await read_certificate(broker.config)
        listeners = secure(take_sockets(inherited), broker.tls_context)
        api_listeners += await open_api_sockets(broker.config)
    async with trio.open_nursery() as watch:

        def begin(addresses: list[str]) -> None:
            notifier.ready(f"serves on {', '.join(addresses)}")
            if notifier.watchdog_seconds is not None:
                watch.start_soon(notifier.keep_alive, notifier.watchdog_seconds / 2)

        status = await _serve(broker, source, listeners, begin, notifier, api_listeners)
        watch.cancel_scope.cancel()
    return status


async def _serve_as_worker(broker: "Broker", source: _Source, given: Given) -> int:
    """Serve as one of several workers; the exit status."""
    seat = Seat.open(given)
    broker.tls_context = await read_certificate(broker.config)
    listeners, gate = seat.open_listeners(broker.tls_context)
    async with seat.leash, trio.open_nursery() as watch:

        async def see_to_an_end() -> None:
            await seat.wait_abandoned()
            log.error("abandoned", detail="the supervisor has gone: no more connections")
            broker.stop()

        def begin(addresses: list[str]) -> None:
            gate.count = partial(len, broker.node.services.admission)
            watch.start_soon(gate.beat, lambda: broker.draining)
            watch.start_soon(seat.join, broker.node)
            watch.start_soon(seat.tell_ready, addresses)
            watch.start_soon(see_to_an_end)

        api_listeners = secure(take_sockets(given.api_sockets), None)
        status = await _serve(broker, source, listeners, begin, Notifier(), api_listeners)
        watch.cancel_scope.cancel()
    return status


async def _serve(
    broker: "Broker",
    source: _Source,
    listeners: list[AnyListener] | None,
    begin: Callable[[list[str]], None],
    notifier: Notifier,
    api_listeners: list[AnyListener] | None = None,
) -> int:
    """Serve until a signal; 0 if everybody was told, `CUT_SHORT` if a second one cut it short.

    Until the broker serves nobody is connected, and a signal ends the process where it stands. `begin` is
    called with the addresses in the step in which it serves.
    """
    from broker.app import serve_until_signal

    hang_up, hung_up = trio.open_memory_channel[None](1)  # two in a row are one: the file is read

    def reload() -> None:
        with suppress(trio.WouldBlock):
            hang_up.send_nowait(None)

    with hang_up, hung_up:
        async with trio.open_nursery() as watch:
            name_scope(watch, "watch")
            watch.start_soon(_reload_on_signal, broker, source, hung_up, notifier)
            was_whole = await serve_until_signal(
                broker,
                reload,
                listeners=listeners,
                api_listeners=api_listeners,
                on_serving=begin,
                on_stop=notifier.stopping,
            )
            watch.cancel_scope.cancel()
    return 0 if was_whole else CUT_SHORT


async def _reload_on_signal(
    broker: "Broker",
    source: _Source,
    hang_ups: trio.MemoryReceiveChannel[None],
    notifier: Notifier,
) -> None:
    """Read files in a thread, which is left to itself if the file system keeps it.

    One at a time: a second thread would wait for the same file.
    """
    threads = trio.CapacityLimiter(1)
    kept = "the broker goes on with the old config"
    async for _ in hang_ups:
        notifier.reloading()
        try:
            with trio.fail_after(RELOAD_SECONDS):
                loaded = await trio.to_thread.run_sync(
                    source.read, abandon_on_cancel=True, limiter=threads
                )
                await broker.reload_files(loaded.config, loaded.sources)
        except ConfigError as error:
            log.error("reload_failed", detail=f"{error}; {kept}")
        except trio.TooSlowError:
            waited = f"not read within {RELOAD_SECONDS:g} s"
            log.error("reload_failed", detail=f"{source.name}: {waited}; {kept}")
        except Exception:  # nobody who is connected has to pay for it
            log.exception("reload_failed", detail=f"{source.name}: {kept}")
        notifier.ready()


def _find(app: str) -> "Broker":
    """Import the user's `Broker`; a mistake in `app` itself is one line, one inside is theirs."""
    from broker.app import Broker

    module, colon, attribute = app.partition(":")
    if not (module and colon and attribute):
        raise Mistake(nearest_command(app, click.get_current_context()))
    # As `python -m` does; the installed script would not find what lies in front of it.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: object = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and lacks something itself
        _check_not_hidden(app, module)
        raise Mistake(
            f"{app!r}: there is no module {error.name!r} here or among the installed ones; run "
            "it where the module lies, or set PYTHONPATH"
        ) from error
    for name in attribute.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            _check_not_hidden(app, module)
            raise Mistake(f"{app!r}: module {module!r} has no {attribute!r}") from error
    if not isinstance(found, Broker):
        _check_not_hidden(app, module)
        raise Mistake(f"{app!r} is a {type(found).__name__}: expected a broker.Broker")
    return found


def _check_not_hidden(app: str, module: str) -> None:
    """Raise `Mistake` if the module that was meant lies here, and another of its name was found."""
    top = module.partition(".")[0]
    loaded = getattr(sys.modules.get(top), "__file__", None)
    for path in (Path(f"{top}.py"), Path(top, "__init__.py")):
        if path.exists() and (loaded is None or not path.samefile(loaded)):
            shown = path if path.name != "__init__.py" else f"{top}/"
            whose = "this package" if top == "broker" else f"the module at {loaded}"
            raise Mistake(f"{app!r}: {shown} has the name of {whose}, which hides it; rename it")
