"""Which peers may say for whom they ask, and for whom they do."""

import pytest

from broker.access.proxies import (
    host_of,
    is_set_by_proxies,
    peer_of,
    split_address,
    trusted_proxies,
    was_passed_on,
)


@pytest.mark.parametrize(
    "text, address",
    [
        ("192.0.2.7", "192.0.2.7"),
        ("192.0.2.7:80", "192.0.2.7"),
        ("2001:db8::7", "2001:db8::7"),
        ("[2001:db8::7]:80", "2001:db8::7"),
        ("[2001:db8::7]", "2001:db8::7"),
        ("[::ffff:192.0.2.7]:80", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("[fe80::1%eth0]:80", "fe80::1"),
        ("unix", None),
        ("memory", None),
        ("", None),
        ("unknown", None),
        ("_hidden", None),
        ("localhost:80", None),
        ("192.0.2.7:x", None),
        ("192.0.2.300", None),
        ("[192.0.2.7", None),
        ("1", None),
        ("١٢٧.0.0.1", None),
    ],
)
def test_an_address_is_read_from_what_peers_and_proxies_write(
    text: str, address: str | None
) -> None:
    found = host_of(text)
    assert (None if found is None else str(found)) == address


@pytest.mark.parametrize(
    "entries, peer, trusted",
    [
        ((), "127.0.0.1:1", False),
        ((), "unix", False),
        ((), "memory", False),
        (("unix",), "unix", True),
        (("unix",), "127.0.0.1:1", False),
        (("unix",), "memory", False),
        (("127.0.0.1",), "127.0.0.1:1", True),
        (("127.0.0.1",), "[::ffff:127.0.0.1]:1", True),
        (("127.0.0.1",), "[::1]:1", False),
        (("10.0.0.0/8", "::1"), "10.9.8.7:1", True),
        (("10.0.0.0/8", "::1"), "[::1]:1", True),
        (("10.0.0.0/8", "::1"), "11.0.0.1:1", False),
    ],
)
def test_a_peer_is_trusted_by_its_address_alone(
    entries: tuple[str, ...], peer: str, trusted: bool
) -> None:
    assert trusted_proxies(entries).trusts(peer) is trusted


@pytest.mark.parametrize(
    "peer, passed_on, client",
    [
        ("203.0.113.9:1", "1.1.1.1", None),  # nobody we trust
        ("10.0.0.1:1", "198.51.100.4", "198.51.100.4"),
        ("10.0.0.1:1", "6.6.6.6, 198.51.100.4", "198.51.100.4"),
        ("10.0.0.1:1", "6.6.6.6, 198.51.100.4,10.0.0.2", "198.51.100.4"),
        ("10.0.0.1:1", "[2001:db8::7]:4711", "2001:db8::7"),
        ("10.0.0.1:1", "6.6.6.6, unknown", None),
        ("10.0.0.1:1", "10.0.0.2", None),
        ("10.0.0.1:1", "", None),
        ("unix", "198.51.100.4", "198.51.100.4"),
        ("memory", "198.51.100.4", None),
    ],
)
def test_the_client_is_the_last_that_is_no_proxy_of_ours(
    peer: str, passed_on: str, client: str | None
) -> None:
    proxies = trusted_proxies(("10.0.0.0/8", "unix"))
    address = proxies.address_of(peer, {"x-forwarded-for": passed_on}.get)
    assert address == (client or peer)
    assert peer_of(address) == peer


@pytest.mark.parametrize("header", ["x-forwarded-for", "x-real-ip", "forwarded"])
def test_a_header_that_the_proxy_does_not_write_says_nothing(header: str) -> None:
    proxies = trusted_proxies(("unix",), header)
    made_up = {"x-forwarded-for": "6.6.6.6", "x-real-ip": "6.6.6.6", "forwarded": "for=6.6.6.6"}
    del made_up[header]
    assert proxies.address_of("unix", made_up.get) == "unix"
    right = "for=1.1.1.1" if header == "forwarded" else "1.1.1.1"
    assert proxies.address_of("unix", {**made_up, header: right}.get) == "1.1.1.1"


@pytest.mark.parametrize(
    "forwarded, client",
    [
        ("for=192.0.2.43", "192.0.2.43"),
        ("For=192.0.2.43;proto=https;by=10.0.0.9", "192.0.2.43"),
        ('for=6.6.6.6, for="[2001:db8:cafe::17]:4711"', "2001:db8:cafe::17"),
        ('for=6.6.6.6,for="192.0.2.43:80"; host=x ', "192.0.2.43"),
        ("for=192.0.2.43, for=10.0.0.2", "192.0.2.43"),
        ('for=192.0.2.43;host="x, for=6.6.6.6"', "192.0.2.43"),
        ('for=192.0.2.43;host="x;for=6.6.6.6\\", for=6.6.6.6"', "192.0.2.43"),
        ("for=unknown", None),
        ("for=_hidden, for=_SEVKISEK", None),
        ("for=6.6.6.6, proto=https", None),
        ("for=6.6.6.6, ", None),
        ('for=6.6.6.6, host="', None),
        ('host="for=6.6.6.6', None),
        ("for=6.6.6.6 for", None),
        ("192.0.2.43", None),
        ("", None),
    ],
)
def test_forwarded_is_read_as_the_rfc_has_it(forwarded: str, client: str | None) -> None:
    proxies = trusted_proxies(("10.0.0.0/8",), "forwarded")
    address = proxies.client_in(forwarded)
    assert (None if address is None else str(address)) == client


def test_a_long_header_is_read_in_its_own_time() -> None:
    proxies = trusted_proxies(("10.0.0.0/8",), "forwarded")
    for text in ("a" * 8000, "a=" * 4000, 'a="' + "\\a" * 4000, "," * 8000, "for=," * 1600):
        assert proxies.client_in(text) is None


@pytest.mark.parametrize(
    "text, expected",
    [
        ("192.0.2.7:80", ("192.0.2.7", 80)),
        ("192.0.2.7", ("192.0.2.7", 0)),
        ("[2001:db8::7]:80", ("2001:db8::7", 80)),
        ("[2001:db8::7]", ("2001:db8::7", 0)),
        ("2001:db8::7", ("2001:db8::7", 0)),
        ("unix", ("", 0)),
    ],
)
def test_host_and_port_of_an_address(text: str, expected: tuple[str, int]) -> None:
    assert split_address(text) == expected


@pytest.mark.parametrize(
    "header, expected",
    [
        *((name, True) for name in ("forwarded", "x-forwarded-for", "x-forwarded-host")),
        *((name, True) for name in ("x-forwarded-user", "x-original-forwarded-for")),
        *((name, True) for name in ("x-real-ip", "x-client-ip", "true-client-ip")),
        *((name, True) for name in ("cf-connecting-ip", "fly-client-ip", "ip")),
        ("x-envoy-external-address", True),
        *((name, False) for name in ("cookie", "authorization", "origin", "user-agent")),
        *((name, False) for name in ("x-ship", "accept-language", "x-tenant", "zip")),
    ],
)
def test_headers_of_proxies_are_told_from_those_of_clients(header: str, expected: bool) -> None:
    assert is_set_by_proxies(header) is expected


@pytest.mark.parametrize(
    "user, address, party",
    [
        ("ann", "203.0.113.9:1", "user 'ann'"),
        ("", "203.0.113.9:1", "address 203.0.113.9"),
        ("", "203.0.113.9", "address 203.0.113.9"),
        ("", "[::ffff:203.0.113.9]:1", "address 203.0.113.9"),
        ("", "[2001:db8:1:2:3::4]:1", "address 2001:db8:1:2::/64"),
        ("", "10.0.0.1:1", "fd 7"),
        ("", "127.0.0.1:1", "fd 7"),
        ("", "[::1]:1", "fd 7"),
        ("", "unix", "fd 7"),
        ("", "memory", "fd 7"),
    ],
)
def test_a_party_is_a_user_or_else_an_address(user: str, address: str, party: str) -> None:
    assert trusted_proxies(("10.0.0.0/8",)).party_of(user, address, "fd 7") == party


@pytest.mark.parametrize(
    ("headers", "was"),
    [
        ({}, False),
        ({"host": "localhost:9501", "origin": "http://localhost:9501"}, False),
        ({"host": "127.0.0.1"}, False),
        ({"host": "[::1]:9501"}, False),
        ({"host": "chat.example"}, True),
        ({"host": "10.0.0.7:9501"}, True),
        ({"host": "::::"}, True),
        ({"host": "localhost", "via": "1.1 cache"}, True),
        ({"host": "localhost", "x-forwarded-for": "192.0.2.1"}, True),
        ({"host": "localhost", "x-real-ip": "192.0.2.1"}, True),
    ],
)
def test_a_request_that_a_proxy_has_passed_on_shows_it(headers: dict[str, str], was: bool) -> None:
    assert was_passed_on(headers) is was
