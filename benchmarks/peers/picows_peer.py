"""Fan-out on picows and uvloop, as its user would write it: one `send` per subscriber and message.

What a publisher sends at /pub/TOPIC goes to those at /sub/TOPIC. Nothing is parsed, kept, counted
or bounded. picows has no call that serves several peers or joins several frames, so none is made up.
"""

import sys
from collections import defaultdict

import picows
import uvloop

subscribers: defaultdict[str, dict[picows.WSTransport, None]] = defaultdict(dict)


class Peer(picows.WSListener):
    """One connection."""

    def __init__(self, path: str) -> None:
        _, self.role, self.topic = path.split("/")

    def on_ws_connected(self, transport: picows.WSTransport) -> None:
        if self.role == "sub":
            subscribers[self.topic][transport] = None

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        if frame.msg_type == picows.WSMsgType.CLOSE:
            transport.disconnect()
            return
        payload = frame.get_payload_as_memoryview()
        for subscriber in subscribers[self.topic]:
            subscriber.send(picows.WSMsgType.BINARY, payload)

    def on_ws_disconnected(self, transport: picows.WSTransport) -> None:
        subscribers[self.topic].pop(transport, None)


async def main(port: int) -> None:
    server = await picows.ws_create_server(
        lambda request: Peer(request.path.decode()), "127.0.0.1", port, backlog=4096
    )
    await server.serve_forever()


uvloop.run(main(int(sys.argv[1])))
