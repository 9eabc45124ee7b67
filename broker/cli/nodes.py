"""`python -m broker nodes`: the nodes that share an engine, as one of them knows them."""

import http.client
import json
from collections.abc import Iterator, Sequence
from typing import Any, Final
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import click

from broker import logs
from broker.cli.errors import Mistake, Refusal

SECONDS: Final = 10.0
"""A node waits two seconds for the others."""

_HEAD: Final = ("NODE", "STATE", "CONNECTIONS", "USERS", "SUBSCRIPTIONS", "TOPICS", "UP", "VERSION")


def _check_url(_: click.Context, __: click.Parameter, url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise click.BadParameter(f"{url!r} is not like http://host:9501 or https://host")
    return url.rstrip("/")


@click.command(short_help="List the nodes that share an engine.")
@click.option(
    "--url", default="http://localhost:9501", show_default=True, callback=_check_url,
    help="The address of any of them.",
)  # fmt: skip
@click.option(
    "--key", default="", envvar="BROKER_API_KEY", show_envvar=True,
    help="The key of its HTTP API.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line, with all fields.")
def nodes(url: str, key: str, as_json: bool) -> None:
    """List the nodes that share an engine with the one at the URL, that one first.

    Exit status 1 if one of them does not answer; 2 if the one at the URL cannot be asked.
    """
    found = _ask(url, key)
    if as_json:
        for node in found:
            click.echo(json.dumps(node))
    else:
        for line in _table([_HEAD, *map(_row, found)]):
            click.echo(line)
    silent = [logs.escape(str(node["uid"])) for node in found if not node.get("alive", True)]
    if silent:
        raise Refusal(f"no answer from {', '.join(silent)}")


def _ask(url: str, key: str) -> list[dict[str, Any]]:
    if not key:
        raise Mistake("the HTTP API asks for a key: set BROKER_API_KEY, or give --key")
    headers = {"X-API-Key": key, "Content-Type": "application/json"}
    try:
        with urlopen(Request(f"{url}/api/info", b"{}", headers), timeout=SECONDS) as response:  # noqa: S310 - checked
            found: list[dict[str, Any]] = json.load(response)["result"]["nodes"]
            return found
    except HTTPError as error:
        with error:
            text = logs.escape(error.read(500).decode("utf-8", "replace"))
        raise Mistake(f"{url} answers {error.code}: {text}") from None
    except (URLError, OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise Mistake(f"cannot ask {url}: {logs.escape(str(reason))}") from None
    except (ValueError, KeyError, TypeError):
        raise Mistake(f"{url} is no broker: it answers something else") from None


def _row(node: dict[str, Any]) -> Sequence[str]:
    name = logs.escape(str(node["uid"]))
    if not node.get("alive", True):
        return name, "no answer", "", "", "", "", "", ""
    counts = ("num_clients", "num_users", "num_subs", "num_channels")
    numbers = [f"{node[each]:,}" for each in counts]
    return name, "alive", *numbers, _time(int(node["uptime"])), logs.escape(str(node["version"]))


def _time(seconds: int) -> str:
    """Two units: `3 d 4 h`."""
    days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % 60} s"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if 2 <= at <= 5 else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
