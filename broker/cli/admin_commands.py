"""The commands that look at a running broker with its api_key: connections, connection, topics,
disconnect, stats."""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from broker.cli.errors import Mistake, Refusal
from broker.cli.output import (
    date,
    echo_fields,
    echo_json,
    echo_table,
    in_bytes,
    in_milliseconds,
    in_time,
)
from broker.cli.running import (
    Target,
    as_backend,
    ask,
    check_all_answered,
    check_name,
    check_text,
    json_option,
    read_fd,
    with_api,
)
from broker.errors import CloseCode, ErrorCode, RequestFailed

if TYPE_CHECKING:
    from broker.client.http_api import ApiClient

Row = Mapping[str, Any]

PAGE: Final = 500
"""Connections in one request: some 300 KB."""

_SHOWN: Final = 60
"""Characters of the topics of one connection in a table."""


@click.command(short_help="List the connections that are here.")
@as_backend
@click.option("--user", default="", callback=check_text, help="Those of this user.")
@click.option("--topic", default="", callback=check_name, help="Those that are subscribed to it.")
@click.option("--address", default="", callback=check_text, help="Whose address begins so: 10.1.")
@click.option("--app", default="", callback=check_text, help="Whose client calls itself so: js.")
@click.option(
    "--limit", type=click.IntRange(1), default=100, show_default=True, help="As many at most."
)
@click.option("--closed", is_flag=True, help="Those that have ended last, the last first.")
@json_option
def connections(
    target: Target,
    user: str,
    topic: str,
    address: str,
    app: str,
    limit: int,
    closed: bool,
    as_json: bool,
) -> None:
    """List the connections that are here, in the order in which they came.

    Columns: fd, user, address, protocol, what the client calls itself, for how long it is here
    and how long it was silent, round trip, bytes both ways, bytes that wait, topics.
    """
    if closed and (topic or address or app):
        raise click.UsageError("--closed goes with --user alone")
    query = {"user": user, "topic": topic, "address": address, "app": app}

    async def work(api: "ApiClient") -> None:
        rows: list[Row]
        if closed:
            rows = (await ask(api, "closed_connections", {"user": user, "limit": limit}))[
                "connections"
            ]
        else:
            rows = [row async for row in _pages(api, query, limit)]
        if as_json:
            for row in rows:
                echo_json(row)
        elif closed:
            _echo_closed(rows)
        else:
            _echo_here(rows)

    with_api(target, work)


async def _pages(api: "ApiClient", query: Mapping[str, str], limit: int) -> AsyncIterator[Row]:
    after = 0
    while limit > 0:
        asked = min(limit, PAGE)
        page = await ask(api, "connections", {**query, "after": after, "limit": asked})
        rows: dict[str, Row] = page["connections"]
        for row in rows.values():
            yield row
        if not rows:
            return
        limit -= len(rows)
        after = max(map(int, rows))


def _echo_here(rows: Sequence[Row]) -> None:
    head = ("FD", "USER", "ADDRESS", "PROTOCOL", "APP", "HERE", "IDLE", "RTT", "IN", "OUT", "WAITS")
    table = [
        (
            row["fd"],
            row["user"] or "-",
            row["address"],
            row["protocol"],
            _app(row),
            in_time(row["age_seconds"]),
            in_time(row["idle_seconds"]),
            in_milliseconds(row["rtt_seconds"]),
            in_bytes(row["bytes_received"]),
            in_bytes(row["bytes_sent"]),
            in_bytes(row["bytes_queued"]),
            *_on_node(rows, row.get("node")),
            _topics(row),
        )
        for row in rows
    ]
    echo_table([*head, *_on_node(rows, "NODE"), "TOPICS"], table)


def _on_node(rows: Sequence[Row], cell: str | None) -> Sequence[str]:
    """A column that is there where there are several nodes."""
    return (cell or "-",) if any("node" in row for row in rows) else ()


def _echo_closed(rows: Sequence[Row]) -> None:
    head = ("CLOSED", "FD", "USER", "ADDRESS", "APP", "CODE", "REASON", "BY", "LOST")
    table = [
        (
            date(row["closed_at"]),
            row["fd"],
            row["user"] or "-",
            row["address"],
            _app(row),
            row["code"],
            row["reason"] or "-",
            row["initiator"],
            row["undelivered"],
            *_on_node(rows, row.get("node")),
            _topics(row),
        )
        for row in rows
    ]
    echo_table([*head, *_on_node(rows, "NODE"), "TOPICS"], table)


