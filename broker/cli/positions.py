"""Positions as one types them: `17`, or `17:epoch`."""

from typing import TYPE_CHECKING

import click

from broker.core.messages import Position

if TYPE_CHECKING:
    from broker.client import Client


async def read_position(client: "Client", topic: str, text: str | None) -> Position | None:
    """The position that was typed; None for None. Without an epoch it is in that of now, which the broker
    is asked for. Raises `RequestFailed` where it does not tell, and click's error for what is no
    position."""
    if text is None:
        return None
    offset, _, epoch = text.partition(":")
    if not (offset.isascii() and offset.isdigit() and len(offset) < 20):
        raise click.UsageError(f"--since {text!r} is not like OFFSET or OFFSET:EPOCH")
    if not epoch:
        epoch = (await client.history(topic, limit=0)).position.epoch
    return Position(int(offset), epoch)


async def position_before(client: "Client", topic: str, count: int) -> Position:
    """The position behind which are the last `count` publications that a topic keeps."""
    kept = await client.history(topic, limit=count, reverse=True)
    if not kept.publications:
        return kept.position
    return Position(kept.publications[-1].offset - 1, kept.position.epoch)
