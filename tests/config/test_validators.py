"""Entries of settings that would match nothing are refused, each with one that would be right."""

import pytest

from broker import Config
from broker.config.validators import ascii_host


@pytest.mark.parametrize(
    "entry, right",
    [
        ("example.com", "https://example.com"),
        ("Example.com:8443", "https://example.com:8443"),
        ("https://example.com/", "https://example.com"),
        ("https://example.com/chat?a#b", "https://example.com"),
        ("https://user@example.com", "https://example.com"),
        (" https://example.com ", "https://example.com"),
        ("wss://example.com", "https://example.com"),
        ("ws://localhost:8000", "http://localhost:8000"),
        ("*://example.com", "https://example.com"),
        ("*.example.com", "https://*.example.com"),
        ("https://*example.com", "https://example.com"),
        ("https://www.*.com", "https://example.com"),
        ("https://*", "https://example.com"),
        ("https://straße.de", "https://xn--strae-oqa.de"),
        ("https://*.bücher.example:8443", "https://*.xn--bcher-kva.example:8443"),
        ("https://faß.example", "https://xn--fa-hia.example"),
        ("https://example.com:", "https://example.com"),
        ("https://example.com:0", "https://example.com"),
        ("https://example.com:https", "https://example.com"),
        ("http://127.1", "http://example.com"),
        ("http://*.192.0.2.7", "http://example.com"),
        ("http://::1", "http://[::1]"),
        ("http://[::1%lo]", "http://example.com"),
        ("file:///home/me/page.html", "null"),
        ("file:", "null"),
        ("Null", "null"),
        ("http://", "http://example.com"),
        ("https://a,https://b", "https://example.com"),
        ("", "https://example.com"),
    ],
)
def test_an_origin_that_no_browser_sends_is_refused(entry: str, right: str) -> None:
    with pytest.raises(ValueError) as raised:
        Config(allowed_origins=("https://fine.example", entry))
    told = str(raised.value)
    assert told.startswith(f'allowed_origins holds {entry!r}: must be like "{right}", or "*" for')
    assert "\n" not in told
    Config(allowed_origins=(right,))


@pytest.mark.parametrize(
    "entry, right",
    [
        ("https://example.com", "example.com"),
        ("http://example.com:8443/a", "example.com:8443"),
        ("example.com/", "example.com"),
        ("me@example.com", "example.com"),
        ("straße.de:1", "xn--strae-oqa.de:1"),
        ("::1", "[::1]"),
        ("example.com:", "example.com"),
        ("example.com:0", "example.com"),
        ("a*.example.com", "example.com"),
        ("*:8443", "example.com"),
        ("*.10.0.0.1", "example.com"),
        ("10.0.0", "example.com"),
        ("a b", "example.com"),
        ("", "example.com"),
    ],
)
def test_a_host_that_no_request_names_is_refused(entry: str, right: str) -> None:
    with pytest.raises(ValueError) as raised:
        Config(hosts=(entry,))
    told = str(raised.value)
    assert told.startswith(f'hosts holds {entry!r}: must be like "{right}", or "*" for all: ')
    assert "\n" not in told
    Config(hosts=(right,))


def test_entries_that_can_match_are_taken() -> None:
    origins = ("*", "null", "file://", "https://*.EXAMPLE.com:443", "http://localhost:*", "app://a")
    Config(allowed_origins=origins, hosts=("*", "a", "*.a:1", "10.0.0.1", "[::1]:9501", "xn--a"))


@pytest.mark.parametrize(
    "host, sent",
    [
        ("Straße.de", "xn--strae-oqa.de"),
        ("example.com", "example.com"),
        ("0.0.0.0", "0.0.0.0"),
        ("::1", ""),
        ("a\u200bb..c", ""),
    ],
)
def test_a_name_is_sent_by_idna_2008(host: str, sent: str) -> None:
    assert ascii_host(host) == sent


@pytest.mark.parametrize(
    "entry, right",
    [
        ("localhost", "127.0.0.1"),
        ("10.0.0.1/8", "10.0.0.0/8"),
        ("[::1]", "::1/128"),
        (" 10.0.0.1", "10.0.0.1/32"),
        ("example.com", "10.0.0.0/8"),
        ("10.0.0.1:80", "10.0.0.0/8"),
        ("10.0.0.0/33", "10.0.0.0/8"),
        ("", "10.0.0.0/8"),
        ("*", "10.0.0.0/8"),
    ],
)
def test_an_entry_that_is_no_address_of_a_proxy_is_refused(entry: str, right: str) -> None:
    with pytest.raises(ValueError) as raised:
        Config(trusted_proxies=(entry,))
    assert str(raised.value) == (
        f'trusted_proxies holds {entry!r}: must be like "{right}", or "unix"'
    )
    Config(trusted_proxies=(right,))


def test_addresses_networks_and_unix_are_proxies() -> None:
    Config(trusted_proxies=("unix", "192.0.2.7", "10.0.0.0/8", "2001:db8::7", "fd00::/8"))
