"""Looks at a broker while it is measured, as Prometheus and an open dashboard do: `watcher.py PORT`.

Once a second it reads `/metrics`, ten times as often as is usual, and asks at the dashboard's door for the list
of connections; the samples come by themselves. The keys are in BROKER_API_KEY and BROKER_ADMIN_KEY. It prints a
line when both are open, so that its own start is in no measurement.
"""

import json
import os
import sys
import urllib.request

import trio
from trio_websocket import open_websocket_url


async def watch(port: int) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(scrape, port)
        await nursery.start(look, port)
        print("watching", flush=True)


async def scrape(port: int, task_status: trio.TaskStatus[None]) -> None:
    headers = {"Authorization": f"Bearer {os.environ['BROKER_API_KEY']}"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=headers)

    def read() -> bytes:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return bytes(answer.read())

    async def ask() -> None:
        assert b"broker_" in await trio.to_thread.run_sync(read)

    await ask()
    task_status.started()
    while True:
        await trio.sleep(1)
        await ask()


async def look(port: int, task_status: trio.TaskStatus[None]) -> None:
    key = os.environ["BROKER_ADMIN_KEY"]
    async with (
        open_websocket_url(
            f"ws://127.0.0.1:{port}/admin/websocket", subprotocols=["centrifuge-json"]
        ) as door,
        trio.open_nursery() as nursery,
    ):
        await door.send_message(json.dumps({"id": 1, "connect": {"data": {"key": key}}}))
        assert "connect" in await door.get_message()
        task_status.started()

        async def ask() -> None:
            number = 1
            while True:
                number += 1
                rpc = {"method": "admin.connections", "data": {}}
                await door.send_message(json.dumps({"id": number, "rpc": rpc}))
                await trio.sleep(1)

        nursery.start_soon(ask)
        while True:
            said = await door.get_message()
            assert '"error"' not in said[:30], said
            if said == "{}":
                await door.send_message("{}")


if __name__ == "__main__":
    trio.run(watch, int(sys.argv[1]))
