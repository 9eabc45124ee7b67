"""Compression with peers that we did not write: websockets, wsproto's, ws under Node with the official SDK."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import structlog.testing
import trio
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.sync.client import connect

from broker import Broker, Config, Connection, Frame
from tests.conftest import Process

SDK = Path(__file__).parent / "sdk"
TEXTS = ["", "short", "naïve ☃ " * 200, '{"price": 101.25, "volume": 1200}' * 30, "x" * 200_000]

OFFERS = [
    {},
    {"client_no_context_takeover": True},
    {"server_no_context_takeover": True, "server_max_window_bits": 10},
    {"client_max_window_bits": 9, "server_max_window_bits": 12},
]


@pytest.mark.parametrize("keeps", [False, True], ids=["alone", "context"])
@pytest.mark.parametrize("offer", OFFERS, ids=str)
async def test_websockets_understands_and_is_understood(offer: dict[str, Any], keeps: bool) -> None:
    broker = Broker(
        Config(host="127.0.0.1", port=0, compression=True, compression_client_context=keeps)
    )

    @broker.on_message
    async def echo(connection: Connection, frame: Frame) -> None:
        broker.push(connection.fd, frame.data)

    def talk(address: str) -> None:
        factory = ClientPerMessageDeflateFactory(**{"client_max_window_bits": True, **offer})
        with connect(address, extensions=[factory], compression=None) as socket:
            assert socket.response is not None
            answer = socket.response.headers["Sec-WebSocket-Extensions"]
            assert answer.startswith("permessage-deflate; server_no_context_takeover")
            for text in TEXTS * 2:
                socket.send(text)
                assert socket.recv() == text
                socket.send([text[:3], text[3:]])  # in two fragments
                assert socket.recv() == text
                socket.send(text.encode())
                assert socket.recv() == text.encode()

    with structlog.testing.capture_logs():
        async with trio.open_nursery() as nursery:
            (address, *_) = await nursery.start(broker.serve)
            await trio.to_thread.run_sync(talk, address)
            services = broker.node.services
            assert services.compression.inflated.messages >= 3 * len(TEXTS)
            assert (
                services.compression.packing.bytes_after < services.compression.packing.bytes_before
            )
            broker.stop()


NODE = """
import WebSocket from "ws";
import { Centrifuge } from "centrifuge";
const sockets = [];
class Deflating extends WebSocket {
  constructor(url, protocols) {
    super(url, protocols, { perMessageDeflate: { threshold: 0 } });
    sockets.push(this);
  }
}
const client = new Centrifuge(`${process.argv[1]}/connection/websocket`, { websocket: Deflating });
const news = client.newSubscription("news");
const text = "one and the same ".repeat(200);
news.on("publication", ({ data }) => {
  if (data.text !== text) throw new Error("not what was published");
  console.log(sockets[0].extensions, sockets[0]._socket.bytesRead);
  process.exit(0);
});
news.on("subscribed", () => news.publish({ text }));
news.subscribe();
client.connect();
setTimeout(() => process.exit(1), 8000);
"""


@pytest.mark.sdk
def test_the_javascript_sdk_with_ws_gets_compressed_messages(
    start_broker: Callable[..., Process],
    missing: Callable[[str], NoReturn],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not (SDK / "node_modules" / "ws").is_dir():
        missing("ws is not installed: run `npm ci` in tests/sdk, or `nox -s sdk_js`")
    monkeypatch.setenv("BROKER_COMPRESSION", "true")
    broker = start_broker()
    done = subprocess.run(
        ["node", "--input-type=module", "-e", NODE, broker.ws],
        cwd=SDK,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    extension, came = done.stdout.split()
    assert extension == "permessage-deflate"
    assert int(came) < 1500  # of the 3,400 bytes that were published
