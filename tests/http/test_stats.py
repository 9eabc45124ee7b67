"""The counters of a node in one JSON object."""

from trio.testing import MockClock

from tests.http.conftest import listener, result, served


async def test_stats_count_what_info_counts_and_more(autojump_clock: MockClock) -> None:
    async with served() as net, await listener(net, "t", user="x") as peer:
        await peer.request(publish={"channel": "t", "data": 1})
        stats = await result(net, "stats")
        assert (stats["connections"], stats["users"], stats["published"]) == (1, 1, 1)
        assert stats["connections_by"] == [
            {"transport": "websocket", "protocol": "centrifuge-json", "count": 1}
        ]
        assert stats["messages_received"] == 3
        assert stats["opened"]["websocket"] == 1
        assert stats["memory"]["parts"]["connections"] > 0
        assert sum(stats["queues"]["bytes"]["counts"]) == 1
