"""Open files, and the places that they give: who is let in, and who gives way to whom.

An accepted stream is a *guest* until its request makes it a connection. A file goes to a connection,
to a guest, or to the broker itself: listeners, logs, requests to backends, the app.

Rules:

1. No stranger takes a file that is kept for others: connections leave room for guests, and both
   leave room for the broker itself.
2. A newcomer always gets a place. Where there is none left, the oldest guest of the kind that holds
   most gives way: so silent sockets push out one another, and not a guest that asks `/healthz`.
3. A connection gives way to nobody. A backend that has shown the key gives way to no stranger.
4. A refusal costs no file for long: of those that are read on after their answer there are few, and
   they give way first.
"""

import resource
import sys
from collections.abc import Callable
from enum import StrEnum
from functools import lru_cache
from typing import Final

import attrs
import trio

from broker.config.reload import Settings
from broker.errors import HeadError
from broker.transport.sockets import socket_below

OWN_FILES: Final = 128
"""Kept for the broker itself: about 12 are open at a start, and a client of backends opens up to 100
at once."""

GUEST_FILES: Final = 128
"""Kept for guests however many connections there are. A request and its answer take 10 ms, so that
is ten thousand a second."""

MAX_GUESTS: Final = 1024
"""Guests at once where `max_connections` is less. An idle one costs 10 KiB; Apache and nginx serve
some hundreds at once by default."""

LINGERERS: Final = 64
"""Refused peers that are read on at once, so that no reset destroys their answer: it reaches them
within a round trip, and that is 64 ms at a thousand refusals a second."""


