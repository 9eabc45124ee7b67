"""`python -m broker serve`: settings from the command line, signals, reload, exit status."""

import gc
import importlib
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

import attrs
import click
import structlog
import trio

from broker import logs, signals
from broker.cli.errors import (
    Mistake,
    ending_cause,
    exit_status,
    nearest_command,
    origin_of,
    single_cause,
)
from broker.config.loading import Loaded, load_with_sources
from broker.config.settings import Config, LogFormat, LogLevel, TopicRules
from broker.core.session import SlowRule
from broker.errors import ConfigError
from broker.signals import CUT_SHORT

if TYPE_CHECKING:
    from broker.app import Broker

log = structlog.get_logger("broker")

RELOAD_SECONDS: Final = 5.0
"""How long a config file may take to be read, as from a mount that hangs, or a FIFO. A disk takes
milliseconds, a network mount a second; a person who reloads should hear of it while he
looks."""

_PATH: Final = click.Path(path_type=Path)

_TOPIC_RULES: Final = {field.name for field in attrs.fields(TopicRules)}


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
    _setting("--host", "Address or name to listen on.", field="host"),
    _setting("--port", "TCP port; 0 lets the system choose.", field="port", type=int),
    _setting("--unix", "Listen on this Unix socket instead of TCP.", field="unix", type=_PATH),
    _setting("--tls-cert", "PEM file: certificate and chain.", field="tls_cert", type=_PATH),
    _setting("--tls-key", "PEM file: the certificate's key.", field="tls_key", type=_PATH),
    _setting(
        "--allowed-origin",
        'Web origin that may connect, such as https://example.com; "*" is all. May be repeated.',
        field="allowed_origins", multiple=True,
    ),
    _setting(
        "--engine",
        "What keeps history: memory, or sqlite:PATH for a file that survives a restart.",
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
    is 0. The second signal ends it at once, with status 1. With --config, SIGHUP reads the file
    again and nobody is disconnected.
    """
    with signals.process.installed():
        _serve_with(app, file, options)


def _serve_with(app: str | None, file: Path | None, options: Mapping[str, object]) -> None:
    signals.process.begin_serving(reloads=file is not None)
    signals.process.before_exit = logs.flush
    overrides: dict[str, Any] = {"topics": {}}
    for key, value in options.items():
        if value is not None and value != ():
            (overrides["topics"] if key in _TOPIC_RULES else overrides)[key] = value
    broker = None if app is None else _find(app)
    base = None if broker is None else broker.config
    try:
        loaded = load_with_sources(file, overrides, base=base)
    except ConfigError as error:
        raise Mistake(str(error)) from error
    config = loaded.config
    logs.configure(config.log_format, config.log_level)
    logs.capture_strays()
    for unknown in loaded.unknown:
        log.warning("unknown_setting", detail=str(unknown))
    if broker is None:
        from broker.cli import default_app as builtin

        broker = builtin.create(config)
    broker.config, broker.config_sources = config, loaded.sources
    # The process is ours, and its objects stay: with Python's defaults the collector walks all
    # connections again and again while they come in (3,000 connects: 1,700/s, with these 3,100/s).
    # And it is never long at it: 50,000 objects that stay are walked in 10 ms, 500,000 in 60.
    gc.freeze()
    gc.set_threshold(10_000, 5, 500)
    source = (
        None
        if file is None
        else _Source(file, partial(load_with_sources, file, overrides, base=base))
    )
    status = _run(broker, source)
    if status:
        sys.exit(status)


def _run(broker: "Broker", source: "_Source | None") -> int:
    """Serve until the end; return the exit status. Raises `Mistake`, and what is a bug."""
    try:
        return 0 if trio.run(_serve, broker, source) else CUT_SHORT
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

    file: Path
    read: Callable[[], Loaded]


async def _serve(broker: "Broker", source: _Source | None) -> bool:
    """Serve until a signal; True if everybody was told, False if a second one cut it short.

    Until the broker serves nobody is connected, and a signal ends the process where it stands.
    """
    from broker.app import serve_until_signal

    hang_up, hung_up = trio.open_memory_channel[None](1)  # two in a row are one: the file is read

    def reload() -> None:
        with suppress(trio.WouldBlock):
            hang_up.send_nowait(None)

    with hang_up, hung_up:
        async with trio.open_nursery() as watch:
            if source is not None:
                watch.start_soon(_reload_on_signal, broker, source, hung_up)
            was_whole = await serve_until_signal(broker, reload)
            watch.cancel_scope.cancel()
    return was_whole


async def _reload_on_signal(
    broker: "Broker", source: _Source, hang_ups: trio.MemoryReceiveChannel[None]
) -> None:
    """Read the file in a thread, which is left to itself if the file system keeps it.

    One at a time: a second thread would wait for the same file.
    """
    threads = trio.CapacityLimiter(1)
    kept = "the broker goes on with the old config"
    async for _ in hang_ups:
        try:
            with trio.fail_after(RELOAD_SECONDS):
                loaded = await trio.to_thread.run_sync(
                    source.read, abandon_on_cancel=True, limiter=threads
                )
            broker.reload(loaded.config, loaded.sources)
        except ConfigError as error:
            log.error("reload_failed", detail=f"{error}; {kept}")
        except trio.TooSlowError:
            waited = f"not read within {RELOAD_SECONDS:g} s"
            log.error("reload_failed", detail=f"{source.file}: {waited}; {kept}")
        except Exception:  # nobody who is connected has to pay for it
            log.exception("reload_failed", detail=f"{source.file}: {kept}")


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
