"""The commands that talk to a running broker as a client does: pub, push, sub, bench.

Rule: nothing that a broker sends reaches the terminal but as text of one line. Control characters
and what turns the writing direction come out as escapes: in JSON as JSON's own (`\\u009b`), so that
it says the same, elsewhere as Python's (`\\x9b`).
"""

import io
import logging
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Final, TypeVar

import attrs
import click
import msgspec
import trio

from broker import logs
from broker.errors import CannotConnect, ClientError, RequestFailed

if TYPE_CHECKING:
    from click._termui_impl import ProgressBar

    from broker.cli.bench import Plan, Result
    from broker.client import Client
    from broker.core.messages import Publication

from broker.cli.errors import Mistake, Refusal, single_cause

_T = TypeVar("_T")

DEFAULT_URL: Final = "ws://localhost:9501"

INTERRUPTED: Final = 128 + signal.SIGINT
"""Exit status of a client command after Ctrl-C, as shells have it."""


def _check_url(_: click.Context, __: click.Parameter, url: str) -> str:
    if not url.startswith(("ws://", "wss://")):
        raise click.BadParameter(f"{url!r} is not like ws://host:9501 or wss://host")
    return url


def _check_text(_: click.Context, __: click.Parameter, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # the system's way to hand on bytes that are no text
        raise click.BadParameter(f"{text!r} is not UTF-8") from None
    return text


_url = click.option(
    "--url", default=DEFAULT_URL, show_default=True, callback=_check_url,
    help="The broker's address.",
)  # fmt: skip
_token = click.option(
    "--token", default="", callback=_check_text,
    help="Token to connect with, if the app asks for one.",
)  # fmt: skip


@click.command(short_help="Publish DATA to TOPIC.")
@_url
@_token
@click.argument("topic", callback=_check_text)
@click.argument("data", callback=_check_text)
def pub(topic: str, data: str, url: str, token: str) -> None:
    """Publish DATA to TOPIC and wait until the broker has taken it.

    DATA that is JSON goes as JSON, anything else as a string. Write -- before DATA that begins
    with a dash.
    """

    async def work(client: "Client") -> None:
        try:
            await client.publish(topic, _value(data))
        except RequestFailed as error:
            raise Refusal(f"publish to {topic!r}: {_refusal_text(error)}") from error

    _with_client(url, token, work)


@click.command(short_help="Send DATA to the one connection FD.")
@_url
@_token
@click.argument("fd", type=click.IntRange(min=1))
@click.argument("data", callback=_check_text)
def push(fd: int, data: str, url: str, token: str) -> None:
    """Send DATA to the one connection FD.

    DATA that is JSON goes as JSON, anything else as a string. Write -- before DATA that begins
    with a dash.
    """

    async def work(client: "Client") -> None:
        try:
            await client.push(fd, _value(data))
        except RequestFailed as error:
            raise Refusal(
                f"push to fd {fd}: {_refusal_text(error)}; is that fd still connected?"
            ) from error

    _with_client(url, token, work)


@click.command(short_help="Print what is published to PATTERN.")
@_url
@_token
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line, with all fields.")
@click.argument("pattern", callback=_check_text)
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
                raise Refusal(f"subscribe to {pattern!r}: {_refusal_text(error)}") from error

    _with_client(url, token, work)
    # The iteration never ends by itself: a signal has ended it.
    sys.exit(INTERRUPTED)


async def _cancel_on_signal(
    scope: trio.CancelScope, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        await anext(signals)
        scope.cancel()


@click.command(short_help="Measure what the broker sustains.")
@_url
@_token
@click.option(
    "--topic", default="bench", show_default=True, callback=_check_text, help="Topic to publish to."
)
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
    from broker.cli.bench import Plan

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


async def _bench(request: "tuple[Plan, bool]") -> None:
    from broker.cli.bench import measure

    plan, as_json = request
    length = plan.messages if plan.seconds is None else round(plan.seconds * 10)
    # To stderr, and only to a terminal: the result alone is piped on.
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
        raise Refusal(f"{result.missing:,} deliveries are missing: has a subscriber been cut?")


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
    """Run `work` with a client; an error on the way becomes one line."""
    from broker.client import open_client

    handler = logging.StreamHandler()
    handler.setFormatter(_EscapedLines("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("broker").setLevel(logging.INFO)  # tells of reconnects

    async def run(opened: "AbstractAsyncContextManager[Client]") -> None:
        async with opened as client:
            await work(client)

    _run_as_client(run, open_client(url, token=token))


class _EscapedLines(logging.Formatter):
    """One line per record, whatever stands in it."""

    def format(self, record: logging.LogRecord) -> str:
        return logs.escape(super().format(record))


def _run_as_client(run: Callable[[_T], Awaitable[None]], argument: _T) -> None:
    """Run Trio; a broker that is away or refuses becomes one line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8
    try:
        trio.run(run, argument)
    except (Exception, KeyboardInterrupt, BaseExceptionGroup) as error:
        cause = single_cause(error)
        if isinstance(cause, KeyboardInterrupt):
            sys.exit(INTERRUPTED)
        if isinstance(cause, ClientError):
            if isinstance(cause, CannotConnect):
                text = f"{cause}; start a broker there, or name another with --url"
                raise Mistake(text) from error
            if type(cause) is ClientError:  # the root class: the request cannot be carried out
                raise Mistake(str(cause)) from error
            later = isinstance(cause, RequestFailed) and cause.temporary
            raise Refusal(f"{cause}; try again later" if later else str(cause)) from error
        if cause is not error and isinstance(cause, Exception):
            raise cause from None  # click knows its own, and a closed pipe
        raise


def _refusal_text(error: RequestFailed) -> str:
    again = " (trying again may help)" if error.temporary else ""
    return f"the broker refused: {error.message} ({error.code}){again}"


def _value(text: str) -> object:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
    except RecursionError:
        raise Mistake("DATA is nested too deeply") from None


def _as_text(publication: "Publication") -> str:
    return f"{logs.escape(publication.topic)} {publication.offset} {_one_line_json(publication)}"


def _as_json(publication: "Publication") -> str:
    info = publication.info
    fields: dict[str, object] = {
        "topic": publication.topic,
        "offset": publication.offset,
        "data": msgspec.Raw(_one_line_json(publication).encode()),
        "time": publication.time,
        "tags": dict(publication.tags or {}),
        "client": "" if info is None else info.client,
        "user": "" if info is None else info.user,
    }
    return _escape_json(msgspec.json.encode(fields).decode())


# Characters that `logs.escape` escapes. Outside of its strings JSON has none of these but white space.
_JSON_ESCAPES: Final = {
    code: f"\\u{code:04x}" for code in range(0x7F, 0x2070) if logs.escape(chr(code)) != chr(code)
}


def _escape_json(text: str) -> str:
    """The same JSON, compact already, with nothing in it that a terminal obeys."""
    return text.translate(_JSON_ESCAPES)


def _one_line_json(publication: "Publication") -> str:
    try:
        text = msgspec.json.format(publication.data, indent=-1).decode()
    except msgspec.DecodeError:
        # Half a surrogate pair, which msgspec does not take. Line ends and tabs can only stand
        # between the tokens; in strings they are escapes.
        text = publication.data.decode().translate({ord(end): " " for end in "\r\n\t"})
    return _escape_json(text)
