"""The command line: arguments, exit statuses, signals.

Rule: a mistake of the user's is one line on stderr that names the input and the way out, and
exit status 2. What the broker refuses is one line and status 1. A traceback means a bug.

`serve` is the default command: arguments that do not begin with a command's name are its own,
so `python -m broker --port 9000 app:broker` and `python -m broker serve --port 9000 app:broker`
are the same. A command's name can never be mistaken for an app, which holds a colon.
"""

import gc
import importlib
import logging
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, get_args

import attrs
import click
import msgspec
import structlog
import trio

from broker import logs
from broker.cli_token import token as token_group
from broker.config import (
    Config,
    LogFormat,
    LogLevel,
    SlowConsumer,
    TopicRules,
    load,
)
from broker.errors import ClientError, ConfigError, RequestFailed
from broker.version import VERSION

if TYPE_CHECKING:
    from click._termui_impl import ProgressBar

    from broker.app import Broker
    from broker.bench import Plan, Result
    from broker.client import Client
    from broker.core.messages import Publication

_T = TypeVar("_T")

log = structlog.get_logger("broker")

DEFAULT_URL: Final = "ws://localhost:9501"

INTERRUPTED: Final = 128 + signal.SIGINT
"""Exit status of a client command after Ctrl-C, as shells have it."""


class _Mistake(click.ClickException):
    """An option, a file or an address is wrong. Click's own mistakes have the same status."""

    exit_code = 2


class _Refusal(click.ClickException):
    """The broker said no, or went away for good."""

    exit_code = 1


@contextmanager
def _one_line() -> Iterator[None]:
    """Click puts the usage before a mistake if it knows the command; the mistake is enough."""
    try:
        yield
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx is not None else "python -m broker"
        text = error.format_message().removesuffix(".")  # click's own end with one
        raise click.UsageError(f"{text}. See {path} --help.") from error


class _ServeByDefault(click.Group):
    """A group whose arguments are those of `serve`, unless they begin with a command's name."""

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with _one_line():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _one_line():
            return super().invoke(ctx)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in {*self.commands, "--help", "--version"}:
            args = ["serve", *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "[serve] [OPTIONS] [MODULE:ATTR]")
        formatter.write_usage(ctx.command_path, "pub|sub|push|bench [OPTIONS] ARGUMENTS", "       ")
        formatter.write_usage(ctx.command_path, "token create|check [OPTIONS]", "       ")

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of this file, the default first

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        serve = self.commands["serve"]
        rows = [param.get_help_record(ctx) for param in serve.get_params(ctx)]
        with formatter.section("Options of serve"):
            formatter.write_dl(
                [row for row in rows if row and row[0].startswith("--") and row[0] != "--help"]
            )
        super().format_options(ctx, formatter)


@click.group(cls=_ServeByDefault)
@click.version_option(VERSION, prog_name="trio-broker")
def main() -> None:
    """A pub/sub broker over WebSocket, on Trio.

    Without a command it serves: on ws://localhost:9501, or as the options say. MODULE:ATTR is
    where your own Broker is, such as chat.server:broker; without it the built-in app answers.
    """


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


_PATH: Final = click.Path(path_type=Path)

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


