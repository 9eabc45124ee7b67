"""`broker.transport.places`: several places at once, of which one that cannot be had fails no other."""

import socket
from pathlib import Path

import pytest
import trio
from structlog.testing import capture_logs

from broker import Broker, Config, ConfigError
from broker.testing import MemoryListener, Peer, handshake
from broker.transport.places import config_of


@pytest.mark.parametrize(
    ("place", "host", "port", "unix"),
    [
        ("localhost:9502", "localhost", 9502, None),
        ("0.0.0.0:0", "0.0.0.0", 0, None),
        ("[::1]:9503", "::1", 9503, None),
        ("unix:/run/b.sock", "h", 1, "/run/b.sock"),
        ("unix:b:1.sock", "h", 1, "b:1.sock"),
    ],
)
def test_a_place_is_host_and_port_or_a_file(
    place: str, host: str, port: int, unix: str | None
) -> None:
    config = config_of(place, Config(host="h", port=1))
    assert (config.host, config.port) == (host, port)
    assert config.unix == (None if unix is None else Path(unix))


@pytest.mark.parametrize(
    "place",
    ["", ":", "localhost", "localhost:", ":9501", "::1:9501", "h:٣", "h:-1", "h:70000", "unix:"],
)
def test_what_is_no_place_is_refused_where_it_is_written(place: str) -> None:
    with pytest.raises(ValueError):
        Broker().listen(place)


async def greet(stream: trio.abc.Stream) -> None:
    async with Peer(stream) as peer:
        await peer.send(handshake(host="localhost"))
        assert (await peer.receive_head()).startswith("HTTP/1.1 101 ")


async def test_tcp_and_a_unix_socket_are_served_at_once(tmp_path: Path) -> None:
    broker = Broker(Config(host="127.0.0.1", port=0))
    broker.listen(f"unix:{tmp_path}/b.sock")
    broker.listen("127.0.0.1:0")
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            addresses = await nursery.start(broker.serve)
            assert [each.partition(":")[0] for each in addresses] == ["ws", "unix", "ws"]
            for address in addresses:
                if address.startswith("unix:"):
                    await greet(await trio.open_unix_socket(address.removeprefix("unix:")))
                else:
                    port = int(address.rpartition(":")[2])
                    await greet(await trio.open_tcp_stream("127.0.0.1", port))
            with pytest.raises(RuntimeError, match="before `serve`"):
                broker.listen("127.0.0.1:0")
            broker.stop()


async def test_one_that_cannot_be_had_fails_no_other(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        broker = Broker(Config(host="127.0.0.1", port=port))
        broker.listen(f"unix:{tmp_path}/b.sock")
        with trio.fail_after(20), capture_logs() as lines:
            async with trio.open_nursery() as nursery:
                addresses = await nursery.start(broker.serve)
                assert addresses == [f"unix:{tmp_path}/b.sock"]
                await greet(await trio.open_unix_socket(f"{tmp_path}/b.sock"))
                broker.stop()
    (line,) = [line for line in lines if line["event"] == "not_listening"]
    assert f"port {port}" in line["reason"]
    assert "in use" in line["reason"]


async def test_where_none_can_be_had_the_first_is_the_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        broker = Broker(Config(host="127.0.0.1", port=port))
        broker.listen("unix:/nowhere/at/all.sock")
        with pytest.raises(ConfigError, match=f"port {port}"):
            await broker.serve()


async def test_listeners_of_one_s_own_and_places_go_together(tmp_path: Path) -> None:
    broker = Broker()
    broker.listen(f"unix:{tmp_path}/b.sock")
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            memory = MemoryListener()
            addresses = await nursery.start(lambda **s: broker.serve(listeners=[memory], **s))
            assert addresses == ["memory:", f"unix:{tmp_path}/b.sock"]
            await greet(await memory.connect())
            broker.stop()


async def test_listeners_of_one_s_own_are_served_where_no_place_can_be_had() -> None:
    broker = Broker()
    broker.listen("unix:/nowhere/at/all.sock")
    with trio.fail_after(20), capture_logs() as lines:
        async with trio.open_nursery() as nursery:
            memory = MemoryListener()
            await nursery.start(lambda **s: broker.serve(listeners=[memory], **s))
            await greet(await memory.connect())
            broker.stop()
    assert [line["event"] for line in lines].count("not_listening") == 1


async def test_a_place_that_others_can_reach_is_warned_about_and_counts_for_origins(
    tmp_path: Path,
) -> None:
    """A page opened from a file may connect where only this machine can; not once others can."""
    for place, status in ((f"unix:{tmp_path}/b.sock", 101), ("0.0.0.0:0", 403)):
        broker = Broker(Config(host="127.0.0.1", port=0))
        broker.listen(place)
        with trio.fail_after(20), capture_logs() as lines:
            async with trio.open_nursery() as nursery:
                first, *_ = await nursery.start(broker.serve)
                port = int(first.rpartition(":")[2])
                async with Peer(await trio.open_tcp_stream("127.0.0.1", port)) as peer:
                    await peer.send(handshake(headers={"Origin": "null"}, host="localhost"))
                    assert (await peer.receive_head()).startswith(f"HTTP/1.1 {status} ")
                broker.stop()
        exposed = [line for line in lines if line["event"] == "exposed"]
        assert len(exposed) == (status == 403)
