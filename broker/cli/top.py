"""The command `top`: a running broker, looked at again and again."""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import attrs
import click
import trio

from broker import logs
from broker.cli.admin_commands import silent_nodes
from broker.cli.errors import INTERRUPTED, Mistake
from broker.cli.output import clock, echo_json, in_bytes, in_time
from broker.cli.running import Target, as_backend, ask, json_option, with_api

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from broker.client.http_api import ApiClient

Row = Mapping[str, Any]

ROWS_SHOWN: Final = 10
"""Connections that are heavy, and those that ended."""

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

RATE_NAMES: Final = tuple(name for name, _ in RATES)


Rates = Mapping[str, float]


@attrs.frozen
class Look:
    """One look at a broker: its counters, and how much they have grown a second since the look before, 0 at
    the first; of all nodes, and of each in the order of `nodes` in its counters."""

    stats: Row
    rates: Rates
    by_node: Sequence[Rates]

    @classmethod
    def of(cls, before: Row | None, now: Row) -> "Look":
        """`before` is None at the first look. The growth of a node is over the time between its own two
        answers; a node that did not answer at both has no part in a sum."""
        known = {} if before is None else {node["id"]: node for node in before["nodes"]}
        by_node = [_rates(known.get(node["id"]), node) for node in now["nodes"]]
        total = {name: round(sum(rates[name] for rates in by_node), 1) for name, _ in RATES}
        return cls(now, total, by_node)


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
    """Watch a running broker, all nodes of it: the traffic, the bytes that wait, on which node and for whom,
    and the connections that were closed last.

    Needs Rich, pip install '.[top]', but for --json. Ends with Ctrl-C, exit status 130.
    """
    screen = None if as_json else _open_screen()
    from broker.client.running import until_signal

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
            stats = await ask(api, "stats", {"rows": ROWS_SHOWN})
            look = Look.of(before, stats)
            if screen is None:
                echo_json({"rates": look.rates, "rates_by_node": _named(look), "stats": stats})
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


def _named(look: Look) -> list[Row]:
    nodes = look.stats["nodes"]
    return [
        {"node": node["node"], **rates} for node, rates in zip(nodes, look.by_node, strict=True)
    ]


def _rates(before: Row | None, now: Row) -> dict[str, float]:
    if before is None or not (before["alive"] and now["alive"]):
        return dict.fromkeys(RATE_NAMES, 0.0)
    seconds = now["uptime"] - before["uptime"]
    if seconds <= 0:  # it began anew
        return dict.fromkeys(RATE_NAMES, 0.0)
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

    parts: list[RenderableType] = [Text(logs.escape(_head(look.stats)), style="bold")]
    if silent := silent_nodes(look.stats):
        text = f"no answer from {', '.join(silent)}: the sums are without"
        parts.append(Text(logs.escape(text), style="bold red"))
    nodes = [_nodes(look)] if len(look.stats["nodes"]) > 1 else []
    for table in (_numbers(look), *nodes, _heaviest(look), _ends(look)):
        parts += [Text(), table]
    return Group(*parts)


def _head(stats: Row) -> str:
    nodes = stats["nodes"]
    if len(nodes) > 1:
        return f"{sum(node['alive'] for node in nodes)} of {len(nodes)} nodes, by {stats['node']}"
    state = ", draining" if stats["draining"] else ""
    return f"{stats['node']}  {stats['version']}  up {in_time(stats['uptime'])}{state}"


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


def _nodes(look: Look) -> "Table":
    """A line for each node."""
    table = _table(
        "NODE", "UP", "CONNECTIONS", "PUBLISHED/S", "DELIVERED/S", "MEMORY", "BEHIND", "LAG"
    )
    for column in table.columns[2:]:
        column.justify = "right"
    for node, rates in zip(look.stats["nodes"], look.by_node, strict=True):
        if not node["alive"]:
            _add(table, node["node"], "no answer", *["-"] * 6)
            continue
        _add(
            table,
            node["node"],
            in_time(node["uptime"]) + (", draining" if node["draining"] else ""),
            f"{node['connections']:,}",
            f"{rates['published']:,.0f}",
            f"{rates['delivered']:,.0f}",
            in_bytes(node["memory"]["held"]),
            f"{_behind(node['queues']['messages']):,}",
            _lag(node["loop_lag"]),
        )
    return table


def _heaviest(look: Look) -> "Table":
    heads = ("HEAVIEST", "USER", "ADDRESS", "APP", "WAITS", "IN", "OUT")
    table = _table(*heads, *_on_node(look))
    for column in table.columns[4:7]:
        column.justify = "right"
    for row in look.stats["heaviest"]:
        sizes = [in_bytes(row[f"bytes_{each}"]) for each in ("queued", "received", "sent")]
        who = row["fd"], row["user"] or "-", row["address"], row["app_name"] or "-"
        _add(table, *who, *sizes, *_on_node(look, row["node"]))
    return table


def _on_node(look: Look, cell: str = "NODE") -> tuple[str, ...]:
    """A column that is there where there are several nodes."""
    return (cell,) if len(look.stats["nodes"]) > 1 else ()


def _ends(look: Look) -> "Table":
    table = _table("CLOSED", "FD", "USER", "ADDRESS", "WHY", *_on_node(look))
    for row in look.stats["closed_last"]:
        why = f"{row['code']} {row['reason']}".rstrip() + f", by {row['initiator']}"
        who = clock(row["closed_at"]), row["fd"], row["user"] or "-", row["address"]
        _add(table, *who, why, *_on_node(look, row["node"]))
    return table


def _add(table: "Table", *cells: object) -> None:
    from rich.text import Text

    # As `Text`: a name in brackets is no markup.
    table.add_row(*(Text(logs.escape(str(cell))) for cell in cells))