@attrs.frozen
class Capacity:
    """The number of places: of connections, of all guests, and of guests with the key."""

    connections: int
    guests: int
    backends: int
    files: int
    """Files that accepted streams may hold, all together."""
    connection_files: int
    """Of these, files that connections may hold."""

    @classmethod
    @lru_cache(maxsize=8)
    def of(
        cls, max_connections: int | None, file_limit: int, own_files: int = OWN_FILES
    ) -> "Capacity":
        """The places by a setting and the limit on open files.

        The reserves are half of a small limit at most, so a test with 64 files has 32 connections.
        """
        own, for_guests = (min(kept, file_limit // 4) for kept in (own_files, GUEST_FILES))
        files = file_limit - own
        connection_files = max(1, files - for_guests)
        connections = connection_files if max_connections is None else max_connections
        return cls(
            connections,
            max(MAX_GUESTS, connections),
            max(1, for_guests // 2),
            files,
            connection_files,
        )


class Stage(StrEnum):
    """The stages of an accepted stream, and how it gives way in each."""

    SILENT = "silent"
    """Its request head is not read yet."""
    ASKING = "asking"
    """It is an HTTP request, or several of them."""
    LINGERING = "lingering"
    """It was refused, and is read on for a while."""
    BACKEND = "backend"
    """It has shown the key of the HTTP API."""
    CONNECTED = "connected"
    """It is a connection, from its handshake to the end of its close hook."""
    GONE = "gone"


@attrs.define(eq=False)
class Guest:
    """One accepted stream. `gave_way` once its place was given to another: `scope` is cancelled."""

    holds_file: bool
    scope: trio.CancelScope | None = attrs.field(factory=trio.CancelScope)
    """Around all that is done for it; None of a connection, which gives way to nobody."""
    stage: Stage = Stage.SILENT
    gave_way: bool = False


def file_limit() -> int:
    """How many files this process may have open now (`ulimit -n`)."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


@attrs.define(eq=False)
class Admission:
    """Gives out the places. No method waits."""

    settings: Settings
    file_limit: Callable[[], int] = file_limit
    capacity: Capacity = attrs.field(init=False)
    """By the settings of now, and the limit on open files as it was when it was last asked whether there is room
    for more: the system may change it any time."""
    _guests: dict[Stage, dict[Guest, None]] = attrs.field(init=False)
    _by_stream: dict[trio.abc.Stream, Guest] = attrs.field(init=False, factory=dict)
    _files: int = attrs.field(init=False, default=0)
    _connection_files: int = attrs.field(init=False, default=0)

    def __attrs_post_init__(self) -> None:
        self._guests = {stage: {} for stage in Stage if stage is not Stage.GONE}
        self.settings.watch(self._count_places)
        self._count_places()

    def __len__(self) -> int:
        """Streams that are not closed yet, those among them that give way."""
        return len(self._by_stream)

    def count(self, *stages: Stage) -> int:
        """Streams in these stages; without any, all that are here."""
        counted = map(self._guests.__getitem__, stages) if stages else self._guests.values()
        return sum(map(len, counted))

    @property
    def _own_files(self) -> int:
        return OWN_FILES + self.settings.config.webhooks.most_requests

    def _count_places(self) -> None:
        most = self.settings.config.max_connections
        self.capacity = Capacity.of(most, self.file_limit(), self._own_files)

    def welcome(self, stream: trio.abc.Stream) -> Guest:
        """Give a place to an accepted stream, until `see_off`. Another may have to give way."""
        guest = Guest(holds_file=socket_below(stream) is not None)
        self._by_stream[stream] = guest
        self._enter(guest, Stage.SILENT)
        if not self.has_room(0):
            self.make_room()
        return guest

    def has_room(self, streams: int) -> bool:
        """Whether so many streams more may come, and nobody has to give way."""
        if streams:
            self._count_places()  # once for all of them: it is a system call
        guests = self.count() - len(self._guests[Stage.CONNECTED])
        capacity = self.capacity
        return guests + streams <= capacity.guests and self._files + streams <= capacity.files

    def see_off(self, stream: trio.abc.Stream) -> None:
        """Take the place of a stream back, which is closed by now."""
        self._leave(self._by_stream.pop(stream))

    def make_room(self) -> None:
        """Have one guest give way, if there is any that can."""
        lingering, silent, asking = (
            self._guests[stage] for stage in (Stage.LINGERING, Stage.SILENT, Stage.ASKING)
        )
        crowd = lingering or (silent if len(silent) >= len(asking) else asking)
        for oldest in crowd:
            self._send_away(oldest)
            return

    def ask(self, guest: Guest) -> None:
        """Its request head is here."""
        self._move(guest, Stage.ASKING)

    def linger(self, guest: Guest) -> None:
        """It was refused, and is read on; the oldest of these makes room for it."""
        self._move(guest, Stage.LINGERING)
        lingering = self._guests[Stage.LINGERING]
        if len(lingering) > LINGERERS:
            self._send_away(next(iter(lingering)))

    def trust(self, stream: trio.abc.Stream) -> None:
        """It has shown the key of the HTTP API. Beyond `Capacity.backends` that counts for nothing."""
        guest = self._by_stream.get(stream)
        if guest is None or guest.stage is Stage.BACKEND:
            return
        if len(self._guests[Stage.BACKEND]) < self.capacity.backends:
            self._move(guest, Stage.BACKEND)

    def check_connections(self) -> None:
        """Raise `HeadError` (503) if there is no place for a connection more."""
        capacity = self.capacity
        is_full = len(self._guests[Stage.CONNECTED]) >= capacity.connections
        if is_full or self._connection_files >= capacity.connection_files:
            raise HeadError(503, "too many connections")

    def connect(self, guest: Guest) -> None:
        """Make it a connection. Raises `HeadError` (503) if there is no place for one."""
        self.check_connections()
        if guest.gave_way:
            raise HeadError(503, "too many connections")
        self._move(guest, Stage.CONNECTED)
        guest.scope = None

    def warning(self) -> str | None:
        """Say in one line that `max_connections` is more than there are files for; None if not."""
        wanted, limit = self.settings.config.max_connections, self.file_limit()
        own_files = self._own_files
        fits = Capacity.of(None, limit, own_files).connections
        if wanted is None or wanted <= fits:
            return None
        return (
            f"max_connections is {wanted}, but with {limit} open files (`ulimit -n`) there is room "
            f"for {fits}, as {limit - fits} are kept for all else; raise that limit to "
            f"{wanted + own_files + GUEST_FILES} (systemd: LimitNOFILE), or set max_connections to "
            f"{fits}"
        )

    def _move(self, guest: Guest, stage: Stage) -> None:
        if guest.stage is not Stage.GONE:
            self._leave(guest)
            self._enter(guest, stage)

    def _enter(self, guest: Guest, stage: Stage) -> None:
        guest.stage = stage
        self._guests[stage][guest] = None
        self._files += guest.holds_file
        self._connection_files += guest.holds_file and stage is Stage.CONNECTED

    def _leave(self, guest: Guest) -> None:
        if guest.stage is not Stage.GONE:
            del self._guests[guest.stage][guest]
            self._files -= guest.holds_file
            self._connection_files -= guest.holds_file and guest.stage is Stage.CONNECTED
            guest.stage = Stage.GONE

    def _send_away(self, guest: Guest) -> None:
        # Its file is closed within a tick; until then the broker's own reserve bears it.
        self._leave(guest)
        guest.gave_way = True
        if guest.scope is not None:
            guest.scope.cancel()
