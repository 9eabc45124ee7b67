"""Inputs by chance, from seeds: the same for the same number on every machine."""

import random
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from tests.fuzz.target import Target

Change: TypeAlias = Callable[[random.Random, bytearray, Target], None]

LARGE: Final = 40
"""One input of so many is blown up to tens of kilobytes, where work that is not linear shows."""
LARGE_BYTES: Final = 2**15

NUMBERS: Final = (
    b"0", b"-1", b"255", b"256", b"65535", b"65536", b"2147483648", b"4294967296",
    b"9223372036854775808", b"18446744073709551616", b"1e999", b"1" * 400, b"NaN", b"0.1",
)  # fmt: skip
ODD_BYTES: Final = b"\0\1\x7f\x80\x81\x88\x89\xfe\xff \t\r\n\"'\\{}[]:,;=."


def input_of(target: Target, number: int) -> bytes:
    """The input of this number: always the same."""
    chance = random.Random(f"{target.name} {number}")
    data = bytearray(chance.choice(_sources(target)))
    for _ in range(chance.choice((1, 1, 1, 2, 2, 3, 5, 8))):
        chance.choice(CHANGES)(chance, data, target)
    if number % LARGE == 0:
        _blow_up(chance, data)
    else:
        del data[target.most :]
    return bytes(data)


def _sources(target: Target) -> Sequence[bytes]:
    return target.seeds


def _place(chance: random.Random, data: bytearray) -> int:
    return chance.randrange(len(data) + 1)


def _flip(chance: random.Random, data: bytearray, target: Target) -> None:
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _set(chance: random.Random, data: bytearray, target: Target) -> None:
    if data:
        data[chance.randrange(len(data))] = chance.choice(ODD_BYTES)


def _delete(chance: random.Random, data: bytearray, target: Target) -> None:
    at = _place(chance, data)
    del data[at : at + chance.randint(1, 9)]


def _cut(chance: random.Random, data: bytearray, target: Target) -> None:
    del data[_place(chance, data) :]


def _repeat(chance: random.Random, data: bytearray, target: Target) -> None:
    at = _place(chance, data)
    piece = data[at : at + chance.randint(1, 24)]
    data[at:at] = piece * chance.choice((1, 1, 2, 20))


def _insert(chance: random.Random, data: bytearray, target: Target) -> None:
    at = _place(chance, data)
    data[at:at] = chance.randbytes(chance.randint(1, 6))


def _word(chance: random.Random, data: bytearray, target: Target) -> None:
    if target.words:
        at = _place(chance, data)
        data[at:at] = chance.choice(target.words)


def _number(chance: random.Random, data: bytearray, target: Target) -> None:
    digits = [at for at, byte in enumerate(data) if 0x30 <= byte <= 0x39]
    at = chance.choice(digits) if digits else _place(chance, data)
    data[at : at + 1] = chance.choice(NUMBERS)


def _splice(chance: random.Random, data: bytearray, target: Target) -> None:
    other = chance.choice(_sources(target))
    data[_place(chance, data) :] = other[chance.randrange(len(other) + 1) :]


def _swap(chance: random.Random, data: bytearray, target: Target) -> None:
    a, b = sorted((_place(chance, data), _place(chance, data)))
    data[a:b] = data[b : b + b - a] + data[a:b]


CHANGES: Final[tuple[Change, ...]] = (
    _flip, _set, _delete, _cut, _repeat, _insert, _word, _word, _number, _splice, _swap,
)  # fmt: skip


def _blow_up(chance: random.Random, data: bytearray) -> None:
    """Repeat a piece of it, or all, until it is large."""
    if not data:
        return
    at = chance.randrange(len(data))
    piece = data[at : at + chance.choice((1, 2, 8, len(data)))]
    times = chance.randint(1, LARGE_BYTES) // len(piece)
    data[at:at] = piece * times
    del data[LARGE_BYTES:]


def dictionary_of(target: Target) -> str:
    """The words of a target as libFuzzer reads them."""
    return "".join(
        '"{}"\n'.format("".join(f"\\x{byte:02x}" for byte in word)) for word in target.words
    )
