"""Braces in a pattern, as shells have them: what `{a,b}` stands for.

    {a,b}.c         a.c   b.c
    {a,{b,c}d}      a     bd    cd
    a{,b}           a     ab
    {a}             a
    a}{b   {a,b     themselves: braces without a partner are text, and so is a comma outside of braces

Rule: the work is linear in the pattern and in what it may stand for, whatever is nested in it.
"""

import re
from collections.abc import Iterator

import attrs

_tokens = re.compile(r"[{},]|[^{},]+").findall


class TooMany(ValueError):
    """A pattern stands for more than may be; the text says for more than what."""


@attrs.define
class _Level:
    """The text between two braces, or outside of all braces, as far as it was read."""

    found: set[str] = attrs.field(factory=set)
    """The alternatives before the last comma."""
    begun: set[str] = attrs.field(factory=lambda: {""})
    """The beginnings of those behind it."""

    def go_on_with(self, endings: set[str], most: int) -> None:
        begun: set[str] = set()
        for beginning in self.begun:
            begun.update([beginning + ending for ending in endings])
            _check(begun, most)
        self.begun = begun


def alternatives(pattern: str, most: int, most_characters: int) -> set[str]:
    """All that a pattern stands for, each without braces.

    Raises `TooMany` for more than `most`, and for more than `most_characters` all together.
    """
    levels = [_Level()]
    for token, is_text in _read(pattern):
        level = levels[-1]
        if is_text:
            level.go_on_with({token}, most)
        elif token == "{":
            levels.append(_Level())
        else:
            level.found |= level.begun
            level.begun = {""}
            _check(level.found, most)
            if token == "}":
                levels.pop()
                levels[-1].go_on_with(level.found, most)
        if sum(map(len, levels[-1].begun)) > most_characters:
            raise TooMany(f"more than {most_characters} characters without braces")
    return levels[-1].begun


def _check(found: set[str], most: int) -> None:
    if len(found) > most:
        raise TooMany(f"more than {most} patterns without braces")


def _read(pattern: str) -> Iterator[tuple[str, bool]]:
    """The tokens of a pattern, and whether each is text: what is no pair of braces, and no comma in
    one."""
    tokens = _tokens(pattern)
    opened: list[int] = []
    paired: set[int] = set()
    for place, token in enumerate(tokens):
        if token == "{":
            opened.append(place)
        elif token == "}" and opened:
            paired |= {opened.pop(), place}
    depth = 0
    for place, token in enumerate(tokens):
        yield token, not (place in paired or (token == "," and depth))
        if place in paired:
            depth += 1 if token == "{" else -1
