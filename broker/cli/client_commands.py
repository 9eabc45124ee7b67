"""The commands that talk to a running broker as a client does: pub, push, history, presence, request."""

from collections.abc import Awaitable, Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
import msgspec
import trio

from broker import logs
from broker.cli.errors import Mistake, Refusal
from broker.cli.output import (
    client_fields,
    echo_json,
    publication_as_json,
    publication_as_text,
    raw_json,
    to_json,
)
from broker.cli.positions import read_position
from broker.cli.running import (
    Target,
    as_client,
    as_client_or_backend,
    ask,
    check_name,
    check_text,
    json_option,
    read_fd,
    refusal_text,
    with_api,
    with_client,
)
from broker.errors import RequestFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from broker.client import Client
    from broker.client.http_api import ApiClient

Publish = Callable[[], Awaitable[object]]


def _check_tags(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    tags = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise click.BadParameter(f"{text!r} is not like NAME=VALUE")
        tags[name] = value
    return tags


@click.command(short_help="Publish DATA to TOPIC.")
@as_client_or_backend
@click.option("--retain", is_flag=True, help="Whoever subscribes later gets it at once.")
@click.option(
    "--tag",
    "tags",
    multiple=True,
    metavar="NAME=VALUE",
    callback=_check_tags,
    help="A tag that subscribers see and may pick by; needs --api-key. May be repeated.",
)
@click.option(
    "--key",
    default="",
    callback=check_text,
    help="Idempotency key: a second publication of the same user with it, within five minutes, "
    "is none.",
)
@click.option(
    "--count", type=click.IntRange(1), default=1, show_default=True, help="Publish so many times."
)
@click.option(
    "--rate", type=click.FloatRange(0, min_open=True), help="Publications a second, at most."
)
@json_option
@click.argument("topic", callback=check_name)
@click.argument("data", callback=check_text)
def pub(
    target: Target,
    topic: str,
    data: str,
    retain: bool,
    tags: dict[str, str],
    key: str,
    count: int,
    rate: float | None,
    as_json: bool,
) -> None:
    """Publish DATA to TOPIC and wait until the broker has taken it.

    DATA that is JSON goes as JSON, anything else as a string. Write -- before DATA that begins
    with a dash. With --json it tells how many subscriptions it was for, and how many took it.
    """
    if key and count > 1:
        raise click.UsageError("--key makes all publications one: leave out --count")
    value = _value(data)
    if tags:
        if not target.api_key:
            raise Mistake("--tag is for backends: it needs --api-key, or BROKER_API_KEY")
        params: dict[str, object] = {"channel": topic, "data": value, "tags": tags, "report": True}
        params |= {"retain": True} if retain else {}
        params |= {"idempotency_key": key} if key else {}

        async def by_api(api: "ApiClient") -> None:
            await _publish(topic, lambda: ask(api, "publish", params), count, rate, as_json)

        with_api(target, by_api)
        return
    options = {"topic": topic, "data": value, "retain": retain, "key": key, "report": as_json}

    async def work(client: "Client") -> None:
        def publish() -> Awaitable[object]:
            if retain or key or as_json:
                return client.rpc("publish", options)
            return client.publish(topic, value)

        await _publish(topic, publish, count, rate, as_json)

    with_client(target, work)


async def _publish(
    topic: str, publish: Publish, count: int, rate: float | None, as_json: bool
) -> None:
    due = trio.current_time()
    with _refusals_of(f"publish to {topic!r}"):
        for _ in range(count):
            await trio.sleep_until(due)
            report = await publish()
            if as_json:
                echo_json(report)
            due = max(trio.current_time(), due + (0 if rate is None else 1 / rate))


@click.command(short_help="Send DATA to the one connection FD.")
@as_client
@click.argument("fd", type=read_fd)
@click.argument("data", callback=check_text)
def push(target: Target, fd: int, data: str) -> None:
    """Send DATA to the one connection FD.

    DATA that is JSON goes as JSON, anything else as a string. Write -- before DATA that begins
    with a dash.
    """
    value = _value(data)

    async def work(client: "Client") -> None:
        with _refusals_of(f"push to fd {fd}", "; is that fd still connected?"):
            await client.push(fd, value)

    with_client(target, work)


@click.command(short_help="Print what TOPIC keeps.")
@as_client
@click.option("--limit", type=click.IntRange(0), help="Print no more than so many.")
@click.option("--since", metavar="OFFSET[:EPOCH]", help="Only what was published after that.")
@click.option("--reverse", is_flag=True, help="The newest first.")
@json_option
@click.argument("topic", callback=check_name)
def history(
    target: Target, topic: str, limit: int | None, since: str | None, reverse: bool, as_json: bool
) -> None:
    """Print the publications that TOPIC keeps, the oldest first: topic, offset, data as JSON.

    A broker gives 300 at once, unless it is set otherwise; ask for more with --since and the
    last offset. With --json each line has the epoch, which --since takes.
    """

    async def work(client: "Client") -> None:
        with _refusals_of(f"history of {topic!r}"):
            position = await read_position(client, topic, since)
            kept = await client.history(topic, limit=limit, since=position, reverse=reverse)
        for publication in kept.publications:
            if as_json:
                click.echo(publication_as_json(publication, kept.position.epoch))
            else:
                click.echo(publication_as_text(publication))

    with_client(target, work)


@click.command(short_help="Print who is subscribed to TOPIC.")
@as_client
@json_option
@click.argument("topic", callback=check_name)
def presence(target: Target, topic: str, as_json: bool) -> None:
    """Print the clients that are subscribed to TOPIC, one line each: fd, user, what they say of
    themselves."""

    async def work(client: "Client") -> None:
        with _refusals_of(f"presence of {topic!r}"):
            found = await client.presence(topic)
        for info in found.values():
            if as_json:
                echo_json(client_fields(info))
                continue
            words = [
                info.client,
                info.user or "-",
                raw_json(info.conn_info),
                raw_json(info.chan_info),
            ]
            click.echo(logs.escape(" ".join(filter(None, words))))

    with_client(target, work)


@click.command(short_help="Ask another client, and print its answer.")
@as_client
@click.option(
    "--seconds",
    type=click.FloatRange(0, 60, min_open=True),
    default=10.0,
    show_default=True,
    help="How long to wait for the answer.",
)
@click.argument("to", callback=check_text)
@click.argument("data", callback=check_text)
def request(target: Target, to: str, data: str, seconds: float) -> None:
    """Ask the client TO, by fd:N, or one member of a queue group, by a topic; print its answer as
    JSON.

    DATA is as for pub. Exit status 1 if nobody is there to ask, or no answer comes.
    """
    params = {"to": to, "data": _value(data), "seconds": seconds}

    async def work(client: "Client") -> None:
        with _refusals_of(f"request to {to!r}", word="refused"):
            click.echo(to_json(await client.rpc("request", params)))

    with_client(target, work)


@contextmanager
def _refusals_of(what: str, hint: str = "", word: str = "") -> "Iterator[None]":
    try:
        yield
    except RequestFailed as error:
        text = f"{error.message} ({error.code})" if word else refusal_text(error)
        raise Refusal(f"{what}: {text}{hint}") from error


def _value(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
    except RecursionError:
        raise Mistake("DATA is nested too deeply") from None
