"""What an engine has yet to keep: whose turn it is, and whether there is room."""

import attrs
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from broker.engines.waiting import FULL_BYTES, LITTLE_BYTES, Waiting


@attrs.frozen(eq=False)
class Item:
    weight: int
    party: object


async def test_who_has_little_on_its_way_finds_room_where_others_have_filled_it(
    autojump_clock: MockClock,
) -> None:
    waiting = Waiting[Item]()
    flood = Item(FULL_BYTES, "flooder")
    waiting.put(flood)
    assert waiting.is_full("flooder", 1)
    assert not waiting.is_full("bystander", LITTLE_BYTES)
    assert waiting.is_full("bystander", LITTLE_BYTES + 1), "there is no room for much"
    waiting.put(Item(LITTLE_BYTES - 1, "bystander"))
    assert not waiting.is_full("bystander", 1)
    assert waiting.is_full("bystander", 2)


async def test_what_was_taken_counts_until_it_is_over(autojump_clock: MockClock) -> None:
    waiting = Waiting[Item]()
    waiting.put(Item(FULL_BYTES, "a"))
    went_on: list[float] = []

    async def wait() -> None:
        await waiting.wait_room()
        went_on.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        item = waiting.take()
        await wait_all_tasks_blocked()
        assert not went_on
        assert waiting.bytes == FULL_BYTES
        waiting.over(item)
    assert went_on
    assert (waiting.bytes, waiting._of) == (0, {})
