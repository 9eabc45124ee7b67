"""Operators: people who run this broker, let in at the dashboard's door by a key (ADR 30).

Rules:

1. A key opens one door, `DOOR`, and is looked at there alone. It stands in no URL, no cookie and no
   header, so no page of somebody else's can have a browser show it.
2. A right is asked for at the act, by the keys of now: nobody may do anything more with a key that is no
   longer set, however long ago he logged in.
3. A stranger who guesses is slowed down, by the address that he comes from. Meanwhile the right key is not
   looked at either, so that further guesses tell him nothing.
"""

import hmac
from collections.abc import Awaitable, Callable, Mapping
from enum import StrEnum
from typing import Any, Final, Protocol

import attrs
from msgspec import Struct

from broker.config.reload import Settings
from broker.core.messages import Fd
from broker.core.usage import Bucket

PAGE: Final = "/admin"
DOOR: Final = "/admin/websocket"
"""Below the page, so that a proxy which guards the one guards the other."""

GUESSES: Final = 10
"""Wrong keys from one place at once: a person who has three keys, and mistypes each."""

SECONDS_PER_GUESS: Final = 6.0
"""Then one in so many seconds: 5 million in a year, of which a key of 10 random letters has 27 million
times as many."""

MAX_PLACES: Final = 1024
"""Places that are remembered; then the one that guessed longest ago is forgotten. 200 KB."""


class Role(StrEnum):
    """The rights of an operator."""

    VIEW = "view"
    """May look at everything, payloads among it, and change nothing."""
    FULL = "full"
    """May act as well."""


class KeyRefused(Exception):
    """A key does not let its bearer in; the message is for both the log and the page."""


@attrs.frozen
class Operator:
    """The right of one login: a role, and the key that gave it."""

    role: Role
    key: str = attrs.field(repr=False)


class Asker(Protocol):
    """An operator's session, as what he asks for sees it."""

    @property
    def fd(self) -> Fd: ...
    @property
    def address(self) -> str: ...
    @property
    def is_behind(self) -> bool:
        """Whether he has yet to take what he was told before."""

    def tell(self, data: bytes) -> bool:
        """Send raw JSON on `$admin`; false if he is behind, or has gone. Never waits."""

    def start_task(self, work: Callable[[], Awaitable[object]]) -> None:
        """Start a task that ends with his connection at the latest."""

    def check(self, role: Role) -> None:
        """Raise `Refused` (103) unless he may still do what takes this role."""


@attrs.frozen
class Method:
    """Something that operators may ask for. It either looks, which may take its turns, or acts, in one
    step. Both get the parameters, and the operator who asks; what they return goes out as JSON."""

    params: type[Struct]
    role: Role
    look: Callable[[Any, Asker], Awaitable[object]] | None = None
    act: Callable[[Any, Asker], object] | None = None


class Operators:
    """The keys of one broker, and who has guessed at them."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._guesses: dict[str, Bucket] = {}

    @property
    def enabled(self) -> bool:
        """Whether there is a dashboard: any key is set."""
        return bool(self._keys())

    def guards(self, route: str) -> bool:
        """Whether a WebSocket on this route is an operator's."""
        return route == DOOR and self.enabled

    def admit(self, shown: str, place: str, now: float) -> Operator:
        """The right that a key gives to somebody who comes from a place. Raises `KeyRefused`.

        The comparisons take as long for any key of a length.
        """
        guesses = self._guesses.pop(place, None)
        rate = 1 / SECONDS_PER_GUESS
        if guesses is not None and not guesses.is_full(rate, now):
            self._guesses[place] = guesses
            if not guesses.has(1, rate, GUESSES, now):
                raise KeyRefused(
                    f"too many wrong keys: wait {SECONDS_PER_GUESS:g} s, and try again"
                )
        found = None
        for role, key in self._keys().items():
            if hmac.compare_digest(shown.encode(errors="surrogatepass"), key.encode()):
                found = Operator(role, key)
        if found is None:
            guesses = self._guesses.setdefault(place, Bucket())
            guesses.take(1, rate, now)
            while len(self._guesses) > MAX_PLACES:
                del self._guesses[next(iter(self._guesses))]
            raise KeyRefused("wrong key" if shown else "no key")
        return found

    def may(self, operator: Operator, role: Role) -> bool:
        """Whether a login still gives this role: its key is the one that is set now, and enough."""
        if self._keys().get(operator.role) != operator.key:
            return False
        return role is Role.VIEW or operator.role is Role.FULL

    def _keys(self) -> Mapping[Role, str]:
        config = self._settings.config
        keys = {Role.VIEW: config.admin_view_key, Role.FULL: config.admin_key}
        return {role: key for role, key in keys.items() if key is not None}
