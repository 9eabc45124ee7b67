"""Which peers may say for whom they ask, and for whom they do."""

import ipaddress

import pytest

from broker.access.proxies import host_of, is_set_by_proxies, trusted_proxies


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
    "peer, headers, client",
    [
        ("203.0.113.9:1", {"x-forwarded-for": "1.1.1.1"}, "203.0.113.9"),  # nobody we trust
        ("10.0.0.1:1", {"x-forwarded-for": "198.51.100.4"}, "198.51.100.4"),
        ("10.0.0.1:1", {"x-forwarded-for": "6.6.6.6, 198.51.100.4"}, "198.51.100.4"),
        ("10.0.0.1:1", {"x-forwarded-for": "6.6.6.6, 198.51.100.4,10.0.0.2"}, "198.51.100.4"),
        ("10.0.0.1:1", {"x-forwarded-for": "[2001:db8::7]:4711"}, "2001:db8::7"),
        ("10.0.0.1:1", {"x-real-ip": "198.51.100.4"}, "198.51.100.4"),
        ("10.0.0.1:1", {"x-forwarded-for": "6.6.6.6, unknown"}, None),
        ("10.0.0.1:1", {"x-forwarded-for": "10.0.0.2"}, None),
        ("10.0.0.1:1", {"x-forwarded-for": ""}, None),
        ("10.0.0.1:1", {}, None),
        ("unix", {"x-forwarded-for": "198.51.100.4"}, "198.51.100.4"),
        ("memory", {"x-forwarded-for": "198.51.100.4"}, None),
    ],
)
def test_the_client_is_the_last_that_is_no_proxy_of_ours(
    peer: str, headers: dict[str, str], client: str | None
) -> None:
    proxies = trusted_proxies(("10.0.0.0/8", "unix"))
    expected = None if client is None else ipaddress.ip_address(client)
    assert proxies.client_of(peer, headers) == expected


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
    "user, peer, passed_on, party",
    [
        ("ann", "203.0.113.9:1", "", "user 'ann'"),
        ("", "203.0.113.9:1", "", "address 203.0.113.9"),
        ("", "[::ffff:203.0.113.9]:1", "", "address 203.0.113.9"),
        ("", "[2001:db8:1:2:3::4]:1", "", "address 2001:db8:1:2::/64"),
        ("", "203.0.113.9:1", "1.1.1.1", "address 203.0.113.9"),
        ("", "10.0.0.1:1", "1.1.1.1", "address 1.1.1.1"),
        ("", "10.0.0.1:1", "", "fd 7"),
        ("", "127.0.0.1:1", "", "fd 7"),
        ("", "[::1]:1", "", "fd 7"),
        ("", "unix", "", "fd 7"),
        ("", "memory", "", "fd 7"),
    ],
)
def test_a_party_is_a_user_or_else_an_address(
    user: str, peer: str, passed_on: str, party: str
) -> None:
    headers = {"x-forwarded-for": passed_on} if passed_on else {}
    proxies = trusted_proxies(("10.0.0.0/8",))
    assert proxies.party_of(user, peer, lambda: headers, "fd 7") == party
