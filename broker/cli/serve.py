"""`python -m broker serve`: settings from the command line, signals, reload, exit status."""

import gc
import importlib
import signal
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

import attrs
import click
import structlog
import trio

from broker import logs
from broker.config.loading import load
from broker.config.settings import Config, LogFormat, LogLevel, SlowConsumer, TopicRules
from broker.errors import ConfigError

if TYPE_CHECKING:
    from broker.app import Broker

from broker.cli.errors import Mistake, single_cause

log = structlog.get_logger("broker")

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


# What is changed often enough to be typed. Every field can be set by file and environment.
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
        field="slow_consumer", type=click.Choice(get_args(SlowConsumer)),
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


@click.command(short_help="Run the broker; the default command.")
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
    overrides: dict[str, Any] = {"topics": {}}
    for key, value in options.items():
        if value is not None and value != ():
            (overrides["topics"] if key in _TOPIC_RULES else overrides)[key] = value
    broker = None if app is None else _find(app)
    base = None if broker is None else broker.config
    try:
        config = load(file, overrides, base=base)
    except ConfigError as error:
        raise Mistake(str(error)) from error
    logs.configure(config.log_format, config.log_level)
    if broker is None:
        from broker.cli import default_app as builtin

        broker = builtin.create(config)
    broker.config = config
    # The process is ours, and its objects stay: with Python's defaults the collector walks all
    # connections again and again while they come in (3,000 connects: 1,700/s, with these 3,100/s).
    gc.freeze()
    gc.set_threshold(50_000, 10, 50)
    try:
        read = None if file is None else partial(load, file, overrides, base=base)
        drained = trio.run(_serve, broker, read)
    except Exception as error:
        cause = single_cause(error)
        if isinstance(cause, ConfigError):
            raise Mistake(str(cause)) from error
        raise
    if not drained:
        sys.exit(1)


async def _serve(broker: "Broker", read: Callable[[], Config] | None) -> bool:
    """Serve until a signal; True if everybody was told, False if a second one cut it short.

    `read` has the config of a reload; None leaves SIGHUP as it is, the end of a terminal.
    """
    cut = trio.CancelScope()
    numbers = [signal.SIGINT, signal.SIGTERM] + ([] if read is None else [signal.SIGHUP])
    with trio.open_signal_receiver(*numbers) as signals:
        async with trio.open_nursery() as watch:
            watch.start_soon(_obey, signals, broker, read, cut)
            with cut:
                await broker.serve()
            watch.cancel_scope.cancel()
    return not cut.cancelled_caught


async def _obey(
    signals: AsyncIterator[int],
    broker: "Broker",
    read: Callable[[], Config] | None,
    cut: trio.CancelScope,
) -> None:
    stopping = False
    async for number in signals:
        if number == signal.SIGHUP and read is not None:
            try:
                config = await trio.to_thread.run_sync(read)
            except ConfigError as error:
                log.error(
                    "reload_failed", detail=f"{error}; the broker goes on with the old config"
                )
            else:
                broker.reload(config)
        elif stopping:
            cut.cancel()
            return
        else:
            broker.stop()
            stopping = True


def _find(app: str) -> "Broker":
    """Import the user's `Broker`; a mistake in `app` itself is one line, one inside is theirs."""
    from broker.app import Broker

    module, colon, attribute = app.partition(":")
    if not (module and colon and attribute):
        root = click.get_current_context().find_root().command
        commands = ", ".join(root.commands if isinstance(root, click.Group) else ())
        raise Mistake(
            f"{app!r} is neither a command ({commands}) nor MODULE:ATTR, such as "
            "chat.server:broker; a command's name comes before its options"
        )
    # As `python -m` does; the installed script would not find what lies in front of it.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: object = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and lacks something itself
        raise Mistake(
            f"{app!r}: there is no module {error.name!r} here or among the installed ones; run "
            "it where the module lies, or set PYTHONPATH"
        ) from error
    for name in attribute.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise Mistake(f"{app!r}: module {module!r} has no {attribute!r}") from error
    if not isinstance(found, Broker):
        raise Mistake(f"{app!r} is a {type(found).__name__}: expected a broker.Broker")
    return found
