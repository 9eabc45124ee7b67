"""Offers of permessage-deflate, and which of them is taken (RFC 7692 sections 5 and 7.1)."""

import pytest

from broker.errors import HeadError
from broker.transport.extensions import INFLATE_BYTES, Deflate, choose_deflate

NONE = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
"""The answer to an offer that asks for nothing."""

KEEPS = "permessage-deflate; server_no_context_takeover"


@pytest.mark.parametrize(
    ("offers", "answer"),
    [
        ("permessage-deflate", NONE),
        ("permessage-deflate; client_max_window_bits", NONE),  # Chromium
        ("permessage-deflate; server_no_context_takeover", NONE),
        ("permessage-deflate;client_no_context_takeover;server_no_context_takeover", NONE),
        ("permessage-deflate; client_max_window_bits=10", f"{NONE}; client_max_window_bits=10"),
        ("permessage-deflate; client_max_window_bits=8", f"{NONE}; client_max_window_bits=8"),
        ("permessage-deflate; server_max_window_bits=9", f"{NONE}; server_max_window_bits=9"),
        ('permessage-deflate; server_max_window_bits="15"', f"{NONE}; server_max_window_bits=15"),
        ('permessage-deflate; server_max_window_bits="1\\2"', f"{NONE}; server_max_window_bits=12"),
        (" permessage-deflate ;\tserver_max_window_bits = 9 ", f"{NONE}; server_max_window_bits=9"),
        (",, permessage-deflate ,", NONE),
        ("x-webkit-deflate-frame, permessage-deflate", NONE),
        ('other; a=1; b="c"; d, permessage-deflate', NONE),
        # the first that can be taken
        ("permessage-deflate; server_max_window_bits=8, permessage-deflate", NONE),
        ("permessage-deflate; unknown, permessage-deflate", NONE),
        (
            "permessage-deflate; server_max_window_bits=10, permessage-deflate",
            f"{NONE}; server_max_window_bits=10",
        ),
    ],
)
def test_the_first_offer_that_can_be_taken_is(offers: str, answer: str) -> None:
    taken = choose_deflate(offers)
    assert taken is not None
    assert taken.answer == answer


@pytest.mark.parametrize(
    "parameters",
    [
        "server_no_context_takeover=1",
        "client_no_context_takeover=true",
        "server_max_window_bits",
        *[
            f"server_max_window_bits={bits}"
            for bits in ("0", "7", "8", "16", "09", "+9", "x", "9.0")
        ],
        *[f"client_max_window_bits={bits}" for bits in ("0", "7", "16", "010", "-8", "1e1")],
        "unknown",
        "server_max_window_bits=10; server_max_window_bits=10",
        "client_no_context_takeover; client_no_context_takeover",
        "Server_No_Context_Takeover",
    ],
)
def test_an_offer_that_cannot_be_taken_is_passed_over(parameters: str) -> None:
    assert choose_deflate(f"permessage-deflate; {parameters}", may_keep=True) is None
    taken = choose_deflate(f"permessage-deflate; {parameters}, permessage-deflate")
    assert taken is not None
    assert taken.answer == NONE


@pytest.mark.parametrize("offers", ["", ",", " , ", "permessage-deflate2", "other; x=1", "deflate"])
def test_without_an_offer_there_is_none(offers: str) -> None:
    assert choose_deflate(offers) is None


@pytest.mark.parametrize(
    "offers",
    [
        "permessage-deflate;",
        "permessage-deflate; ;",
        "permessage-deflate; a=",
        'permessage-deflate; a="b',
        'permessage-deflate; a=""',
        'permessage-deflate; a="b c"',
        "permessage-deflate; a=b c",
        "permessage-deflate permessage-deflate",
        "permessage-deflate, =1",
        "permessage-deflate, @",
        "(comment)",
    ],
)
def test_a_header_that_is_no_list_of_extensions_breaks_the_handshake(offers: str) -> None:
    with pytest.raises(HeadError, match="no list of extensions") as caught:
        choose_deflate(offers)
    assert caught.value.status == 400


def test_a_client_keeps_its_window_where_it_may_and_wants_to() -> None:
    assert choose_deflate("permessage-deflate", may_keep=True) == Deflate(client_keeps=True)
    some = choose_deflate("permessage-deflate; client_max_window_bits=10", may_keep=True)
    assert some is not None
    assert some.answer == f"{KEEPS}; client_max_window_bits=10"
    assert some.kept_bytes == INFLATE_BYTES + 1024
    other = choose_deflate("permessage-deflate; client_no_context_takeover", may_keep=True)
    assert other is not None
    assert (other.answer, other.kept_bytes) == (NONE, 0)


def test_a_long_header_is_read_in_linear_time() -> None:
    # A quadratic reader would take minutes for these.
    assert choose_deflate("," * 10**6) is None
    assert choose_deflate("permessage-deflate; unknown," * 10**5) is None
    with pytest.raises(HeadError):
        choose_deflate('a; b="' + '\\"' * 10**5)
