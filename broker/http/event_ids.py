"""The `id` of a server-sent event: where its reader is in each topic, for it to come back to.

A browser keeps the last one and sends it as `Last-Event-ID` when it connects again (HTML, section 9.2.4).
By example::

    news:m1kq:17                 topic, epoch and offset; names are percent-encoded
    news:m1kq:17,a%2Cb:m1kr:3    two topics
    news:m1kq:17,*               and others, for which there was no room
    news:m1kq                    no id of ours: taken for none

Rule 1  An id is a claim of the client's. It says where to go on, never what may be listened to: each topic
        in it still has to be asked for, or given by the server, and each position is checked as any other.
Rule 2  An id has at most `MAX_ID` bytes, however many topics there are. For those that are left out a
        reader that comes back is told that it could not recover.
"""

import re
from collections.abc import Container, Mapping
from typing import Final
from urllib.parse import quote, unquote

import attrs

from broker.core.messages import Position

MAX_ID: Final = 2048
"""Bytes: about 60 topics, in a fourth of the header that nginx takes."""

UNKNOWN: Final = Position(0, "?")
"""Where a reader is in a topic that its id had no room for: in an epoch that there never was."""

_OTHERS: Final = b"*"
_ENTRY = r"[A-Za-z0-9._~%-]+:[A-Za-z0-9._~%-]+:[0-9]{1,15}"
_id = re.compile(rf"(?P<entries>{_ENTRY}(?:,{_ENTRY})*)?(?P<others>(?:^|(?<!^),)\*)?").fullmatch
_OFFSET_DIGITS: Final = 15


@attrs.define(eq=False)
class Positions:
    """Where a reader is, topic by topic; those that do not fit into an id are not kept."""

    _entries: dict[str, tuple[bytes, int]] = attrs.field(init=False, factory=dict)
    _size: int = attrs.field(init=False, default=len(_OTHERS))
    has_others: bool = attrs.field(init=False, default=False)
    """Whether there are topics that were left out."""

    @classmethod
    def read(cls, text: str) -> "Positions":
        """Read what a client sent; nothing from what is not an id, or too long for one."""
        positions = cls()
        match = _id(text) if len(text) <= MAX_ID else None
        if match is None:
            return positions
        for entry in filter(None, (match["entries"] or "").split(",")):
            name, epoch, offset = entry.split(":")
            positions.set(unquote(name, errors="replace"), Position(int(offset), unquote(epoch)))
        positions.has_others = match["others"] is not None
        return positions

    def __bool__(self) -> bool:
        """Whether anything is known."""
        return bool(self._entries) or self.has_others

    @property
    def size(self) -> int:
        """Bytes that an id may take, at most."""
        return self._size

    def __contains__(self, topic: object) -> bool:
        return topic in self._entries

    def set(self, topic: str, position: Position) -> None:
        """The reader is at `position` of this topic from now on."""
        self.forget(topic)
        start = f"{quote(topic, safe='')}:{quote(position.epoch, safe='')}:".encode()
        if self._size + len(start) + _OFFSET_DIGITS + 1 > MAX_ID:
            self.has_others = True
            return
        self._size += len(start) + _OFFSET_DIGITS + 1
        self._entries[topic] = start, position.offset

    def move(self, topic: str, offset: int) -> bool:
        """The reader got the publication with this offset; false if the topic has no position here."""
        entry = self._entries.get(topic)
        if entry is None:
            return False
        self._entries[topic] = entry[0], offset
        return True

    def forget(self, topic: str) -> None:
        entry = self._entries.pop(topic, None)
        if entry is not None:
            self._size -= len(entry[0]) + _OFFSET_DIGITS + 1

    def keep(self, topics: Container[str]) -> None:
        """Forget all other topics."""
        for topic in [each for each in self._entries if each not in topics]:
            self.forget(topic)

    def of(self, asked: Mapping[str, object]) -> dict[str, Position]:
        """The positions that are known, and `UNKNOWN` for those asked for that were left out."""
        there = {
            topic: Position(offset, unquote(start.split(b":")[1].decode()))
            for topic, (start, offset) in self._entries.items()
        }
        if self.has_others:
            there |= {topic: UNKNOWN for topic in asked if topic not in there}
        return there

    def written(self) -> bytes:
        """The id; empty without a position."""
        entries = [b"%b%d" % entry for entry in self._entries.values()]
        return b",".join([*entries, _OTHERS] if self.has_others else entries)
