"""Names of topics and patterns, and the tree that finds the patterns a topic matches.

A topic is any text without control characters. Its tokens are split at `.`; a pattern is a
name with at least one wildcard token: `*` stands for exactly one token, `>` for one or more at
the end.

::

    topics      news    news:europe    $private    user#1,2    chat index    新闻.欧洲
                a..b            three tokens, the middle one empty; likewise `a.` and `.`
                a.b*    >>      a wildcard is a whole token, so these are plain text
    patterns    *    >    news.*    news.>    *.europe.*    a.*.>
    neither     (empty)    a\\x00b    a lone surrogate    more bytes than allowed
                >.a    a.>.b    `>` stands last or not at all

    pattern     matches                      does not match
    news.*      news.eu    news.             news    news.eu.fr    newsroom.eu
    news.>      news.eu    news.eu.fr        news
    a.*.b       a.x.b    a..b                a.b    a.x.y.b
    *           news    news:europe          a.b
    fd:7.>      fd:7.x                       fd:7

The last pattern is valid, and in practice matches nothing: `fd:7` has a single token.

Rule: what is published to is a topic, never a pattern. A name with a wildcard token that breaks
the rules for patterns is neither.
"""

import re
from collections.abc import Iterator
from typing import Final, Generic, TypeVar, cast

import attrs

T = TypeVar("T")

MAX_PATTERN_TOKENS: Final = 32
"""A match goes down one level of the tree per token; NATS subjects rarely have more than 16."""

MAX_PATTERN_STARS: Final = 8
"""Each `*` lets a match go two ways at once: a tree full of patterns such as `*.a.*.b`, planted
for the purpose, is walked along every way to place the stars. Eight leave room for real names."""

_has_control = re.compile("[\x00-\x1f\x7f]").search
_has_wildcard = re.compile(r"(?:^|\.)[*>](?:\.|\Z)").search


def is_pattern(name: str) -> bool:
    """Whether `name` has a wildcard token, so that it is not a topic. It may still be malformed."""
    # Most names have neither sign, and a search for one costs a tenth of the expression.
    return ("*" in name or ">" in name) and _has_wildcard(name) is not None


def check_topic(name: str, max_bytes: int) -> None:
    """Raise `ValueError` with a short reason unless `name` may be published to."""
    _check_text(name, max_bytes)
    if is_pattern(name):
        raise ValueError("a topic has no wildcard token: this is a pattern")


def check_pattern(name: str, max_bytes: int) -> None:
    """Raise `ValueError` with a short reason unless `name` is a well-formed pattern."""
    _check_text(name, max_bytes)
    if not is_pattern(name):
        raise ValueError("a pattern has at least one wildcard token, '*' or '>'")
    tokens = name.split(".")
    if len(tokens) > MAX_PATTERN_TOKENS:
        raise ValueError(f"a pattern has at most {MAX_PATTERN_TOKENS} tokens")
    if tokens.count("*") > MAX_PATTERN_STARS:
        raise ValueError(f"a pattern has at most {MAX_PATTERN_STARS} '*' tokens")
    if ">" in tokens[:-1]:
        raise ValueError("'>' is the last token of a pattern or not in it")


def _check_text(name: str, max_bytes: int) -> None:
    if not name:
        raise ValueError("the name is empty")
    # A code point takes at least one byte, so most names are settled without encoding them.
    too_long = len(name) > max_bytes
    if not too_long and not name.isascii():
        try:
            too_long = len(name.encode()) > max_bytes
        except UnicodeEncodeError:
            raise ValueError("the name holds a lone surrogate") from None
    if too_long:
        raise ValueError(f"the name is longer than {max_bytes} bytes")
    # What is printable has no control character, and is told faster.
    if not name.isprintable() and _has_control(name):
        raise ValueError("the name holds a control character")


def matches(pattern: str, topic: str) -> bool:
    """Whether `pattern` matches `topic`: the definition, for tests and for single checks.

    Linear in the tokens. To ask many patterns at once, use `PatternTree`.
    """
    wanted = pattern.split(".")
    tokens = topic.split(".")
    if wanted[-1] == ">":
        wanted.pop()
        if len(tokens) <= len(wanted):
            return False
        del tokens[len(wanted) :]
    return len(wanted) == len(tokens) and all(
        want in ("*", token) for want, token in zip(wanted, tokens, strict=True)
    )


