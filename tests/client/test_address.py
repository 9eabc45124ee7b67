"""Where a broker is, from its URL."""

import re

import pytest

from broker.client import open_client
from broker.client.address import host_header, split_url
from broker.errors import ClientError


@pytest.mark.parametrize(
    "url, parts",
    [
        ("ws://localhost:9501", ("localhost", 9501, "/")),
        ("ws://example.com", ("example.com", 80, "/")),
        ("wss://example.com", ("example.com", 443, "/")),
        ("wss://example.com/a/b?c=d&e", ("example.com", 443, "/a/b?c=d&e")),
        ("ws://[::1]:9501/", ("::1", 9501, "/")),
        ("ws://例え.jp/é?ü=%20 b", ("例え.jp", 80, "/%C3%A9?%C3%BC=%20%20b")),
        ("ws://h/a\x1b\x7f", ("h", 80, "/a%1B%7F")),
        ("ws://h/x#fragment", ("h", 80, "/x")),
    ],
)
def test_a_url_is_host_port_and_what_to_ask_for(url: str, parts: tuple[str, int, str]) -> None:
    assert split_url(url) == parts


@pytest.mark.parametrize(
    "url",
    [
        *("http://broker.test", "broker.test:9501", "", "ws://", "ws://host:port", "ws://[::1"),
        *("ws://host:0", "ws://host:65536", "ws://a..b", "ws://.", f"ws://{'a' * 64}.test"),
        *("ws://\x1b[2J/", "ws://:9501"),
    ],
)
async def test_a_bad_url_is_named(url: str) -> None:
    with pytest.raises(ClientError, match=re.escape(repr(url)) + " is not a WebSocket URL"):
        async with open_client(url):
            pytest.fail("connected")


def test_a_url_with_a_password_is_refused_without_naming_it() -> None:
    with pytest.raises(ClientError, match="the URL for 'h' names a user") as caught:
        split_url("ws://al:s3cret@h")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "host, port, header",
    [
        ("h", 9501, "h:9501"),
        ("h", 80, "h"),
        ("h", 443, "h"),
        ("::1", 9501, "[::1]:9501"),
        ("::1", 80, "[::1]"),
    ],
)
def test_the_host_header_names_the_port_where_it_is_unusual(
    host: str, port: int, header: str
) -> None:
    assert host_header(host, port) == header
