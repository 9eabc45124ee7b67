"""Messages in protobuf as operators may see them: without tokens, sessions and headers.

In JSON these stand behind their names, so a text without them is found by its looks (`core.trace`). In protobuf
a field has a number for a name, and what it is only the schema tells.

Rule: what cannot be told apart is left out, for there may be a secret in it.
"""

from functools import lru_cache
from typing import Final

from broker.protocols.centrifuge_protobuf import (
    STRING,
    Keyed,
    Many,
    Message,
    Type,
    read_varint,
)
from broker.protocols.commands import BadCommand

SECRETS: Final = frozenset({"token", "session", "headers"})
"""The fields that are not shown, in whatever message."""

HIDDEN: Final = "…".encode()

FIELDS_MOST: Final = 64
"""Of one frame that are looked at, 40 µs: more do not fit into what a trace shows of it, unless they are tiny."""

_LENGTH: Final = 2
_FIXED: Final = {1: 8, 5: 4}


def without_secrets(start: bytes, kind: Message) -> bytes:
    """The beginning of a binary frame of such messages, with `…` in place of each secret: of `COMMAND` what
    clients send, of `REPLY` what they are sent. It ends where the frame cannot be read."""
    walk = _Walk(start)
    try:
        at = 0
        while at < len(start):
            at = walk.content(kind, at, len(start))
    except (IndexError, BadCommand):
        pass
    return b"".join(walk.parts)


class _Walk:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._left = FIELDS_MOST
        self.parts: list[bytes] = []

    def content(self, kind: Type, at: int, end: int, *, is_secret: bool = False) -> int:
        """Walk over what stands behind its length at `at`; return where it ends, in `data` or behind it."""
        length, begin = self._varint(at, end)
        stop = min(begin + length, end)
        if isinstance(kind, Message) and not is_secret:
            self.parts.append(self._data[at:begin])
            self._fields(kind, begin, stop)
        else:
            self.parts += [self._data[at:begin], HIDDEN] if is_secret else [self._data[at:stop]]
        return stop

    def _fields(self, message: Message, at: int, end: int) -> None:
        while at < end:
            self._left -= 1
            if self._left < 0:
                raise BadCommand("more fields than are shown")
            begin = at
            key, at = self._varint(at, end)
            name, kind = message.by_number.get(key >> 3, ("", STRING))
            wire = key & 7
            if wire == _LENGTH:
                self.parts.append(self._data[begin:at])
                at = self.content(_held(kind), at, end, is_secret=name in SECRETS)
                continue
            at = at + _FIXED[wire] if wire in _FIXED else self._varint(at, end)[1]
            if at > end:
                raise BadCommand("a field longer than its message")
            self.parts.append(self._data[begin:at])

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        number, at = read_varint(self._data, at)
        if at > end:
            raise BadCommand("a number longer than its message")
        return number, at


@lru_cache(maxsize=64)
def _held(kind: Type) -> Type:
    """One value of a field; of a map an entry, which is a message."""
    if isinstance(kind, Keyed):
        return Message({"key": (1, STRING), "value": (2, kind.of)})
    return kind.of if isinstance(kind, Many) else kind
