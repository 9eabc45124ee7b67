"""The records of a log, in the order in which they count.

A commit is one row of records. Read from the first row to the last, they give all that is kept; **offsets are
not in them**: they follow from the order, by the same steps before a restart and after it. So a commit that
fails leaves no hole. Only what is copied when the log is cleaned stands out of order, and says its offsets.

Rule: a format that was once written can be read for good. A record may get fields at its end, with
defaults; anything else is another `FORMAT`, which older brokers refuse.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Final, TypeAlias
from zlib import crc32

import msgspec
from msgspec import Struct

from broker.config.engine_url import Sync
from broker.core.messages import ClientInfo, Publication, Series

FORMAT: Final = 2
"""Stands in the file itself; a broker opens what has this number or a lower one. `Stands` and `Older` came
with 2."""


class Publisher(Struct, array_like=True, frozen=True):
    """The client behind publications, as `ClientInfo`."""

    client: str
    user: str
    conn_info: bytes | None
    chan_info: bytes | None


class Batch(Struct, array_like=True):
    """Publications of one publisher, with the same tags."""

    data: list[bytes]
    by: Publisher | None = None
    tags: dict[str, str] | None = None
    opaque: bool = False

    @classmethod
    def of(cls, publications: Sequence[Publication]) -> "Batch":
        first = publications[0]
        info = first.info
        by = None
        if info is not None:
            by = Publisher(info.client, info.user, info.conn_info, info.chan_info)
        tags = None if first.tags is None else dict(first.tags)
        if isinstance(publications, Series):
            return cls([*publications.contents], by, tags, first.opaque)
        return cls([each.data for each in publications], by, tags, first.opaque)

    def publications(self, topic: str) -> Sequence[Publication]:
        """The same again, without offsets."""
        by, tags, opaque = self.by, self.tags, self.opaque
        info = None
        if by is not None:
            info = ClientInfo(by.client, by.user, by.conn_info, by.chan_info)
        if tags is None:
            return Series(topic, self.data, info, 0, opaque)
        return [Publication(topic, data, info, 0, 0, tags, opaque) for data in self.data]


class Run(Struct, array_like=True, tag=1):
    """Publications to one topic in a row. `at` is in Unix milliseconds.

    The topic then keeps the last `size` of the last `ttl` seconds; with a size of 0 these are not
    kept. `key` is the idempotency key of a single one, and `owner` whose.
    """

    topic: str
    at: int
    size: int
    ttl: float
    batches: list[Batch]
    retain: bool = False
    key: str = ""
    owner: str | None = None


Offset: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Begin(Struct, array_like=True, tag=2):
    """A topic is in this epoch, at this offset, and keeps nothing but what the next runs bring."""

    topic: str
    epoch: str
    top: Offset


class Removed(Struct, array_like=True, tag=3):
    """The publications of a topic were removed; its epoch and count go on."""

    topic: str


class Forgotten(Struct, array_like=True, tag=4):
    """A topic has neither publications nor an epoch."""

    topic: str


class Renewed(Struct, array_like=True, tag=5):
    """All epochs up to here have other names, made of the old ones and `salt`."""

    salt: str


class Value(Struct, array_like=True, tag=6):
    """The value that a topic retains: a batch of one."""

    topic: str
    offset: Offset
    batch: Batch


class Once(Struct, array_like=True, tag=7):
    """A publish with a key was kept: there, or where the offset is 0 in no history."""

    topic: str
    key: str
    owner: str | None
    at: int
    offset: Offset
    epoch: str


class Stands(Struct, array_like=True, tag=8):
    """A topic is in this epoch, at this offset. Its publications are known from before, or follow as `Older`."""

    topic: str
    epoch: str
    top: Offset


class Older(Struct, array_like=True, tag=9):
    """A copy of some publications of a topic, from the offset `first` on; see `engines.copies`.

    All before the offset `front` are gone, and with the last piece the topic has all others.
    """

    topic: str
    epoch: str
    front: Offset
    first: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
    runs: list[Run]
    is_last: bool


Record: TypeAlias = Run | Begin | Removed | Forgotten | Renewed | Value | Once | Stands | Older


class Meta(Struct, array_like=True, frozen=True):
    """Facts about the whole file, in a row of its own that is replaced."""

    boot_id: str = ""
    """Of the machine's run in which the file was opened last."""
    sync: Sync = "power"
    is_clean: bool = True
    """Whether it was closed in good order, so that all that was acknowledged is here."""
    next_fd: int = 1
    """No connection has had this fd or a higher one."""


encode: Callable[[Any], bytes] = msgspec.msgpack.Encoder().encode
_decoder: Final = msgspec.msgpack.Decoder(Record)
_meta_decoder: Final = msgspec.msgpack.Decoder(Meta)
LENGTH: Final = 4
"""Bytes of the length in front of each record, and of the checksum in front of a row."""


class BadRecord(ValueError):
    """A row does not hold what we write."""


def join(records: Sequence[bytes]) -> bytes:
    """A row of records that are encoded already, behind a checksum; nothing for none."""
    if not records:
        return b""
    body = b"".join([part for each in records for part in (len(each).to_bytes(LENGTH), each)])
    return crc32(body).to_bytes(LENGTH) + body


def split(row: bytes) -> Iterator[Record]:
    """The records of a row. Raises `BadRecord`."""
    # SQLite finds a page that is out of place, not a bit that has changed.
    if crc32(memoryview(row)[LENGTH:]) != int.from_bytes(row[:LENGTH]):
        raise BadRecord("the checksum of a row is wrong")
    place = LENGTH
    while place < len(row):
        size = int.from_bytes(row[place : place + LENGTH])
        place += LENGTH
        if place + size > len(row):
            raise BadRecord("a record is cut short")
        try:
            yield _decoder.decode(memoryview(row)[place : place + size])
        except msgspec.DecodeError as error:
            raise BadRecord(str(error)) from None
        place += size


def decode_meta(row: bytes) -> Meta:
    """Raises `BadRecord`."""
    try:
        return _meta_decoder.decode(row)
    except msgspec.DecodeError as error:
        raise BadRecord(str(error)) from None
