"""Hosts and origins as text: the form in which two are compared, and which entries match which."""

import pytest

from broker.core.hosts import (
    HostPattern,
    Origin,
    OriginPattern,
    is_address,
    normal_host,
    split_port,
)


@pytest.mark.parametrize(
    "text, normal",
    [
        ("example.com", "example.com"),
        ("EXAMPLE.com.", "example.com"),
        ("xn--strae-oqa.de", "xn--strae-oqa.de"),
        ("a_b", "a_b"),
        ("127.0.0.1", "127.0.0.1"),
        ("[::1]", "[::1]"),
        ("[0:0:0:0:0:0:0:1]", "[::1]"),
        ("[2001:DB8::1]", "[2001:db8::1]"),
    ],
)
def test_a_host_has_one_form(text: str, normal: str) -> None:
    assert normal_host(text) == normal


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            ".",
            "a..b",
            ".a",
            "a b",
            "a/b",
            "a:1",
            "::1",
            "[::1",
            "[::1%eth0]",
            "[1.2.3.4]",
            "[]",
        ),
        *("straße.de", "a%41", "*", "*.a", "a" * 64, "a." * 126 + "ab"),
        *("1.2.3", "1.2.3.4.5", "256.1.1.1", "127.1", "0x7f.1", "2130706433", "0x7f000001", "a.1"),
    ],
)
def test_no_host_is(text: str) -> None:
    with pytest.raises(ValueError):
        normal_host(text)


@pytest.mark.parametrize(
    "host, address",
    [
        ("127.0.0.1", True),
        ("203.0.113.7", True),
        ("[2001:db8::1]", True),
        ("::1", False),
        ("127.0.0.1.evil.example", False),
        ("evil.example", False),
        ("127.1", False),
    ],
)
def test_an_address_is_told_from_a_name(host: str, address: bool) -> None:
    assert is_address(host) is address


@pytest.mark.parametrize(
    "text, parts",
    [
        ("a", ("a", None)),
        ("a:", ("a", None)),
        ("a:1", ("a", 1)),
        ("a:065535", ("a", 65535)),
        ("[::1]", ("[::1]", None)),
        ("[::1]:80", ("[::1]", 80)),
        ("", ("", None)),
    ],
)
def test_a_port_is_split_off(text: str, parts: tuple[str, int | None]) -> None:
    assert split_port(text) == parts


@pytest.mark.parametrize("text", ["a:0", "a:65536", "a:http", "a:-1", "a:１", "a:" + "9" * 9000])
def test_no_port_is(text: str) -> None:
    with pytest.raises(ValueError):
        split_port(text)


@pytest.mark.parametrize(
    "text, origin",
    [
        ("http://a", Origin("http", "a", 80)),
        ("https://a", Origin("https", "a", 443)),
        ("HTTPS://A:0443", Origin("https", "a", 443)),
        ("http://[::1]:8000", Origin("http", "[::1]", 8000)),
        ("app://a", Origin("app", "a", 0)),
    ],
)
def test_an_origin_has_a_port(text: str, origin: Origin) -> None:
    assert Origin.parse(text) == origin


@pytest.mark.parametrize(
    "text",
    ["", "null", "a", "//a", "://a", "http:a", "http://", "http://a/", "http://a?b", "http://a#b",
     "http://u@a", "http://a http://b", "http://a,http://b", "file://", "http://[", "http://a:0",
     "http://a\xe9", "h ttp://a"],
)  # fmt: skip
def test_no_origin_is(text: str) -> None:
    with pytest.raises(ValueError):
        Origin.parse(text)


@pytest.mark.parametrize(
    "entry, matching, others",
    [
        (
            "https://example.com",
            ["https://example.com", "https://EXAMPLE.COM", "https://example.com:443", "https://example.com."],
            ["http://example.com", "https://example.com:444", "https://www.example.com", "https://example.co"],
        ),
        ("https://EXAMPLE.com", ["https://example.com"], ["https://example.net"]),
        ("HTTPS://example.com:443", ["https://example.com"], ["http://example.com:443"]),
        ("http://example.com:080", ["http://example.com"], ["http://example.com:8080"]),
        (
            "https://*.example.com",
            ["https://a.example.com", "https://a.b.example.com", "https://A.EXAMPLE.com:443"],
            ["https://example.com", "https://aexample.com", "https://a.example.com.evil.example",
             "https://a.example.com:8443", "http://a.example.com", "https://evil.example"],
        ),
        ("https://*.example.com:8443", ["https://a.example.com:8443"], ["https://a.example.com"]),
        (
            "http://localhost:*",
            ["http://localhost", "http://localhost:3000"],
            ["https://localhost:3000", "http://a.localhost:3000"],
        ),
        ("http://*.localhost:*", ["http://a.localhost:1"], ["http://localhost:1"]),
        ("http://[0:0::1]:8000", ["http://[::1]:8000"], ["http://[::1]"]),
        ("http://192.0.2.7", ["http://192.0.2.7"], ["http://192.0.2.70"]),
        ("https://xn--strae-oqa.de", ["https://XN--strae-oqa.de"], ["https://strasse.de"]),
        ("app://obsidian.md", ["app://obsidian.md"], ["https://obsidian.md"]),
        ("chrome-extension://abcdef", ["chrome-extension://abcdef"], ["chrome-extension://abc"]),
        ("capacitor://localhost", ["capacitor://localhost"], ["capacitor://localhost:1"]),
    ],
)  # fmt: skip
def test_an_origin_is_scheme_host_and_port(
    entry: str, matching: list[str], others: list[str]
) -> None:
    pattern = OriginPattern.parse(entry)
    assert [each for each in matching if not pattern.matches(Origin.parse(each))] == []
    assert [each for each in others if pattern.matches(Origin.parse(each))] == []


@pytest.mark.parametrize(
    "entry, matching, others",
    [
        ("*", [("a", None), ("b", 1)], []),
        ("Example.com", [("example.com", None), ("example.com", 1)], [("a.example.com", None)]),
        # A proxy that leaves the port out leaves nothing to compare it with.
        ("example.com:8443", [("example.com", 8443), ("example.com", None)], [("example.com", 1)]),
        ("*.example.com", [("a.example.com", 1), ("a.b.example.com", None)], [("example.com", None)]),
        ("[::1]:1", [("[::1]", 1)], [("[::2]", 1)]),
        ("192.0.2.7", [("192.0.2.7", None)], [("2.192.0.2.7", None)]),
    ],
)  # fmt: skip
def test_a_host_pattern_is_a_name_and_perhaps_a_port(
    entry: str, matching: list[tuple[str, int | None]], others: list[tuple[str, int | None]]
) -> None:
    pattern = HostPattern.parse(entry)
    assert [each for each in matching if not pattern.matches(*each)] == []
    assert [each for each in others if pattern.matches(*each)] == []