def _app(row: Row) -> str:
    return f"{row['app_name']} {row['app_version']}".strip() or "-"


def _topics(row: Row) -> str:
    topics, count = row["topics"], row.get("topic_count", len(row["topics"]))
    text = ""
    for number, topic in enumerate(topics):
        if number and len(text) + len(topic) > _SHOWN:
            return f"{text} +{count - number}"
        text = f"{text} {topic}".lstrip()
    return text or "-"


@click.command(short_help="Show all that is known of the connection FD.")
@as_backend
@json_option
@click.argument("fd", type=read_fd)
def connection(target: Target, fd: int, as_json: bool) -> None:
    """Show all that is known of the connection FD: here, or among the last 1,000 that have ended,
    with why it did. Exit status 1 if it is neither."""

    async def work(api: "ApiClient") -> None:
        row: Row | None = None
        try:
            row = await ask(api, "connection", {"fd": fd})
        except RequestFailed as error:
            if error.code != ErrorCode.UNKNOWN_CHANNEL:
                raise
        if row is None:
            closed = (await ask(api, "closed_connections", {"fd": fd}))["connections"]
            if not closed:
                text = f"fd {fd} is not here, nor among the last 1,000 connections that have ended"
                raise Refusal(text)
            (row,) = closed
        if as_json:
            echo_json(row)
        else:
            echo_fields(_in_words(row))

    with_api(target, work)


def _in_words(row: Row) -> Mapping[str, object]:
    limits: Row = row["limits"]
    words: dict[str, object] = {"fd": row["fd"]}
    if "closed_at" in row:
        words["closed"] = date(row["closed_at"])
        words["why"] = f"{row['code']} {row['reason']}".strip() + f", by {row['initiator']}"
        words["undelivered"] = row["undelivered"]
    else:
        words["state"] = "connected" if row["established"] else "closing"
    if "node" in row:
        words["node"] = row["node"]
    return words | {
        "user": row["user"] or "-",
        "address": row["address"],
        "path": row["path"],
        "protocol": f"{row['protocol']} over {row['transport']}",
        "app": _app(row),
        "opened": date(row["opened_at"]),
        "idle": in_time(row["idle_seconds"]),
        "round trip": in_milliseconds(row["rtt_seconds"]),
        "received": f"{row['messages_received']:,} messages, {in_bytes(row['bytes_received'])}",
        "sent": f"{row['messages_sent']:,} messages, {in_bytes(row['bytes_sent'])}",
        "queued": f"{row['messages_queued']:,} of {limits['messages_queued']:,} messages, "
        f"{in_bytes(row['bytes_queued'])} of {in_bytes(limits['bytes_queued'])}",
        "dropped": f"{row['messages_dropped']:,} messages",
        "blocked": "yes" if row["blocked"] else "no",
        "memory": f"{in_bytes(row['bytes_held'])} of {in_bytes(limits['bytes_held'])}",
        "topics": f"{row.get('topic_count', len(row['topics'])):,} of {limits['topics']:,}",
        "": " ".join(row["topics"]),
    }


@click.command(short_help="List the topics that are subscribed to.")
@as_backend
@json_option
@click.argument("pattern", default="", callback=check_text)
def topics(target: Target, pattern: str, as_json: bool) -> None:
    """List the topics and patterns that are subscribed to, with their subscriptions, the busiest
    first.

    PATTERN is one of the shell: in chat* the star stands for any text. Quote it.
    """

    async def work(api: "ApiClient") -> None:
        found: dict[str, Row] = (await ask(api, "channels", {"pattern": pattern}))["channels"]
        rows = sorted(found.items(), key=lambda item: (-item[1]["num_clients"], item[0]))
        if as_json:
            for name, row in rows:
                echo_json({"topic": name, "subscriptions": row["num_clients"]})
        else:
            table = [(row["num_clients"], name) for name, row in rows]
            echo_table(("SUBSCRIPTIONS", "TOPIC"), table)

    with_api(target, work)


