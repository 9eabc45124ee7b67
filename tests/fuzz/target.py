"""One way to take bytes of strangers, and what must hold whatever they are.

A target's `judge` gets any bytes. It raises `AssertionError`, or whatever the code under it raises and was
not allowed to, where something is wrong; that is all that a finding is. Work is judged for all alike:
the calls that are made, and the time on the CPU, are linear in the input.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final, TypeAlias

import attrs

Judge: TypeAlias = Callable[[bytes], object]

CORPUS: Final = Path(__file__).parent / "corpus"
"""A directory for each target: what was found on the way, and what leads far into the code."""

COUNTED_FROM: Final = 1024
"""Bytes of an input whose calls are counted: what is more than linear shows in large ones."""

BASE_CALLS: Final = 20_000
CALLS_PER_BYTE: Final = 40
"""Calls of functions, in Python or C, of an input: ten times what the costliest target has needed."""

BASE_SECONDS: Final = 0.1
SECONDS_PER_BYTE: Final = 50e-6
"""Time on the CPU, for what is slow without a call, such as a pattern that goes back and forth. It is wide,
as the judge is timed as well, and coverage is counted meanwhile; and the least of three tries counts."""


@attrs.frozen
class Target:
    """See the module. `seeds` are inputs to begin with, `words` what may be put into one."""

    name: str
    judge: Judge
    seeds: tuple[bytes, ...]
    words: tuple[bytes, ...] = ()
    share: int = 30
    """Of the inputs in the default tests: less where one takes longer."""
    most: int = 4096
    """Bytes of an input."""

    def check(self, data: bytes) -> None:
        """Judge one input, and the work that it was. Raises what is wrong."""
        began = time.thread_time()
        if len(data) < COUNTED_FROM:
            self.judge(data)
        else:
            calls = _calls(self.judge, data)
            most = BASE_CALLS + CALLS_PER_BYTE * len(data)
            assert calls <= most, f"{calls} calls for {len(data)} bytes, at most {most}"
        bound = BASE_SECONDS + SECONDS_PER_BYTE * len(data)
        took = time.thread_time() - began
        for _ in range(2):
            if took <= bound:
                break
            began = time.thread_time()
            self.judge(data)
            took = min(took, time.thread_time() - began)
        assert took <= bound, f"{took:.3f} s for {len(data)} bytes, at most {bound:.3f}"

    def corpus(self) -> Sequence[bytes]:
        """The inputs that are kept, in the order of their names."""
        return [path.read_bytes() for path in sorted((CORPUS / self.name).glob("*"))]


def _calls(judge: Judge, data: bytes) -> int:
    count = 0

    def note(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        judge(data)
    finally:
        sys.setprofile(before)
    return count


TARGETS: Final[dict[str, Target]] = {}


def target(
    name: str, *seeds: bytes, words: Sequence[bytes] = (), share: int = 30, most: int = 4096
) -> Callable[[Judge], Judge]:
    """Make the decorated function the judge of a target."""

    def decorate(judge: Judge) -> Judge:
        assert name not in TARGETS, name
        TARGETS[name] = Target(name, judge, seeds, tuple(words), share, most)
        return judge

    return decorate
