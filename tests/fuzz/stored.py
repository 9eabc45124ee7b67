"""Targets of what is stored: the rows of a log in SQLite, and what nodes say to each other by Redis."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, cast
from zlib import crc32

import structlog
import trio
from trio.testing import MockClock

from broker.core.messages import ClientInfo, Publication
from broker.engines.records import (
    LENGTH,
    BadRecord,
    Batch,
    Begin,
    Forgotten,
    Meta,
    Older,
    Once,
    Publisher,
    Removed,
    Renewed,
    Run,
    Stands,
    Value,
    decode_meta,
    encode,
    join,
)
from broker.engines.sqlite import SqliteEngine
from broker.engines.sqlite_file import LogFile
from broker.errors import ConfigError
from broker.routing import mail
from broker.testing import wait_in_line
from tests.fuzz.target import target

WALL: Final = 1_700_000_000.0
ROOM: Final = 2**24
LITTLE: Final = 128
"""Bytes of a piece: a topic that keeps two publications has two."""


class _File:
    """A log of these rows, as it is read at a start."""

    path = Path("log.db")

    def __init__(self, rows: list[bytes]) -> None:
        self._rows = rows
        self.meta = Meta()
        self.last_seq = len(rows)
        self.bytes = sum(map(len, rows))

    def rows(self) -> Iterator[bytes]:
        yield from self._rows


def _engine_of(rows: list[bytes]) -> SqliteEngine:
    """The engine that has read these rows. Raises `ConfigError`."""
    file = cast(LogFile, _File(rows))
    engine = SqliteEngine(file, "power", ROOM, ROOM, lambda: WALL, wait_in_line, ROOM, LITTLE)
    engine.replay(trio.current_time(), WALL)
    return engine


async def _replay(rows: list[bytes]) -> None:
    """A log is read, and written anew, and read again: the same is kept each time."""
    try:
        engine = _engine_of(rows)
    except ConfigError as error:
        assert "\n" not in str(error)
        return
    anew = [join(piece.records) for piece in engine._pieces()]
    again = _engine_of(anew)
    assert _kept(again) == _kept(engine)


def _kept(engine: SqliteEngine) -> tuple[Any, ...]:
    store, now = engine._store, trio.current_time()
    topics = {}
    for topic in store.topics():
        state = store.state(topic)
        assert state is not None
        position, history = state
        # When each of them goes is by its own time, in whole milliseconds.
        ring = [] if history is None else [(round(now - at), each) for at, each in history.dated()]
        topics[topic] = position, [each for _, each in ring]
    values = {value.topic: value for value in engine.retained.values()}
    return topics, values


BY: Final = Publisher("7", "ann", b"{}", None)
AT: Final = int(WALL * 1000) - 5000
RECORDS: Final = (
    Begin("a", "epoch", 3),
    Run("a", AT, 10, 60.0, [Batch([b"1", b'"two"'], BY, {"k": "v"}), Batch([b"\0"], opaque=True)]),
    Run("b", AT, 1, 1e9, [Batch([b"3"])], retain=True, key="once", owner="ann"),
    Removed("a"),
    Forgotten("b"),
    Renewed("salt"),
    Value("c", 0, Batch([b"5"])),
    Once("a", "key", None, AT, 4, "epoch"),
    Stands("a", "epoch", 3),
    Older("a", "epoch", 2, 3, [Run("a", AT, 10, 60.0, [Batch([b"6"])])], True),
)


@target(
    "sqlite_rows",
    *(join([encode(each)])[LENGTH:] for each in RECORDS),
    join([encode(each) for each in RECORDS])[LENGTH:],
    join([encode(each) for each in RECORDS[-2:]])[LENGTH:],
    join([encode(each) for each in (*RECORDS[:2], *RECORDS[1:3], *RECORDS[5:])])[LENGTH:],
    words=(
        *(join([encode(each)])[LENGTH:] for each in RECORDS[:3]),
        b"\xc0", b"\x90", b"\x91", b"\xcb\x7f\xf8\0\0\0\0\0\0", b"\xcb\xff\xf0\0\0\0\0\0\0", b"\xff", b"\xd3\x80" + bytes(7),
        b"\xcf" + b"\xff" * 8, b"\xa0", b"\0\0\0\1", b"\xc4\1\n",
    ),
    share=12,
)  # fmt: skip
def sqlite_rows(data: bytes) -> None:
    """A row with a right checksum is what we have written, or the file is called damaged; and so is any
    with a wrong one."""
    row = crc32(data).to_bytes(LENGTH) + data
    with structlog.testing.capture_logs():
        trio.run(_replay, [row], clock=MockClock())
        trio.run(_replay, [join([encode(RECORDS[0])]), data], clock=MockClock())
    try:
        decode_meta(data)
    except BadRecord:
        pass


# what nodes say to each other

INFO: Final = ClientInfo("7", "ann", b"{}", None)
NOTES: Final[tuple[mail.Envelope, ...]] = (
    mail.Note(mail.Direct("fd:7", [Publication("fd:7", b"1", INFO)], [7])),
    mail.Note(mail.Pushed(7, "text", b"x")),
    mail.Call(3, mail.Asked(4, "fd:7", b"{}", INFO, 5.0)),
    mail.Note(mail.Dealt("a", "g", [Publication("a", b"1")], [], "close", ["n"])),
    mail.Call(5, mail.ListConnections([], 0, 10, "ann")),
    mail.Note(mail.Came("a", INFO)),
    mail.Result(3, b"{}"),
    mail.Result(3, code=107, message="bad"),
    mail.Call(6, mail.Subscribe([1, 2], "a", b"{}", None, True)),
)


@target(
    "mail", *(mail.write(each) for each in NOTES),
    words=(b"\x93", b"\xa4note", b"\xa4call", b"\xa6result", b"\xc0", b"\xa6direct", b"\x81", b"\xcf" + b"\xff" * 8),
)  # fmt: skip
def between_nodes(data: bytes) -> None:
    """A message of another node is one that we could have written, or a `ValueError`."""
    try:
        envelope = mail.read(data)
    except ValueError:
        return
    assert mail.read(mail.write(envelope)) == envelope
