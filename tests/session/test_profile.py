"""A connection as an app sees it: the handshake that it came with."""

import pytest

from broker.core.messages import Transport
from broker.session.profile import Asked
from broker.transport.head import parse_head


def asked(*lines: str, target: str = "/chat", address: str = "10.0.0.1:5000") -> Asked:
    head = "\r\n".join((f"GET {target} HTTP/1.1", "Host: a", *lines, "", ""))
    transport: Transport = "websocket"
    return Asked(parse_head(head.encode()), address, transport)


@pytest.mark.parametrize(
    ("target", "path", "query", "params"),
    [
        ("/chat?a=1&b=%20", "/chat", "a=1&b=%20", {"a": "1", "b": " "}),
        ("/chat", "/chat", "", {}),
        ("/chat?", "/chat", "", {}),
        ("/chat?a=1?2", "/chat", "a=1?2", {"a": "1?2"}),
    ],
)
def test_a_target_is_a_path_and_a_query(
    target: str, path: str, query: str, params: dict[str, str]
) -> None:
    found = asked(target=target)
    assert (found.path, found.query, dict(found.params)) == (path, query, params)


def test_headers_are_found_by_their_names_in_lower_case() -> None:
    found = asked("X-App: one", "Cookie: a=1; b=2", "Cookie: c=3")
    assert found.headers["x-app"] == "one"
    assert found.cookies == {"a": "1", "b": "2", "c": "3"}


def test_subprotocols_of_several_lines_are_one_list() -> None:
    found = asked("Sec-WebSocket-Protocol: one, two", "Sec-WebSocket-Protocol: three")
    assert found.subprotocols == ("one", "two", "three")
    assert asked().subprotocols == ()


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("10.0.0.1:5000", "10.0.0.1", 5000), ("[::1]:80", "::1", 80), ("memory", "", 0)],
)
def test_an_address_is_a_host_and_a_port(address: str, host: str, port: int) -> None:
    found = asked(address=address)
    assert (found.remote_host, found.remote_port) == (host, port)


def test_data_is_the_apps_own_for_each() -> None:
    one, two = asked(), asked()
    one.data["room"] = 1
    assert two.data == {}
