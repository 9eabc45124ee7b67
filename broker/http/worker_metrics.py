"""The metrics of all workers in the answer of one: whichever is scraped asks the others.

A worker answers the others on a Unix socket in a directory that only this user may enter: each that connects
gets its text and the end. So no key goes there, and no number goes through the supervisor.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

import structlog
import trio

from broker.http.metrics import exposition
from broker.node import Node
from broker.transport.listeners import accept_streams

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker.http")

ANSWER_SECONDS: Final = 3.0
"""For a worker's text: ten thousand connections take 25 ms. One that hangs must not make the scrape
late, which Prometheus gives up after 10 s."""

_SAMPLE: Final = re.compile(rb"^([A-Za-z_:][A-Za-z0-9_:]*)(\{(.*)\})? (.*)$")


async def exposition_of_all(node: Node) -> bytes:
    """The metrics of this worker and all others as text, each sample with a label `worker`.

    One that does not answer in `ANSWER_SECONDS` is left out, and has `broker_worker_up` 0.
    """
    texts: dict[int, bytes | None] = {}

    async def ask(number: int, path: Path) -> None:
        texts[number] = None
        with trio.move_on_after(ANSWER_SECONDS), suppress(OSError, trio.BrokenResourceError):
            texts[number] = await _read(path)

    async with trio.open_nursery() as nursery:
        for number, path in node.others.items():
            nursery.start_soon(ask, number, path)
        texts[node.worker] = await exposition(node)
    return merged(texts)


async def _read(path: Path) -> bytes:
    text = bytearray()
    async with await trio.open_unix_socket(path) as stream:
        async for chunk in stream:
            text += chunk
    return bytes(text)


async def serve_others(node: Node, listener: trio.SocketListener) -> None:
    """Give this worker's text to each that connects, until cancelled; then the listener is closed."""
    async with trio.open_nursery() as nursery:

        def take(stream: trio.abc.Stream) -> None:
            nursery.start_soon(_answer, node, stream)

        await accept_streams(listener, take, lambda: None)


async def _answer(node: Node, stream: trio.abc.Stream) -> None:
    with trio.move_on_after(ANSWER_SECONDS), suppress(trio.BrokenResourceError):
        async with stream:
            await stream.send_all(await exposition(node))


def merged(texts: Mapping[int, bytes | None]) -> bytes:
    """One text of those of several workers. None: a worker that has not answered."""
    families: dict[bytes, list[bytes]] = {}
    for number, text in sorted(texts.items()):
        head: list[bytes] = []
        family: list[bytes] = []
        for line in (text or b"").splitlines():
            if line.startswith(b"# HELP "):
                head = [line]
            elif line.startswith(b"# TYPE "):
                family = families.setdefault(line, [*head, line])
            elif (found := _SAMPLE.match(line)) is not None:
                labels = b",".join(filter(None, (b'worker="%d"' % number, found[3])))
                family.append(b"%b{%b} %b" % (found[1], labels, found[4]))
    up = [
        b'broker_worker_up{worker="%d"} %d' % (number, text is not None)
        for number, text in sorted(texts.items())
    ]
    families[b"up"] = [
        b"# HELP broker_worker_up 1 where a worker has answered whoever was scraped.",
        b"# TYPE broker_worker_up gauge",
        *up,
    ]
    return b"\n".join([line for family in families.values() for line in family]) + b"\n"
