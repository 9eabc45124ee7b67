"""The command `top`: a running broker, looked at again and again."""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import attrs
import click
import trio

from broker import logs
from broker.cli.errors import INTERRUPTED, Mistake
from broker.cli.output import clock, echo_json, in_bytes, in_time
from broker.cli.running import Target, as_backend, ask, json_option, until_signal, with_api

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from broker.client.http_api import ApiClient

Row = Mapping[str, Any]

CLOSED_SHOWN: Final = 10

RATES: Final = (
    ("published", "published"),
    ("delivered", "delivered"),
    ("messages_received", "messages in"),
    ("bytes_received", "bytes in"),
    ("messages_queued", "messages out"),
    ("bytes_queued", "bytes out"),
    ("messages_dropped", "dropped"),
)
"""Counters that are shown as rates, and what they are called."""


@attrs.frozen
class Look:
    """One look at a broker: its counters, the connections that ended last, and how much the counters have
    grown a second since the look before, 0 at the first."""

    stats: Row
    closed: Sequence[Row]
    rates: Mapping[str, float]


@click.command(short_help="Watch a running broker.")
@as_backend
@click.option(
    "--seconds",
    type=click.FloatRange(0.2),
    default=2.0,
    show_default=True,
    help="Between two looks.",
)
@click.option("--count", type=click.IntRange(1), help="End after so many looks.")
@json_option
def top(target: Target, seconds: float, count: int | None, as_json: bool) -> None:
    """Watch a running broker: what goes through it, what waits, who was closed last.

    Needs Rich, pip install '.[top]', but for --json. Ends with Ctrl-C, exit status 130.
    """
    screen = None if as_json else _open_screen()
    was_interrupted = False

    async def work(api: "ApiClient") -> None:
        nonlocal was_interrupted

        async def watch() -> None:
            await _watch(api, seconds, count, screen)

        was_interrupted = await until_signal(watch)()

    with_api(target, work)
    if was_interrupted:
        sys.exit(INTERRUPTED)


async def _watch(
    api: "ApiClient", seconds: float, count: int | None, screen: "Screen | None"
) -> None:
    before: Row | None = None
    left = count
    try:
        while True:
            due = trio.current_time() + seconds
            stats = await ask(api, "stats")
            closed = (await ask(api, "closed_connections", {"limit": CLOSED_SHOWN}))["connections"]
            look = Look(stats, closed, _rates(before, stats))
            if screen is None:
                echo_json({"rates": look.rates, "stats": stats})
            else:
                screen.show(look)
            before = stats
            if left is not None:
                left -= 1
                if not left:
                    return
            await trio.sleep_until(due)
    finally:
        if screen is not None:
            screen.close()


def _rates(before: Row | None, now: Row) -> dict[str, float]:
    if before is None or before["uptime"] >= now["uptime"]:  # the first, or the broker began anew
        return {name: 0.0 for name, _ in RATES}
    seconds = now["uptime"] - before["uptime"]
    return {name: round((now[name] - before[name]) / seconds, 1) for name, _ in RATES}


def _open_screen() -> "Screen":
    try:
        return Screen()
    except ModuleNotFoundError:
        raise Mistake("top needs the package `rich`: pip install '.[top]', or use --json") from None


class Screen:
    """The whole terminal, where there is one; else each look is printed below the other."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(highlight=False)
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, screen=True, auto_refresh=False)
            self._live.start()

    def show(self, look: Look) -> None:
        picture = drawn(look)
        if self._live is None:
            self._console.print(picture)
        else:
            self._live.update(picture, refresh=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


def drawn(look: Look) -> "RenderableType":
    """A look as Rich draws it."""
    from rich.console import Group
    from rich.text import Text

    stats = look.stats
    state = ", draining" if stats["draining"] else ""
    head = f"{stats['node']}  {stats['version']}  up {in_time(stats['uptime'])}{state}"
    return Group(Text(logs.escape(head), style="bold"), Text(), _numbers(look), Text(), _ends(look))


def _table(*heads: str) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for head in heads:
        table.add_column(head)
    return table


def _numbers(look: Look) -> "Table":
    stats, memory = look.stats, look.stats["memory"]
    here = [
        ("connections", f"{stats['connections']:,} of {stats['connections_max']:,}"),
        ("users", f"{stats['users']:,}"),
        ("topics", f"{stats['topics'] + stats['patterns']:,}"),
        ("subscriptions", f"{stats['subscriptions']:,}"),
        ("memory", f"{in_bytes(memory['held'])} of {in_bytes(memory['limit'])}"),
        ("behind", f"{_behind(stats['queues']['messages']):,} connections"),
        ("loop lag", _lag(stats["loop_lag"])),
    ]
    table = _table("HERE", "", "A SECOND", "", "IN ALL")
    for column in (1, 3, 4):
        table.columns[column].justify = "right"
    for (name, value), (field, words) in zip(here, RATES, strict=True):
        size = in_bytes if "bytes" in field else "{:,.0f}".format
        table.add_row(name, value, words, size(look.rates[field]), size(stats[field]))
    return table


def _behind(queues: Row) -> int:
    """Connections for which anything waits: those that are not in the first bucket, of nothing."""
    return sum(queues["counts"][1:])


def _lag(lag: Row) -> str:
    """The bound that 99 of 100 looks at the loop were below."""
    seen = 0
    for bound, count in zip(lag["bounds"], lag["counts"], strict=False):
        seen += count
        if seen >= 0.99 * lag["count"]:
            return f"< {bound * 1000:g} ms"
    return f"> {lag['bounds'][-1] * 1000:g} ms"


def _ends(look: Look) -> "Table":
    from rich.text import Text

    table = _table("CLOSED", "FD", "USER", "ADDRESS", "WHY")
    for row in look.closed:
        why = f"{row['code']} {row['reason']}".rstrip() + f", by {row['initiator']}"
        cells = (clock(row["closed_at"]), row["fd"], row["user"] or "-", row["address"], why)
        # As `Text`: a name in brackets is no markup.
        table.add_row(*(Text(logs.escape(str(cell))) for cell in cells))
    return table
