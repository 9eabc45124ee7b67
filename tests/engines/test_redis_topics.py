"""The topics in Redis that a node knows: views, and runs that follow them or do not."""

import msgspec
import pytest

from broker.core.history import HistoryStore
from broker.core.messages import Position, Series
from broker.engines.records import Batch
from broker.engines.redis_outgoing import Posted
from broker.engines.redis_topics import KnownTopics, Snapshot, numbered
from tests.engines.conftest import logged


async def view(entries: dict[int, list[bytes]], top: int) -> Snapshot:
    """What Redis says of topic `t`, each run under the offset of its last publication."""
    kept = [
        [b"%d-0" % end, [b"1000", msgspec.msgpack.encode(Posted([Batch(data)]))]]
        for end, data in entries.items()
    ]
    snapshot, some = Snapshot.of("t", [5, 2000, b"e1", top, 10, 60_000, kept])
    await snapshot.take(some)
    snapshot.settle()
    return snapshot


async def test_a_run_that_does_not_follow_a_view_makes_its_topic_unknown() -> None:
    for first, epoch, follows in [(3, "e1", True), (4, "e1", False), (3, "e2", False)]:
        topics = KnownTopics(HistoryStore(2**20, lambda _: "e0"), 2**20, lambda _: True)
        await topics.put(await view({2: [b"1", b"2"]}, top=2))
        run = logged(first, epoch)
        assert topics.precedes(run) is follows
        found = topics.add(run, [Batch([b"3"]).publications("t")])
        assert (found is not None) is follows
        assert topics.follows("t") is follows


@pytest.mark.parametrize("tags", [None, {"k": "v"}])
async def test_a_run_has_its_offsets_whether_its_topic_is_known_or_not(
    tags: dict[str, str] | None,
) -> None:
    batches = [Batch([b"3", b"4"], tags=tags), Batch([b"5"], tags=tags)]
    topics = KnownTopics(HistoryStore(2**20, lambda _: "e0"), 2**20, lambda _: True)
    await topics.put(await view({2: [b"1", b"2"]}, top=2))
    kept = topics.add(logged(3, "e1"), [each.publications("t") for each in batches])
    unknown = numbered([each.publications("t") for each in batches], 3)
    assert kept is not None
    for found in (kept, unknown):
        assert [each.offset for batch in found for each in batch] == [3, 4, 5]
        assert [isinstance(batch, Series) for batch in found] == [tags is None] * 2


async def test_a_view_has_what_leads_up_to_the_top_and_nothing_else() -> None:
    whole = await view({2: [b"1", b"2"], 3: [b"3"]}, top=3)
    assert [len(run) for _, run in whole.runs] == [2, 1]
    middle_is_gone = await view({1: [b"1"], 3: [b"3"]}, top=3)
    assert [[each.data for each in run] for _, run in middle_is_gone.runs] == [[b"3"]]
    end_is_gone = await view({2: [b"1", b"2"]}, top=3)
    assert end_is_gone.runs == []
    assert end_is_gone.position == Position(3, "e1")