@main.command(short_help="Run the broker; the default command.")
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
        raise _Mistake(str(error)) from error
    logs.configure(config.log_format, config.log_level)
    if broker is None:
        from broker import builtin

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
        cause = _only(error)
        if isinstance(cause, ConfigError):
            raise _Mistake(str(cause)) from error
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
        commands = ", ".join(main.commands)
        raise _Mistake(
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
        raise _Mistake(
            f"{app!r}: there is no module {error.name!r} here or among the installed ones; run "
            "it where the module lies, or set PYTHONPATH"
        ) from error
    for name in attribute.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise _Mistake(f"{app!r}: module {module!r} has no {attribute!r}") from error
    if not isinstance(found, Broker):
        raise _Mistake(f"{app!r} is a {type(found).__name__}: expected a broker.Broker")
    return found


def _check_url(_: click.Context, __: click.Parameter, url: str) -> str:
    if not url.startswith(("ws://", "wss://")):
        raise click.BadParameter(f"{url!r} is not like ws://host:9501 or wss://host")
    return url


_url = click.option(
    "--url", default=DEFAULT_URL, show_default=True, callback=_check_url,
    help="The broker's address.",
)  # fmt: skip
_token = click.option("--token", default="", help="Token to connect with, if the app asks for one.")


@main.command(short_help="Publish DATA to TOPIC.")
@_url
@_token
@click.argument("topic")
@click.argument("data")
def pub(topic: str, data: str, url: str, token: str) -> None:
    """Publish DATA to TOPIC and wait until the broker has taken it.

    DATA that is JSON goes as JSON, anything else as a string. Write -- before DATA that begins
    with a dash.
    """

    async def work(client: "Client") -> None:
        try:
            await client.publish(topic, _value(data))
        except RequestFailed as error:
            raise _Refusal(f"publish to {topic!r}: {_said(error)}") from error

    _with_client(url, token, work)


@main.command(short_help="Send DATA to the one connection FD.")
@_url
@_token
@click.argument("fd", type=click.IntRange(min=1))
@click.argument("data")
def push(fd: int, data: str, url: str, token: str) -> None:
    """Send DATA to the one connection FD.

    DATA that is JSON goes as JSON, anything else as a string. Write -- before DATA that begins
    with a dash.
    """

    async def work(client: "Client") -> None:
        try:
            await client.push(fd, _value(data))
        except RequestFailed as error:
            raise _Refusal(
                f"push to fd {fd}: {_said(error)}; is that fd still connected?"
            ) from error

    _with_client(url, token, work)


@main.command(short_help="Print what is published to PATTERN.")
@_url
@_token
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line, with all fields.")
@click.argument("pattern")
def sub(pattern: str, url: str, token: str, as_json: bool) -> None:
    """Print what is published to PATTERN, one line each: topic, offset, data as JSON.

    PATTERN is a topic, or a pattern: in news.* the star stands for one token, in news.> the
    angle for all the rest. Quote it for the shell. Ends with Ctrl-C, exit status 130; while the
    broker is away it waits and comes back.
    """
    line = _as_json if as_json else _as_text

    async def work(client: "Client") -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(_cancel_on_signal, nursery.cancel_scope)
            try:
                async with client.subscribe(pattern) as publications:
                    async for publication in publications:
                        click.echo(line(publication))
            except RequestFailed as error:
                raise _Refusal(f"subscribe to {pattern!r}: {_said(error)}") from error

    _with_client(url, token, work)
    # The iteration never ends by itself: a signal has ended it.
    sys.exit(INTERRUPTED)


main.add_command(token_group)


async def _cancel_on_signal(
    scope: trio.CancelScope, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        await anext(signals)
        scope.cancel()


@main.command(short_help="Measure what the broker sustains.")
@_url
@_token
@click.option("--topic", default="bench", show_default=True, help="Topic to publish to.")
@click.option(
    "--publishers",
    "--pub",
    type=click.IntRange(1, 10_000),
    default=1,
    show_default=True,
    help="Connections that publish.",
)
@click.option(
    "--subscribers",
    "--sub",
    type=click.IntRange(0, 20_000),
    default=1,
    show_default=True,
    help="Connections that each get everything.",
)
@click.option(
    "--size",
    type=click.IntRange(19, 2**20),
    default=64,
    show_default=True,
    help="Bytes of a payload.",
)
@click.option("--messages", type=click.IntRange(1), help="Publications in all.  [default: 100000]")
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    help="Publish for so long, instead of a number of --messages.",
)
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    help="Publications a second in all; without it as fast as they are delivered.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def bench(
    url: str,
    token: str,
    topic: str,
    publishers: int,
    subscribers: int,
    size: int,
    messages: int | None,
    seconds: float | None,
    rate: float | None,
    as_json: bool,
) -> None:
    """Publish to TOPIC and count what all subscribers get: rates, and how long it took.

    All connections are in this one process, on one core: run it away from the broker's core, or
    both are slowed down. Use a topic that nobody else needs; its history keeps the last payloads.
    """
    from broker.bench import Plan

    if messages is not None and seconds is not None:
        raise click.UsageError("--messages and --seconds: give one of them")
    if messages is None and seconds is None:
        messages = 100_000
    _run_as_client(
        _bench,
        (
            Plan(
                url=url,
                token=token,
                topic=topic,
                publishers=publishers,
                subscribers=subscribers,
                size=size,
                messages=messages,
                seconds=seconds,
                rate=rate,
            ),
            as_json,
        ),
    )


