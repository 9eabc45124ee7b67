"""Which pages may connect."""

import pytest

from broker.access.origins import origin_allowed
from broker.testing import handshake
from broker.transport.head import parse_head

HERE = "testserver:9501"


def allowed(
    origin: str | None, *listed: str, loopback_bind: bool = False, host: str = HERE
) -> bool:
    headers = {} if origin is None else {"Origin": origin}
    head = parse_head(handshake(headers=headers, host=host))
    return origin_allowed(head, listed, loopback_bind=loopback_bind)


@pytest.mark.parametrize("loopback_bind", [True, False])
@pytest.mark.parametrize(
    "origin, listed, passes",
    [
        # programs, and the page's own
        (None, [], True),
        (f"http://{HERE}", [], True),
        (f"https://{HERE}", [], True),
        (f"HTTP://{HERE.upper()}", [], True),
        # other pages
        ("http://evil.example", [], False),
        (f"http://{HERE}.evil.example", [], False),
        (f"http://evil.example/{HERE}", [], False),
        (f"http://evil.example#{HERE}", [], False),
        (f"http://user@{HERE}", [], False),
        ("http://testserver", [], False),
        ("http://testserver:9502", [], False),
        (f"ftp://{HERE}", [], False),
        (f"file://{HERE}", [], False),
        (HERE, [], False),
        (f"//{HERE}", [], False),
        ("http://", [], False),
        ("http://[", [], False),
        ("", [], False),
        # those that are listed
        ("https://example.com", ["https://example.com"], True),
        ("https://example.com", ["https://a.example", "https://example.com"], True),
        ("http://example.com", ["https://example.com"], False),
        ("https://example.com:444", ["https://example.com"], False),
        ("https://www.example.com", ["https://example.com"], False),
        ("http://evil.example", ["*"], True),
        ("null", ["*"], True),
        ("null", ["null"], True),
        ("", ["*"], True),
    ],
)
def test_origins(origin: str | None, listed: list[str], passes: bool, loopback_bind: bool) -> None:
    assert allowed(origin, *listed, loopback_bind=loopback_bind) is passes


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "http://localhost",
        "http://localhost:3000",
        "https://localhost:3000",
        "http://app.localhost",
        "http://127.0.0.1:8000",
        "http://127.8.8.8",
        "http://[::1]:8000",
    ],
)
def test_loopback_pages_pass_while_we_listen_on_loopback_only(origin: str) -> None:
    assert allowed(origin, loopback_bind=True, host="localhost:9501")
    assert allowed(origin, loopback_bind=True, host="[::1]:9501")
    assert not allowed(origin, loopback_bind=False, host="localhost:9501")
    # Through a proxy on this machine: the page is in the browser of somebody else.
    assert not allowed(origin, loopback_bind=True, host="example.com")


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost.evil.example",
        "http://127.0.0.1.evil.example",
        "http://10.0.0.1",
        "file://",
    ],
)
def test_what_only_looks_like_loopback_does_not(origin: str) -> None:
    assert not allowed(origin, loopback_bind=True)
    assert not allowed(origin, loopback_bind=True, host="localhost:9501")


def test_a_page_is_its_own_also_on_an_ipv6_host() -> None:
    assert allowed("http://[2001:db8::1]:9501", host="[2001:db8::1]:9501")
    assert not allowed("http://[2001:db8::2]:9501", host="[2001:db8::1]:9501")
