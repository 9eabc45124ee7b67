"""How a connection ends, in one line."""

import errno

import pytest
import trio
import trio_websocket
from trio_websocket import CloseReason

from broker.client.loss import REASON_CHARACTERS, Lost, TooLarge, explain, foreign
from broker.errors import CloseCode


def test_a_close_code_says_whether_to_come_back() -> None:
    final = [code for code in range(1000, 5000) if Lost(code, "").final]
    assert final == [1009, *range(3500, 4000), *range(4500, 5000)]


def broken_by(cause: Exception) -> Exception:
    error = trio.BrokenResourceError()
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error, code, reason",
    [
        (Lost(3001, "shutdown"), 3001, "shutdown"),
        (trio_websocket.ConnectionClosed(None), 1006, "connection closed"),
        (trio_websocket.ConnectionClosed(CloseReason(1006, None)), 1006, "connection closed"),
        (trio_websocket.ConnectionClosed(CloseReason(1001, None)), 1001, "going away"),
        (trio_websocket.ConnectionClosed(CloseReason(3500, "no")), 3500, "no"),
        (OSError(errno.ECONNREFUSED, "x (127.0.0.1)"), 1006, "connection refused"),
        (trio.BrokenResourceError(), 1006, "brokenResourceError"),
        (broken_by(OSError("Bad certificate")), 1006, "bad certificate"),
        (ExceptionGroup("", [ExceptionGroup("", [TimeoutError("Slow")])]), 1006, "slow"),
    ],
)
def test_a_foreign_exception_becomes_a_code_and_a_line(
    error: BaseException, code: int, reason: str
) -> None:
    lost = explain(error)
    assert (lost.code, lost.reason) == (code, reason)


def test_all_addresses_failed_is_told_by_the_first_reason() -> None:
    error = OSError("all attempts failed")
    error.__cause__ = ExceptionGroup("", [OSError(errno.EHOSTUNREACH, "x")])
    assert explain(error).reason == "no route to host"


def test_a_long_reason_is_cut() -> None:
    assert Lost(4000, "x" * REASON_CHARACTERS).reason == "x" * REASON_CHARACTERS
    reason = Lost(4000, "x" * 10**6).reason
    assert len(reason) == REASON_CHARACTERS
    assert reason.endswith("x…")


def test_a_peer_that_breaks_the_protocol_is_1002_and_one_that_sends_too_much_1009() -> None:
    assert foreign("x").code == CloseCode.PROTOCOL_ERROR
    assert TooLarge("x").code == CloseCode.TOO_BIG
    assert not TooLarge("x").final, "it was the broker that sent too much"
    assert not foreign("x").final
    assert not TooLarge("x").final
