"""`broker.config.place`: how a setting names a place to listen on."""

from pathlib import Path

import pytest

from broker.config.place import parse_place


@pytest.mark.parametrize(
    "text, place",
    [
        ("unix:/run/broker.sock", Path("/run/broker.sock")),
        ("unix:here.sock", Path("here.sock")),
        ("localhost:9502", ("localhost", 9502)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
        ("[::1]:9501", ("::1", 9501)),
        ("[::]:9503", ("::", 9503)),
    ],
)
def test_a_place_is_a_unix_socket_or_host_and_port(
    text: str, place: Path | tuple[str, int]
) -> None:
    assert parse_place(text) == place


@pytest.mark.parametrize(
    "text",
    ["", "9501", ":9501", "localhost", "localhost:", "localhost:http", "localhost:-1", "::1:9501",
     "::1", "[::1]", "localhost:٣", "unix:"],
)  # fmt: skip
def test_all_else_is_refused_with_its_text_and_an_example(text: str) -> None:
    with pytest.raises(ValueError) as refusal:
        parse_place(text)
    assert repr(text) in str(refusal.value)
    assert "unix:/run/broker.sock" in str(refusal.value)
