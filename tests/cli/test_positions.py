"""Positions as one types them, against a topic that a fake client knows."""

from typing import Any, cast

import attrs
import click
import pytest

from broker.cli.positions import position_before, read_position
from broker.client import Client
from broker.core.messages import Position, Publication


@attrs.frozen
class Kept:
    publications: list[Publication]
    position: Position


@attrs.define
class Asked:
    """A client of a topic with so many publications, of which the last are kept."""

    top: int
    kept: int
    limits: list[int] = attrs.field(factory=list)

    async def history(self, topic: str, limit: int, *, reverse: bool = False) -> Kept:
        self.limits.append(limit)
        offsets = range(self.top, self.top - min(limit, self.kept), -1)
        found = [Publication(topic, b"1", offset=offset) for offset in offsets]
        return Kept(found if reverse else found[::-1], Position(self.top, "now"))


def client(top: int, kept: int) -> tuple[Asked, Client]:
    asked = Asked(top, kept)
    return asked, cast(Any, asked)


async def test_an_offset_alone_is_in_the_epoch_of_now() -> None:
    asked, fake = client(9, 9)
    assert await read_position(fake, "t", "3") == Position(3, "now")
    assert asked.limits == [0], "no publication is fetched for that"


async def test_with_an_epoch_nobody_is_asked() -> None:
    asked, fake = client(9, 9)
    assert await read_position(fake, "t", "3:old") == Position(3, "old")
    assert await read_position(fake, "t", None) is None
    assert asked.limits == []


@pytest.mark.parametrize("text", ["", "x", "-1", "+1", "1.5", "٣", ":e", "1" * 20])
async def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(click.UsageError, match="is not like OFFSET or OFFSET:EPOCH"):
        await read_position(client(9, 9)[1], "t", text)


@pytest.mark.parametrize(
    ("top", "kept", "count", "offset"), [(9, 9, 3, 6), (9, 2, 3, 7), (9, 0, 3, 9), (0, 0, 1, 0)]
)
async def test_the_last_publications_stand_behind_a_position(
    top: int, kept: int, count: int, offset: int
) -> None:
    assert await position_before(client(top, kept)[1], "t", count) == Position(offset, "now")
