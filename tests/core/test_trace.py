"""What a trace holds for its reader: bounded, with a count of what is missing, and without secrets."""

import pytest

from broker.core.trace import (
    ENTRIES_MOST,
    ENTRY_BYTES,
    RATE,
    START_MOST,
    TEXT_MOST,
    Entry,
    TraceBuffer,
    shown_text,
)


def entries(*texts: str) -> list[Entry]:
    return [Entry(0.0, "received", text=text) for text in texts]


def put(buffer: TraceBuffer, *texts: str, now: float = 0.0) -> None:
    buffer.add(iter(entries(*texts)), len(texts), now)


def test_entries_are_taken_once_and_in_order() -> None:
    buffer = TraceBuffer()
    put(buffer, "a", "b")
    put(buffer, "c")
    assert buffer.bytes_held == 3 * (ENTRY_BYTES + 1)
    assert buffer.take(2) == entries("a", "b")
    assert buffer.take() == entries("c")
    assert buffer.take() == []
    assert buffer.bytes_held == 0


def test_what_finds_no_room_is_counted_where_it_is_missing_and_never_made() -> None:
    buffer = TraceBuffer()
    made = 0

    def endless() -> object:
        nonlocal made
        while True:
            made += 1
            yield Entry(0.0, "received")

    buffer.add(endless(), ENTRIES_MOST + 7, 0.0)  # type: ignore[arg-type]
    assert (len(buffer), buffer.missed, made) == (ENTRIES_MOST, 7, ENTRIES_MOST)
    buffer.take(10)
    buffer.add(endless(), 2, 60.0)  # type: ignore[arg-type]
    put(buffer, "x", now=60.0)
    taken = buffer.take()
    assert [entry.missed for entry in taken[-3:]] == [7, 0, 0]
    assert taken[-1].text == "x"
    assert all(entry.missed == 0 for entry in taken[:-3])


def test_a_reader_that_keeps_up_gets_so_many_a_second() -> None:
    buffer = TraceBuffer()
    seen = 0
    for tenth in range(101):
        put(buffer, *["x"] * 1000, now=tenth / 10)
        seen += len(buffer.take())
    assert seen == pytest.approx(ENTRIES_MOST + 10 * RATE, rel=0.01)


def test_what_was_left_out_behind_the_last_entry_is_told_once() -> None:
    buffer = TraceBuffer()
    put(buffer, *["x"] * (ENTRIES_MOST + 5))
    buffer.take()
    assert (buffer.take_missed(), buffer.take_missed()) == (5, 0)


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ('{"connect":{"token":"s3cret"}}', '{"connect":{"token":"…"}}'),
        (r'{"connect":{"token" : "a\"b","name":"js"}}', '{"connect":{"token" : "…","name":"js"}}'),
        ('{"token":"never ends', '{"token":"…'),
        ('{"connect":{"session":"s3cret"}}', '{"connect":{"session":"…"}}'),
        ('{"headers":{"Authorization":"Bearer x"},"id":1}', '{"headers":{…},"id":1}'),
        ("\x0a\x05eyJhbGciOi.eyJzdWIi.c2ln\x12", "\x0a\x05eyJ…\x12"),
        ('{"publish":{"data":"tokens are fine"}}', '{"publish":{"data":"tokens are fine"}}'),
    ],
)
def test_secrets_are_not_shown(sent: str, shown: str) -> None:
    assert shown_text(sent.encode(), len(sent)) == (shown, False)


def test_a_message_is_shown_as_far_as_there_is_room() -> None:
    assert shown_text(b"x" * TEXT_MOST, TEXT_MOST) == ("x" * TEXT_MOST, False)
    assert shown_text(b"x" * (TEXT_MOST + 1), TEXT_MOST + 1) == ("x" * TEXT_MOST, True)
    whole = "\U0001f600" * TEXT_MOST
    assert shown_text(whole.encode(), START_MOST) == (whole, False)
    assert shown_text(whole.encode(), START_MOST + 1) == (whole, True)
    assert shown_text(b"\xff\x00a", 3) == ("\\xff\x00a", False)
