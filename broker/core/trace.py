"""The entries that one trace has noted and its reader has yet to take.

Rules:

1. A trace never slows down what it looks at: it holds `ENTRIES_MOST` entries at most, each with
   `TEXT_MOST` characters, and takes `RATE` a second. Entries that do not fit are counted, and the reader is
   told how many they were, and where.
2. Secrets stay inside: tokens, sessions and headers of a `connect` are not shown.
3. Time is an argument.
"""

import re
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Final

import attrs
from msgspec import Struct, structs

from broker.core.messages import Fd
from broker.core.usage import Bucket

ENTRIES_MOST: Final = 1000
"""Entries that wait to be taken: ten screens."""

ENTRY_BYTES: Final = 300
"""An entry besides its text."""

TEXT_MOST: Final = 500
"""Characters of what is shown of one message: some lines of a terminal."""

RATE: Final = 500.0
"""Entries a second, of which each takes 3 µs: nobody reads faster, and the one traced has no say in it."""


@attrs.frozen
class Target:
    """The connection, the user or the topic that is traced: the one field that is not empty."""

    fd: Fd = 0
    user: str = ""
    topic: str = ""
    """A topic or a pattern."""


class Entry(Struct, frozen=True, omit_defaults=True, gc=False):
    """One thing that a trace has seen. `time` is in Unix seconds.

    `kind` is `received` or `sent` for a message of a client's connection, `published` for a publication
    to the topic, else that of an event: `connected`, `bound`, `subscribed`, `unsubscribed`,
    `disconnected`. `fd` and `user` are the client's, `size` the bytes of the message, and `text` as much
    of it as is shown; where it `is_cut` there is more. `missed` entries were left out right before this.
    """

    time: float
    kind: str
    fd: Fd = 0
    user: str = ""
    topic: str = ""
    offset: int = 0
    size: int = 0
    text: str = ""
    is_cut: bool = False
    missed: int = 0


@attrs.define(eq=False)
class TraceBuffer:
    """See the module."""

    bytes_held: int = attrs.field(init=False, default=0)
    missed: int = attrs.field(init=False, default=0)
    """Left out since the last entry that is here."""
    _bucket: Bucket = attrs.field(init=False, factory=Bucket)
    _entries: deque[Entry] = attrs.field(init=False, factory=deque)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entries: Iterator[Entry], count: int, now: float) -> None:
        """Add the first of `count` entries, as many as fit now. The others are counted and not even made: so
        they cost nothing."""
        left = int(self._bucket.left(RATE, ENTRIES_MOST, now))
        fitting = min(count, ENTRIES_MOST - len(self._entries), left)
        self._bucket.take(fitting, RATE, now)
        for entry in islice(entries, fitting):
            if self.missed:
                entry = structs.replace(entry, missed=self.missed)
                self.missed = 0
            self.bytes_held += ENTRY_BYTES + len(entry.text)
            self._entries.append(entry)
        self.missed += count - fitting

    def take_missed(self) -> int:
        """How many were left out behind the last entry that was taken; they are told once."""
        missed, self.missed = self.missed, 0
        return missed

    def take(self, most: int = ENTRIES_MOST) -> list[Entry]:
        """The oldest entries, at most so many, which then are no longer here."""
        taken = [self._entries.popleft() for _ in range(min(most, len(self._entries)))]
        self.bytes_held -= sum([ENTRY_BYTES + len(entry.text) for entry in taken])
        return taken


_SECRETS: Final = re.compile(
    r'("(?:token|session)"\s*:\s*")(?:[^"\\]|\\.)*|("headers"\s*:\s*\{)[^}]*'
    # A JSON Web Token wherever it stands, such as in protobuf: it begins with `{"` in base64.
    r"|(eyJ)[\w.-]+"
)


START_MOST: Final = 4 * TEXT_MOST
"""Bytes in which there are as many characters as are shown."""


def shown_text(start: bytes, size: int) -> tuple[str, bool]:
    """A message of `size` bytes that begins so, as text in which no secret stands; and whether there is
    more of it. Bytes that are no UTF-8 are shown as `\\xff`."""
    text = start[:START_MOST].decode(errors="backslashreplace")
    shown = _SECRETS.sub(_hidden, text[:TEXT_MOST])
    return shown, size > len(start) or len(text) > TEXT_MOST


def _hidden(found: re.Match[str]) -> str:
    return "".join(filter(None, found.groups())) + "…"
