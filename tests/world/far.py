"""Clients on another machine, or that can be stopped: a process of its own, with orders by its stdin.

`python -m tests.world.far` takes one line of JSON, what to open, and answers `ready` when all are there.
To each further line it answers with what has come since: how many numbers each subscriber has had, what
it missed, and how many have been ended.
"""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import trio

from tests.hostile.orders import answer, orders
from tests.hostile.wire import Ended, Peer, Tcp, connect, handshake, request

TOPIC: Final = "far"
KINDS: Final = ("client", "plain", "http_stream", "sse")


class _Crowd:
    def __init__(self, order: Mapping[str, Any]) -> None:
        self._address = Tcp(order["port"], host=order["host"])
        self._counts: Mapping[str, int] = order["counts"]
        self._buffer: int = order.get("receive_buffer", 0)
        self.numbers: list[list[int]] = []
        self.ended: Counter[str] = Counter()

    async def open(self, nursery: trio.Nursery) -> None:
        for kind, count in self._counts.items():
            for _ in range(count):
                peer = Peer(await connect(self._address, receive_buffer=self._buffer))
                await getattr(self, f"_open_{kind}")(peer)
                nursery.start_soon(self._listen, peer, kind)

    async def _open_plain(self, peer: Peer) -> None:
        await peer.send(handshake(host="localhost"))
        assert (await peer.head()).status == 101

    async def _open_client(self, peer: Peer) -> None:
        await self._open_plain(peer)
        await peer.call(connect={})
        assert "error" not in await peer.call(subscribe={"channel": TOPIC})

    async def _open_stream(self, peer: Peer, path: str) -> None:
        fields = [("Content-Type", "application/json")]
        body = msgspec.json.encode({"id": 1, "connect": {}})
        await peer.send(request(f"POST /connection/{path}", fields, body))
        assert (await peer.head()).status == 200

    async def _open_http_stream(self, peer: Peer) -> None:
        await self._open_stream(peer, "http_stream")

    async def _open_sse(self, peer: Peer) -> None:
        await self._open_stream(peer, "sse")

    async def _listen(self, peer: Peer, kind: str) -> None:
        """Read to the end; a client notes the numbers that come."""
        numbers: list[int] = []
        if kind == "client":
            self.numbers.append(numbers)
        try:
            while True:
                if kind == "client":
                    numbers += [int(each["data"]["n"]) for each in await peer.publications()]
                elif kind == "plain":
                    await peer.message()
                else:
                    await peer.read()
        except Ended as ended:
            self.ended[ended.how] += 1

    def report(self) -> dict[str, object]:
        """Of the numbers that each has had, from its own first to its last."""
        had = [each for each in self.numbers if each]
        return {
            "silent": len(self.numbers) - len(had),
            "behind": min((each[-1] for each in had), default=0),
            "missed": sum(each[-1] - each[0] + 1 - len({*each}) for each in had),
            "unordered": sum(each != sorted({*each}) for each in had),
            "ended": dict(self.ended),
        }


async def _run() -> None:
    crowd: _Crowd | None = None
    async with trio.open_nursery() as nursery:
        async for line in orders():
            if crowd is None:
                crowd = _Crowd(json.loads(line))
                await crowd.open(nursery)
                answer({"ready": True})
            else:
                answer(crowd.report())
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(_run)
