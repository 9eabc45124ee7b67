"""Every way a request, a peer or a start-up can go wrong.

::

    BrokerError
    ├── ConfigError     an option or config file is wrong; nothing was started
    ├── Refused         one request is refused: the peer gets an error reply and stays
    ├── Disconnect      one peer is sent away: it gets a close code and a reason
    ├── HeadError       one HTTP request head is not acceptable: the peer gets a status
    ├── Lagged          an in-process subscriber was too slow and has missed something
    ├── TokenRefused    a token does not let its bearer in
    │   ├── TokenInvalid    not signed by a key of ours, or not for us: it will never be valid
    │   ├── TokenExpired    was valid once, or is not yet: another one may be
    │   └── KeysUnavailable     the key that would tell could not be fetched
    ├── UnrecoverablePosition   (core.history) a position in another epoch: error reply 112
    └── ClientError     what `broker.client` raises
        ├── CannotConnect   no broker was reached, or what answers is none
        ├── Unavailable     the connection is gone and will not come back
        ├── ConnectionLost  the connection dropped before the reply; it comes back by itself
        └── RequestFailed   the broker answered with an error reply

A peer's fault never ends more than that peer. The range of a close code says whether the
peer should come back: official clients stay away on 3500-3999, on 4500-4999 and on 1009, and
reconnect on everything else.
"""

from collections.abc import Iterable, Mapping
from enum import IntEnum


class ErrorCode(IntEnum):
    """Error replies, numbered as the Centrifuge client protocol numbers them."""

    INTERNAL = 100
    UNAUTHORIZED = 101
    UNKNOWN_CHANNEL = 102
    PERMISSION_DENIED = 103
    METHOD_NOT_FOUND = 104
    ALREADY_SUBSCRIBED = 105
    LIMIT_EXCEEDED = 106
    BAD_REQUEST = 107
    NOT_AVAILABLE = 108
    TOKEN_EXPIRED = 109
    EXPIRED = 110
    TOO_MANY_REQUESTS = 111
    UNRECOVERABLE_POSITION = 112
    NOBODY_LISTENS = 503
    NO_ANSWER = 504

    @property
    def message(self) -> str:
        """The words official clients know this code by."""
        return self.name.lower().replace("_", " ")

    @property
    def temporary(self) -> bool:
        """Whether asking again later may help."""
        return self in (ErrorCode.INTERNAL, ErrorCode.TOO_MANY_REQUESTS)


class UnsubscribeCode(IntEnum):
    """Why a subscription ended; from 2500 on, clients subscribe again by themselves.

    Clients are told what is 2000 and above; the others stand in events alone.
    """

    CLIENT = 0
    DISCONNECT = 1
    SERVER = 2000
    INSUFFICIENT_STATE = 2500
    EXPIRED = 2501


class CloseCode(IntEnum):
    """Close codes we send: RFC 6455 section 7.4.1, then those of the Centrifuge protocol."""

    NORMAL = 1000
    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    ABNORMAL = 1006  # never on the wire: the connection ended without a Close frame
    INVALID_DATA = 1007
    POLICY_VIOLATION = 1008
    TOO_BIG = 1009
    INTERNAL_ERROR = 1011
    TRY_AGAIN_LATER = 1013

    CONNECTION_CLOSED = 3000
    SHUTDOWN = 3001
    SERVER_ERROR = 3004
    EXPIRED = 3005
    SUBSCRIPTION_EXPIRED = 3006
    SLOW = 3008
    WRITE_ERROR = 3009
    INSUFFICIENT_STATE = 3010
    FORCE_RECONNECT = 3011
    NO_PONG = 3012
    TOO_MANY_REQUESTS = 3013
    INVALID_TOKEN = 3500
    BAD_REQUEST = 3501
    STALE = 3502
    FORCE_DISCONNECT = 3503
    CONNECTION_LIMIT = 3504
    PERMISSION_DENIED = 3507
    NOT_AVAILABLE = 3508


def clients_stay_away(code: int) -> bool:
    """Whether official clients do not come back after this close code: it is in a range for that, or they
    have sent too large a message (1009), which they would send again."""
    return 3500 <= code <= 3999 or 4500 <= code <= 4999 or code == CloseCode.TOO_BIG


def check_close_code(code: int) -> None:
    """Raise `ValueError` unless a Close frame may carry `code` (RFC 6455 section 7.4)."""
    if not (1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999):
        raise ValueError(
            f"close code {code} cannot be sent: use 1000, 1008, 1011 or one from 3000 to 4999"
        )


class BrokerError(Exception):
    """The root of this package's exceptions."""


class ConfigError(BrokerError):
    """An option, an environment variable or a config file is wrong.

    The message is one line that names the input and the way out.
    """


class Refused(BrokerError):
    """Raise in an authorizer or an rpc hook to answer one request with an error reply.

    In `on_handshake` the answer is one of HTTP: `code` is its status, from 300 to 599, `message` its body,
    and `headers` go along, such as `{"WWW-Authenticate": "Bearer"}`. They count there alone.
    """

    def __init__(
        self, code: int, message: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        if not message:
            try:
                message = ErrorCode(code).message
            except ValueError:
                message = "refused"
        super().__init__(f"{code}: {message}")
        self.code: int = int(code)
        self.message = message
        self.headers: dict[str, str] = dict(headers or {})
        self.temporary: bool = code in (ErrorCode.INTERNAL, ErrorCode.TOO_MANY_REQUESTS)


class Disconnect(BrokerError):
    """Raise in a hook to send the peer away with a close code and a reason.

    Raises `ValueError` for a code that no Close frame may carry.
    """

    def __init__(self, code: int, reason: str = "") -> None:
        check_close_code(code)
        super().__init__(f"{code}: {reason}")
        self.code: int = int(code)
        self.reason = reason


class HeadError(BrokerError):
    """A request that is not acceptable; `status` is the HTTP status to answer with, and `headers`
    are what the answer has besides. `address` is its client's, once the head has told; else empty."""

    address: str = ""

    def __init__(self, status: int, reason: str, headers: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(f"{status}: {reason}")
        self.status = status
        self.reason = reason
        self.headers: tuple[tuple[str, str], ...] = tuple(headers)


class TokenRefused(BrokerError):
    """A token does not let its bearer in. The message is for the log, not for the peer."""


class TokenInvalid(TokenRefused):
    """Not signed by a key of ours, or not for us."""


class TokenExpired(TokenRefused):
    """Signed by a key of ours, and past its time or ahead of it."""


class KeysUnavailable(TokenRefused):
    """The key that a token names is not known, and could not be fetched just now."""


class Lagged(BrokerError):
    """An in-process subscriber was too slow: `missed` publications were dropped before the next."""

    def __init__(self, missed: int) -> None:
        super().__init__(f"{missed} publications were dropped: this reader is too slow")
        self.missed = missed


class ClientError(BrokerError):
    """The base of the errors that `broker.client` raises."""


class CannotConnect(ClientError):
    """The first connection did not come about: nobody there, or no broker of this protocol.

    The message is one line that names the URL and the cause.
    """


class Unavailable(ClientError):
    """The connection is gone for good: closed here, or refused there with `code`."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason


class ConnectionLost(ClientError):
    """The connection dropped before the reply: the request was carried out, or it was not."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(
            f"connection lost before the reply ({code}: {reason}); "
            "the request may or may not have been carried out"
        )
        self.code = code
        self.reason = reason


class RequestFailed(ClientError):
    """The broker answered this request with an error reply."""

    def __init__(self, code: int, message: str, temporary: bool = False) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.temporary = temporary
