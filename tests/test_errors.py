"""Errors: their tree as it is drawn, their codes as the protocols have them, their words."""

import pytest

from broker import errors
from broker.core.history import UnrecoverablePosition
from broker.errors import (
    BrokerError,
    CloseCode,
    Disconnect,
    ErrorCode,
    HeadError,
    Refused,
    UnsubscribeCode,
    check_close_code,
)


def test_the_tree_is_as_it_is_drawn() -> None:
    """Each line of the drawing is a class, below the one that it is drawn below."""
    assert errors.__doc__ is not None
    above: list[tuple[int, str]] = []
    drawn = {}
    for line in errors.__doc__.split("\n"):
        stem = line.lstrip(" │├└─")
        name = stem.split(" ")[0]
        if not name or not (line.startswith("    ") and name[0].isupper()):
            continue
        depth = len(line) - len(stem)
        above = [each for each in above if each[0] < depth]
        drawn[name] = above[-1][1] if above else "Exception"
        above.append((depth, name))
    classes = {
        each.__name__: each.__mro__[1].__name__
        for each in [*vars(errors).values(), UnrecoverablePosition]
        if isinstance(each, type) and issubclass(each, BrokerError)
    }
    assert drawn == classes


@pytest.mark.parametrize(
    "code, message, temporary",
    [
        (100, "internal", True),
        (102, "unknown channel", False),
        (103, "permission denied", False),
        (107, "bad request", False),
        (111, "too many requests", True),
        (112, "unrecoverable position", False),
        (503, "nobody listens", False),
        (504, "no answer", False),
    ],
)
def test_an_error_code_has_the_words_that_clients_know(
    code: int, message: str, temporary: bool
) -> None:
    refusal = Refused(code)
    assert (refusal.code, refusal.message, refusal.temporary) == (code, message, temporary)
    assert (ErrorCode(code).message, ErrorCode(code).temporary) == (message, temporary)
    assert str(Refused(code, "other words")) == f"{code}: other words"


def test_a_code_of_the_app_may_have_any_words() -> None:
    assert str(Refused(4000)) == "4000: refused"
    assert Refused(4000, "come back").message == "come back"


@pytest.mark.parametrize("code", [1000, 1003, 1007, 1008, 1011, 1014, 3000, 3503, 4999])
def test_a_close_frame_may_carry_some_codes(code: int) -> None:
    check_close_code(code)
    assert str(Disconnect(code, "bye")) == f"{code}: bye"


@pytest.mark.parametrize("code", [-1, 0, 999, 1004, 1005, 1006, 1015, 2999, 5000, 2**16])
def test_a_close_frame_carries_no_other_code(code: int) -> None:
    for refuse in (check_close_code, Disconnect):
        with pytest.raises(ValueError, match=f"close code {code} cannot be sent: use 1000"):
            refuse(code)


def test_every_close_code_of_ours_but_the_one_of_a_lost_connection_can_be_sent() -> None:
    for code in set(CloseCode) - {CloseCode.ABNORMAL}:
        check_close_code(code)


def test_a_client_subscribes_again_after_a_gap_and_after_an_expiry_alone() -> None:
    again = {code for code in UnsubscribeCode if code >= 2500}
    assert again == {UnsubscribeCode.INSUFFICIENT_STATE, UnsubscribeCode.EXPIRED}


def test_a_refused_head_has_a_status_and_headers() -> None:
    error = HeadError(426, "upgrade", [("Sec-WebSocket-Version", "13")])
    assert (error.status, error.reason) == (426, "upgrade")
    assert error.headers == (("Sec-WebSocket-Version", "13"),)
    assert HeadError(400, "no").headers == ()
