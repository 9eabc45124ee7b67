"""`broker.logs.writer`: lines get through a thread in order, or are dropped and counted."""

import io
import os
import sys
import threading
from collections.abc import Iterator
from typing import TextIO

import pytest

import broker.logs.writer
from broker.logs.writer import LineWriter, LogStatistics, write_now

PATIENCE = 20.0


class Pipe:
    """A pipe in the place of stderr. Nobody reads it but the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, encoding: str = "utf-8") -> None:
        read, write = os.pipe()
        self.reader = os.fdopen(read, encoding=encoding)
        self.writer: TextIO = os.fdopen(write, "w", encoding=encoding, errors="strict")
        self._monkeypatch = monkeypatch

    def open_writer(self, counts: "Counts | None" = None, *, room: int = 2**17) -> LineWriter:
        """Make this the stderr of the test, and a writer to it."""
        self.be_stderr()
        counts = counts or Counts()
        return LineWriter("stderr", counts.on_dropped, counts.idle.set, room=room)

    def be_stderr(self) -> None:
        self._monkeypatch.setattr(sys, "stderr", self.writer)


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipe]:
    made = Pipe(monkeypatch)
    with made.reader, made.writer:
        yield made


class Counts:
    """The words of a writer, and their times."""

    def __init__(self) -> None:
        self.dropped: list[int] = []
        self.told = threading.Event()
        self.idle = threading.Event()

    def on_dropped(self, count: int) -> None:
        self.dropped.append(count)
        self.told.set()


LINE = "x" * 1023  # 1 KiB with its end


def stalled(writer: LineWriter, *, important: bool = False) -> int:
    """Write until nothing fits; return how many lines were taken."""
    for number in range(10_000):
        writer.write(LINE, important=important)
        if writer.statistics().lines_dropped:
            return number
    raise AssertionError("it takes everything")


def test_lines_come_out_whole_and_in_order(pipe: Pipe) -> None:
    writer = pipe.open_writer()
    for number in range(100):
        writer.write(f"线 {number}", important=False)
    assert [pipe.reader.readline() for _ in range(100)] == [f"线 {n}\n" for n in range(100)]
    writer.close(PATIENCE)


def test_a_full_pipe_delays_nobody_and_drops_are_told_once_it_moves(pipe: Pipe) -> None:
    counts = Counts()
    writer = pipe.open_writer(counts)
    taken = stalled(writer)
    assert 64 <= taken <= 64 + 64 + 4  # half of the room, and what the pipe itself holds
    assert writer.statistics().waiting_bytes <= 2**16
    for _ in range(9):
        writer.write(LINE, important=False)
    assert writer.statistics().lines_dropped == 10
    assert not writer.flush(0)
    assert counts.dropped == []
    for _ in range(taken):
        assert pipe.reader.readline() == LINE + "\n"
    assert counts.told.wait(PATIENCE)
    assert writer.flush(PATIENCE)
    assert counts.dropped == [10]
    assert writer.statistics() == LogStatistics(lines_dropped=10, waiting_bytes=0)
    writer.write("and on", important=False)
    assert pipe.reader.readline() == "and on\n"
    writer.close(PATIENCE)


def test_an_important_line_has_room_where_others_have_none(pipe: Pipe) -> None:
    writer = pipe.open_writer()
    taken = stalled(writer)
    writer.write("an error", important=True)
    for _ in range(taken):
        pipe.reader.readline()
    assert pipe.reader.readline() == "an error\n"
    writer.close(PATIENCE)


def test_important_lines_have_a_bound_too(pipe: Pipe) -> None:
    writer = pipe.open_writer()
    assert stalled(writer, important=True) <= 128 + 64 + 4
    assert 2**16 < writer.statistics().waiting_bytes <= 2**17
    pipe.reader.close()  # the thread ends with a broken pipe
    writer.close(PATIENCE)


def test_a_line_larger_than_the_room_is_taken_when_nothing_else_waits(pipe: Pipe) -> None:
    writer = pipe.open_writer(room=1024)
    writer.write("y" * 300_000, important=False)
    writer.write("z", important=True)  # no room beside it
    assert len(pipe.reader.readline()) == 300_001
    assert writer.statistics().lines_dropped == 1
    writer.close(PATIENCE)


def test_a_pipe_that_somebody_made_non_blocking_loses_nothing(pipe: Pipe) -> None:
    os.set_blocking(pipe.writer.fileno(), False)
    writer = pipe.open_writer(room=2**20)
    for _ in range(200):
        writer.write(LINE, important=False)
    assert [pipe.reader.readline() for _ in range(200)] == [LINE + "\n"] * 200
    writer.close(PATIENCE)


def test_idle_is_told_after_a_line_and_then_silence(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker.logs.writer, "IDLE_SECONDS", 0.01)
    counts = Counts()
    writer = pipe.open_writer(counts)
    writer.write("x", important=False)
    assert counts.idle.wait(PATIENCE)
    writer.close(PATIENCE)


def test_a_close_writes_what_waits_and_does_not_wait_for_a_reader(pipe: Pipe) -> None:
    writer = pipe.open_writer()
    writer.write("x", important=False)
    writer.close(PATIENCE)
    assert pipe.reader.readline() == "x\n"
    stalled(writer)
    writer.close(0)
    assert writer.flush(0)
    pipe.reader.close()


def test_a_reader_that_has_gone_fails_nobody(pipe: Pipe) -> None:
    writer = pipe.open_writer()
    pipe.reader.close()
    for _ in range(3):
        writer.write("x", important=False)
        assert writer.flush(PATIENCE)
    writer.close(PATIENCE)


def test_a_stream_that_is_closed_later_fails_nobody(pipe: Pipe) -> None:
    writer = pipe.open_writer()
    writer.write("x", important=False)
    assert writer.flush(PATIENCE)
    pipe.writer.close()
    writer.write("y", important=False)
    assert writer.flush(PATIENCE)
    assert pipe.reader.read() == "x\n"
    writer.close(PATIENCE)


def test_lines_go_to_the_stream_that_is_there_at_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = Pipe(monkeypatch), Pipe(monkeypatch)
    with first.reader, first.writer, second.reader, second.writer:
        writer = first.open_writer()
        for pipe, text in ((first, "one"), (second, "two"), (first, "three")):
            pipe.be_stderr()
            writer.write(text, important=False)
        assert [first.reader.readline(), first.reader.readline()] == ["one\n", "three\n"]
        assert second.reader.readline() == "two\n"
        writer.close(PATIENCE)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_encoding_that_cannot_say_it_gets_escapes(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    pipe = Pipe(monkeypatch, encoding=encoding)
    with pipe.reader, pipe.writer:
        writer = pipe.open_writer()
        writer.write("服务", important=False)
        assert pipe.reader.readline() == "\\u670d\\u52a1\n"
        writer.close(PATIENCE)


def test_a_stream_in_memory_is_written_at_once_and_without_a_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    before = threading.active_count()
    LineWriter("stderr", Counts().on_dropped).write("x", important=False)
    assert stream.getvalue() == "x\n"
    assert threading.active_count() == before


def test_no_stream_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    writer = LineWriter("stderr", Counts().on_dropped)
    writer.write("x", important=True)
    assert writer.flush(0)
    write_now(None, "x")