@click.command(short_help="Close connections.")
@as_backend
@click.option("--user", default="", callback=check_text, help="All connections of this user.")
@click.option(
    "--code",
    type=int,
    default=int(CloseCode.FORCE_DISCONNECT),
    show_default=True,
    help="Close code. After 3500 to 3999 and 4500 to 4999 official clients stay away.",
)
@click.option("--reason", default="force disconnect", show_default=True, callback=check_text)
@click.argument("fds", metavar="[FD]...", type=read_fd, nargs=-1)
def disconnect(target: Target, user: str, code: int, reason: str, fds: tuple[int, ...]) -> None:
    """Close the connections FD, or all of --user, once they have got what is queued for them.

    Exit status 1 if one of them is not here; the others are closed.
    """
    if bool(user) == bool(fds):
        raise Mistake("give the fds to close, or --user")
    order = {"code": code, "reason": reason}

    async def work(api: "ApiClient") -> None:
        missing = []
        for fd in fds:
            try:
                await ask(api, "connection", {"fd": fd})
            except RequestFailed as error:
                if error.code != ErrorCode.UNKNOWN_CHANNEL:
                    raise
                missing.append(str(fd))
                continue
            await ask(api, "disconnect", {"client": str(fd), "disconnect": order})
        if user:
            await ask(api, "disconnect", {"user": user, "disconnect": order})
        if missing:
            raise Refusal(f"no connection has fd {', '.join(missing)}")

    with_api(target, work)


@click.command(short_help="Show what is here, and what was counted since the start.")
@as_backend
@click.option("--node", default="", callback=check_text, help="Of the node of this name alone.")
@json_option
def stats(target: Target, node: str, as_json: bool) -> None:
    """Show what is here, and what was counted since the broker began to serve: of all nodes together,
    then of each.

    Exit status 1 if a node does not answer: the sums are of the others.
    """

    async def work(api: "ApiClient") -> None:
        found = await ask(api, "stats", {"node": node})
        if as_json:
            echo_json(found)
        else:
            echo_fields(_stats_in_words(found))
            if len(found["nodes"]) > 1:
                click.echo()
                echo_table(_NODES_HEAD, map(_node_row, found["nodes"]))
        check_all_answered(silent_nodes(found))

    with_api(target, work)


_NODES_HEAD: Final = (
    *("NODE", "UP", "CONNECTIONS", "USERS", "TOPICS", "SUBSCRIPTIONS"),
    *("PUBLISHED", "DELIVERED", "RECEIVED", "QUEUED", "MEMORY"),
)


def silent_nodes(found: Row) -> Sequence[str]:
    """The names of the nodes in an answer of `stats` that have given none."""
    return [node["node"] for node in found["nodes"] if not node["alive"]]


def _node_row(node: Row) -> Sequence[object]:
    if not node["alive"]:
        return node["node"], "no answer", *["-"] * (len(_NODES_HEAD) - 2)
    counts = ("connections", "users", "topics", "subscriptions", "published", "delivered")
    return (
        node["node"],
        in_time(node["uptime"]) + (", draining" if node["draining"] else ""),
        *(f"{node[each]:,}" for each in counts),
        in_bytes(node["bytes_received"]),
        in_bytes(node["bytes_queued"]),
        in_bytes(node["memory"]["held"]),
    )


def _of_which(found: Row) -> Mapping[str, object]:
    nodes, silent = found["nodes"], silent_nodes(found)
    if len(nodes) == 1:
        return {
            "node": f"{found['node']}, version {found['version']}",
            "up": in_time(found["uptime"]) + (", draining" if found["draining"] else ""),
        }
    without = f", without {', '.join(silent)}" if silent else ""
    return {"nodes": f"{len(nodes) - len(silent)} of {len(nodes)}{without}"}


def _stats_in_words(found: Row) -> Mapping[str, object]:
    memory: Row = found["memory"]
    by = ", ".join(
        f"{each['count']:,} {each['protocol']} over {each['transport']}"
        for each in found["connections_by"]
    )
    closed = ", ".join(
        f"{each['count']:,} × {each['code']} by {each['initiator']}" for each in found["closed"]
    )
    return {
        **_of_which(found),
        "connections": f"{found['connections']:,} of {found['connections_max']:,}"
        + (f": {by}" if by else ""),
        "users": f"{found['users']:,}",
        "topics": f"{found['topics']:,}, and {found['patterns']:,} patterns",
        "subscriptions": f"{found['subscriptions']:,}",
        "published": f"{found['published']:,}",
        "delivered": f"{found['delivered']:,}",
        "received": f"{found['messages_received']:,} messages, {in_bytes(found['bytes_received'])}",
        "queued": f"{found['messages_queued']:,} messages, {in_bytes(found['bytes_queued'])}",
        "dropped": f"{found['messages_dropped']:,} messages",
        "gaps": f"{found['gaps']:,}",
        "closed": closed or "-",
        "refused": _counts(found["refused"]),
        "errors": _counts(found["errors"]),
        "memory": f"{in_bytes(memory['held'])} of {in_bytes(memory['limit'])}",
    }


def _counts(found: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} × {name}" for name, count in found.items()) or "-"