async def _bench(asked: "tuple[Plan, bool]") -> None:
    from broker.bench import measure

    plan, as_json = asked
    length = plan.messages if plan.seconds is None else round(plan.seconds * 10)
    # To stderr, and only to a terminal: what is piped on is the result alone.
    bar: ProgressBar[int]
    with click.progressbar(
        length=length, label="publishing", file=sys.stderr, hidden=not sys.stderr.isatty()
    ) as bar:

        def show(published: int, elapsed: float) -> None:
            done = published if plan.seconds is None else min(round(elapsed * 10), bar.length or 0)
            bar.update(done - bar.pos)

        result = await measure(plan, show)
    if as_json:
        click.echo(msgspec.json.encode(attrs.asdict(result)))
    else:
        click.echo(_bench_table(plan, result))
    if result.missing:
        raise _Refusal(f"{result.missing:,} deliveries are missing: has a subscriber been cut?")


def _bench_table(plan: "Plan", result: "Result") -> str:
    def line(name: str, count: int, rate: float) -> str:
        return f"{name}  {count:>14,}  {rate:>14,.0f}/s  {rate * plan.size / 1e6:>10,.1f} MB/s"

    pace = "as fast as delivered" if plan.rate is None else f"{plan.rate:g}/s"
    rows = [
        f"{plan.publishers:,} → {plan.subscribers:,}, {plan.size:,} B, {pace}: {result.seconds:.2f} s",
        line("published", result.published, result.publishes_per_second),
        line("delivered", result.delivered, result.deliveries_per_second),
    ]
    if result.latency:
        shares = "  ".join(f"{name} {ms:.3g}" for name, ms in result.latency.items())
        rows.append(f"latency, ms  {shares}")
    return "\n".join(rows)


def _with_client(url: str, token: str, work: "Callable[[Client], Awaitable[None]]") -> None:
    """Run `work` with a client; what goes wrong on the way becomes one line."""
    from broker.client import open_client

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("broker").setLevel(logging.INFO)  # tells of reconnects

    async def run(opened: "AbstractAsyncContextManager[Client]") -> None:
        async with opened as client:
            await work(client)

    _run_as_client(run, open_client(url, token=token))


def _run_as_client(run: Callable[[_T], Awaitable[None]], argument: _T) -> None:
    """Run Trio; a broker that is away or refuses becomes one line."""
    try:
        trio.run(run, argument)
    except (Exception, KeyboardInterrupt, BaseExceptionGroup) as error:
        cause = _only(error)
        if isinstance(cause, KeyboardInterrupt):
            sys.exit(INTERRUPTED)
        if isinstance(cause, ClientError):
            if type(cause) is ClientError:  # the root class: no broker has answered
                text = f"{cause}; start a broker there, or name another with --url"
                raise _Mistake(text) from error
            later = isinstance(cause, RequestFailed) and cause.temporary
            raise _Refusal(f"{cause}; try again later" if later else str(cause)) from error
        if cause is not error and isinstance(cause, Exception):
            raise cause from None  # click knows its own, and a closed pipe
        raise


def _only(error: BaseException) -> BaseException:
    """The exception inside nested groups of one; the error itself if there are more."""
    inner = error
    while isinstance(inner, BaseExceptionGroup):
        if len(inner.exceptions) != 1:
            return error
        inner = inner.exceptions[0]
    return inner


def _said(error: RequestFailed) -> str:
    again = " (trying again may help)" if error.temporary else ""
    return f"the broker refused: {error.message} ({error.code}){again}"


def _value(text: str) -> object:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


def _as_text(publication: "Publication") -> str:
    data = msgspec.json.format(publication.data, indent=-1).decode()
    return logs.escape(f"{publication.topic} {publication.offset} {data}")


def _as_json(publication: "Publication") -> str:
    info = publication.info
    fields: dict[str, object] = {
        "topic": publication.topic,
        "offset": publication.offset,
        "data": msgspec.Raw(msgspec.json.format(publication.data, indent=-1)),
        "time": publication.time,
        "tags": dict(publication.tags or {}),
        "client": "" if info is None else info.client,
        "user": "" if info is None else info.user,
    }
    return msgspec.json.encode(fields).decode()
