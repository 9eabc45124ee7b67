"""How a connection to the broker ends, said in one line.

Rule: foreign exceptions become a `Lost` here, and nowhere else.
"""

import os

import trio
import trio_websocket
from wsproto.utilities import ProtocolError

from broker.errors import CloseCode, clients_stay_away

REASON_CHARACTERS = 500
"""Kept of a reason or message of the broker's: a Close frame carries 123 bytes, the longest of our
own error messages is half of this, and a line of a log or terminal is not a place for more."""


class Lost(Exception):
    """How one connection ended. `final`: trying again would be no use."""

    def __init__(self, code: int, reason: str, *, final: bool | None = None) -> None:
        reason = shorten(reason)
        super().__init__(code, reason)
        self.code = code
        self.reason = reason
        self.final: bool = clients_stay_away(code) if final is None else final


def shorten(text: str) -> str:
    """The text, cut at `REASON_CHARACTERS`."""
    return text if len(text) <= REASON_CHARACTERS else text[: REASON_CHARACTERS - 1] + "…"


class TooLarge(Lost):
    """The end of a connection whose peer sent more than is taken at once.

    A reply that was asked for will be as large the next time.
    """

    def __init__(self, what: str) -> None:
        super().__init__(CloseCode.TOO_BIG, f"the broker sent {what}", final=False)


def foreign(what: str, code: CloseCode = CloseCode.PROTOCOL_ERROR) -> Lost:
    """The end of a connection whose peer does not keep to the protocol."""
    return Lost(code, f"the answer is not this broker's protocol ({what})")


# Exceptions that a connection that fails may raise; anything else is a bug of ours and is not contained.
# ProtocolError: trio-websocket lets it escape, such as for a Ping after our Close (its issue #184).
LOSSES = (
    Lost,
    OSError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio_websocket.HandshakeError,
    trio_websocket.ConnectionClosed,
    ProtocolError,
)


def explain(error: BaseException) -> Lost:
    """The one seam at which foreign exceptions become a loss."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, Lost):
        return error
    if isinstance(error, trio_websocket.ConnectionClosed):
        if error.reason is None or error.reason.code == CloseCode.ABNORMAL:
            return Lost(CloseCode.ABNORMAL, "connection closed")
        name = error.reason.name.lower().replace("_", " ")
        return Lost(error.reason.code, error.reason.reason or name)
    if isinstance(error, OSError) and error.__cause__ is not None and error.errno is None:
        # Trio says that all addresses failed, and keeps the reasons in a group.
        return explain(error.__cause__)
    text = str(error) or str(error.__cause__ or "")  # of a broken stream, such as TLS
    if isinstance(error, OSError) and error.errno is not None:
        # Trio adds the address to the text, which the caller has named already.
        text = os.strerror(error.errno) if error.errno > 0 else error.strerror or text
    text = text or type(error).__name__
    return Lost(CloseCode.ABNORMAL, text[0].lower() + text[1:])
