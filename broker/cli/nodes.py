"""`python -m broker nodes`: the nodes that share an engine, as one of them knows them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from broker.cli.output import echo_json, echo_table, in_time
from broker.cli.running import (
    Target,
    as_backend,
    ask,
    check_all_answered,
    json_option,
    with_api,
)

if TYPE_CHECKING:
    from broker.client.http_api import ApiClient

_HEAD: Final = ("NODE", "STATE", "CONNECTIONS", "USERS", "SUBSCRIPTIONS", "TOPICS", "UP", "VERSION")


@click.command(short_help="List the nodes that share an engine.")
@as_backend
@json_option
def nodes(target: Target, as_json: bool) -> None:
    """List the nodes that share an engine with the one at the URL, that one first.

    Exit status 1 if one of them does not answer.
    """

    async def work(api: "ApiClient") -> None:
        found: list[dict[str, Any]] = (await ask(api, "info"))["nodes"]
        if as_json:
            for node in found:
                echo_json(node)
        else:
            echo_table(_HEAD, map(_row, found))
        check_all_answered([str(node["uid"]) for node in found if not node["alive"]])

    with_api(target, work)


def _row(node: Mapping[str, Any]) -> Sequence[object]:
    if not node["alive"]:
        return node["uid"], "no answer", "-", "-", "-", "-", "-", "-"
    counts = ("num_clients", "num_users", "num_subs", "num_channels")
    return (
        node["uid"],
        "alive",
        *(node[each] for each in counts),
        in_time(node["uptime"]),
        node["version"],
    )
