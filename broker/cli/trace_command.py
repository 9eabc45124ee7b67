"""The command `trace`: what a connection, a user or a topic does, as it happens."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import click
import trio

from broker import logs
from broker.cli.errors import INTERRUPTED, Mistake, Refusal
from broker.cli.output import clock, echo_json, in_bytes
from broker.cli.running import (
    Target,
    as_backend,
    ask,
    check_name,
    json_option,
    with_api,
)
from broker.core.names import DIRECT, PERSONAL, direct_fd
from broker.errors import ClientError, Refused

if TYPE_CHECKING:
    from broker.client.http_api import ApiClient

WAIT_SECONDS: Final = 20.0
"""How long one request waits for something to happen: less than proxies do."""

BEGIN_SECONDS: Final = 10.0
"""How long a trace may take to begin; Ctrl-C is heard after that."""


@click.command(short_help="Print what a connection, a user or a topic does, as it happens.")
@as_backend
@click.option("--count", type=click.IntRange(1), help="End after so many lines.")
@json_option
@click.argument("what", metavar="FD|TOPIC|user:NAME", callback=check_name)
def trace(target: Target, what: str, count: int | None, as_json: bool) -> None:
    """Print what a connection (7, fd:7), a user (user:ann) or a topic (news, 'news.*') does.

    One line each: time, fd, user, what happened, and the first 500 characters of a message. A
    broker shows 500 a second at most; a line says how many are missing. Tokens are not shown.
    Ends with the connection, or with Ctrl-C, exit status 130.
    """
    params = _target(what)
    from broker.client.running import until_signal

    was_interrupted = False

    async def work(api: "ApiClient") -> None:
        nonlocal was_interrupted
        begun: list[str] = []

        async def follow() -> None:
            # A trace that has begun there is known here, so that it can be ended.
            with trio.move_on_after(BEGIN_SECONDS, shield=True):
                begun.append((await ask(api, "trace", params))["trace"])
            if not begun:
                raise Refusal(f"{api.url}: the trace has not begun within {BEGIN_SECONDS:g} s")
            await _follow(api, begun[0], count, as_json)

        was_interrupted = await until_signal(follow)()
        with trio.move_on_after(1):  # one that nobody ends does so by itself
            await _end(api, begun[0])

    with_api(target, work)
    if was_interrupted:
        sys.exit(INTERRUPTED)


def _target(what: str) -> dict[str, object]:
    try:
        fd = direct_fd(f"{DIRECT}{what}" if what.isdigit() else what)
    except Refused:
        raise Mistake(f"{what!r} is no fd: expected a number from 1 on") from None
    if fd is not None:
        return {"fd": fd}
    if what.startswith(PERSONAL):
        return {"user": what.removeprefix(PERSONAL)}
    return {"topic": what}


async def _follow(api: "ApiClient", number: str, count: int | None, as_json: bool) -> None:
    left = count
    while True:
        read = await ask(
            api, "trace_read", {"wait": WAIT_SECONDS, "trace": number}, wait=WAIT_SECONDS
        )
        for entry in read["entries"]:
            _echo(entry, as_json=as_json)
            if left is not None:
                left -= 1
                if not left:
                    return
        if read["missed"]:
            _echo_missed(read["missed"], as_json=as_json)
        if read["ended"]:
            return


async def _end(api: "ApiClient", number: str) -> None:
    with suppress(ClientError):  # it has ended, or the broker has
        await ask(api, "trace_end", {"trace": number})


def _echo(entry: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        echo_json(entry)
        return
    if entry.get("missed"):
        _echo_missed(entry["missed"], as_json=False)
    words = [
        clock(entry["time"]),
        str(entry.get("fd", "-")),
        entry.get("user") or "-",
        entry["kind"],
    ]
    if entry.get("topic"):
        words.append(entry["topic"])
    if entry.get("offset"):
        words.append(f"#{entry['offset']}")
    text = entry.get("text", "")
    if entry.get("is_cut"):
        text += f"… ({in_bytes(entry['size'])})"
    click.echo(logs.escape(" ".join([*words, text]).rstrip()))


def _echo_missed(missed: int, *, as_json: bool) -> None:
    if as_json:
        echo_json({"missed": missed})
    else:
        click.echo(f"missed: {missed} lines, as more happens than is shown", err=True)