_ABSENT: Final = object()


@attrs.define(eq=False)
class _Node:
    """One token of one or more patterns, below the tokens before it."""

    literal: "dict[str, _Node]" = attrs.field(factory=dict)
    star: "_Node | None" = None
    here: object = _ABSENT  # value of the pattern that ends at this token
    rest: object = _ABSENT  # value of the pattern that goes on with `>` and ends

    def is_empty(self) -> bool:
        return (
            self.here is _ABSENT and self.rest is _ABSENT and self.star is None and not self.literal
        )


@attrs.define(eq=False)
class PatternTree(Generic[T]):
    """Well-formed patterns, each with one value; like a dict, but for `match`.

    What is removed leaves nothing behind, so memory follows the patterns that are in use.
    """

    _root: _Node = attrs.field(init=False, factory=_Node)
    _length: int = attrs.field(init=False, default=0)

    def __len__(self) -> int:
        return self._length

    def insert(self, pattern: str, value: T) -> None:
        """Give `pattern` this value, in place of the one it had. Check the pattern first."""
        tokens = pattern.split(".")
        open_ended = tokens[-1] == ">"
        if open_ended:
            tokens.pop()
        node = self._root
        for token in tokens:
            if token == "*":
                if node.star is None:
                    node.star = _Node()
                node = node.star
            else:
                child = node.literal.get(token)
                if child is None:
                    child = node.literal[token] = _Node()
                node = child
        if open_ended:
            self._length += node.rest is _ABSENT
            node.rest = value
        else:
            self._length += node.here is _ABSENT
            node.here = value

    def get(self, pattern: str) -> T | None:
        """The value of this very pattern, or None."""
        path, open_ended = self._walk(pattern)
        if not path:
            return None
        value = path[-1].rest if open_ended else path[-1].here
        return None if value is _ABSENT else cast(T, value)

    def remove(self, pattern: str) -> T:
        """Take `pattern` out and return its value. Raises `KeyError` if it is not there."""
        path, open_ended = self._walk(pattern)
        value: object = _ABSENT
        if path:
            node = path[-1]
            if open_ended:
                value, node.rest = node.rest, _ABSENT
            else:
                value, node.here = node.here, _ABSENT
        if value is _ABSENT:
            raise KeyError(pattern)
        self._length -= 1
        for token, parent, child in reversed(
            list(zip(pattern.split("."), path, path[1:], strict=False))
        ):
            if not child.is_empty():
                break
            if token == "*":
                parent.star = None
            else:
                del parent.literal[token]
        return cast(T, value)

    def match(self, topic: str) -> list[T]:
        """The values of all patterns that match `topic`.

        In an order that depends on the patterns alone: those that end in `>`, shortest first,
        then the others; of two that first differ in one token, the literal comes before `*`.

        The cost follows the ways down the tree that agree with the topic so far; patterns that
        differ from it in an early token cost nothing.
        """
        found: list[object] = []
        level = [self._root]
        for token in topic.split("."):
            below: list[_Node] = []
            for node in level:
                if node.rest is not _ABSENT:
                    found.append(node.rest)
                child = node.literal.get(token)
                if child is not None:
                    below.append(child)
                if node.star is not None:
                    below.append(node.star)
            if not below:
                return cast(list[T], found)
            level = below
        found += [node.here for node in level if node.here is not _ABSENT]
        return cast(list[T], found)

    def values(self) -> Iterator[T]:
        """The values of all patterns, in no order that anyone should rely on."""
        nodes = [self._root]
        while nodes:
            node = nodes.pop()
            yield from (cast(T, value) for value in (node.here, node.rest) if value is not _ABSENT)
            nodes += node.literal.values()
            if node.star is not None:
                nodes.append(node.star)

    def _walk(self, pattern: str) -> tuple[list[_Node], bool]:
        """The nodes from the root to where the pattern's value is, and whether it ends in `>`.

        No nodes if the tree has no such place.
        """
        tokens = pattern.split(".")
        open_ended = tokens[-1] == ">"
        if open_ended:
            tokens.pop()
        path = [self._root]
        for token in tokens:
            node = path[-1].star if token == "*" else path[-1].literal.get(token)
            if node is None:
                return [], open_ended
            path.append(node)
        return path, open_ended
