"""Names of topics and patterns, and the index that finds the patterns a topic matches.

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

Rules:

- Publications go to a topic, never to a pattern. A name with a wildcard token that breaks the rules
  for patterns is neither.
- The cost of a match follows the patterns that match, and those that could not be told apart by the
  one token they are filed under; of the latter 64 are ruled out in one step.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from operator import attrgetter
from typing import Any, Final, Generic, TypeAlias, TypeVar, cast

import attrs

T = TypeVar("T")

MAX_PATTERN_TOKENS: Final = 32
"""A match looks at one token after the other; NATS subjects rarely have more than 16."""

MAX_PATTERN_STARS: Final = 8
"""Each `*` makes a pattern match in more ways, and there are more patterns to match one topic. Eight
leave room for real names."""

CACHED: Final = 4096
"""Names that a question about names remembers, 255 bytes each: 1 MiB. Only busy ones matter."""

_has_control = re.compile("[\x00-\x1f\x7f]").search
_has_wildcard = re.compile(r"(?:^|\.)[*>](?:\.|\Z)").search


def is_pattern(name: str) -> bool:
    """Whether `name` has a wildcard token, so that it is not a topic. It may still be malformed."""
    # Most names have neither sign, and a search for one costs a tenth of the expression.
    return ("*" in name or ">" in name) and _has_wildcard(name) is not None


def mistaken_for_pattern(name: str) -> str:
    """A hint about a name that is a pattern elsewhere and a plain topic here; "" for any other name.

    In a pattern a wildcard is a whole token between dots::

        news*    news:*    a/+/b    a/#    news.#    news/>    news.**    one line, with the nearest pattern
        news?    room[1-3] room[^a]                                       the same: Redis has these
        news.*   a.b       a->b     c/c++  user#1,2                       nothing to say
        room[7]  room?id=1 are you there?                                 nothing to say
    """
    if _has_sign(name) is None or is_pattern(name):
        return ""
    like = name if _has_space_or_query(name) else _one_character.sub("*", name)
    if _has_wild_sign(like) is None:
        return ""
    like = ".".join(map(_apart, _separators.split(like.strip("/"))))
    # Two stars mean any number of tokens, which only the end of a pattern can say.
    like = re.sub(r"\*\*\Z", ">", like).replace("**", "*")
    try:
        check_pattern(like, len(name) * 8)
    except ValueError:
        return ""
    hint = f"{name!r} is the name of one topic, no pattern: did you mean {like!r}?"
    return hint if like.count(".") == name.count(".") else f"{hint} Names are split at dots"


def _apart(token: str) -> str:
    """A token with each star on its own, without what stood between it and the name: `news:*`."""
    if "*" not in token:
        return _WHOLE.get(token, token)
    words = [word if word[0] == "*" else word.strip(":_-") for word in _star_or_text.findall(token)]
    return ".".join(word if word[0] != "*" else word[:2] for word in words if word)


_has_wild_sign = re.compile("[*>+#]").search
_has_sign = re.compile(r"[*>+#?\[]").search
_has_space_or_query = re.compile(r"\s|\?[^?]*=").search
_one_character = re.compile(r"\?+|\[(?:\^[^\[\]]+|[^\[\]]*\w-\w[^\[\]]*)\]")
"""Wildcards of Redis for one character: any, or one of a range or of all but some."""
_separators = re.compile("[./]")
_star_or_text = re.compile(r"\*+|[^*]+")
_WHOLE: Final = {"+": "*", "#": ">"}
"""Wildcards of MQTT and AMQP, each a whole token there too."""


@lru_cache(CACHED)
def check_topic(name: str, max_bytes: int) -> None:
    """Raise `ValueError` with a short reason unless `name` may be published to.

    It remembers those that pass, which a broker asks about several times a publication.
    """
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
    # A printable text has no control character, and is told faster.
    if not name.isprintable() and _has_control(name):
        raise ValueError("the name holds a control character")


def matches(pattern: str, topic: str) -> bool:
    """Whether `pattern` matches `topic`: the definition, for tests and for single checks.

    Linear in the tokens. To ask many patterns at once, use `PatternIndex`.
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


MEMO: Final = 65_536
"""Places for matches that are remembered: `TOPIC_PLACES` for a topic and one for each pattern that it
matches, 0.5 MiB and 4,096 names. Only busy topics matter; one of them is found in 0.1 µs."""

TOPIC_PLACES: Final = 16
"""Places for a topic's own name, at 8 bytes a place and names of some ten letters."""

FEW: Final = 4
"""So many patterns of a bucket are checked one by one, 0.3 µs each; more have masks, which cost 1 µs
at least and hardly more for a thousand."""

Place: TypeAlias = tuple[int, str]
"""A token and where it stands, from 0."""


@attrs.define(eq=False)
class _Entry:
    """One pattern. `literals` are its tokens that are no wildcard, with their places."""

    value: object
    literals: tuple[Place, ...]
    stars: tuple[int, ...]
    length: int
    """Tokens, without a `>` at the end."""
    is_open: bool
    """Whether it ends in `>`."""
    order: bytes
    """See `PatternIndex.match`. Bytes, as thousands may have to be sorted."""
    bucket: "_Bucket | None" = attrs.field(default=None, repr=False)

    def fits(self, tokens: list[str]) -> bool:
        count = len(tokens)
        if count <= self.length if self.is_open else count != self.length:
            return False
        # A loop, as `all` takes 0.5 µs.
        for place, token in self.literals:  # noqa: SIM110
            if tokens[place] != token:
                return False
        return True


def _entry(pattern: str, value: object) -> _Entry:
    tokens = pattern.split(".")
    is_open = tokens[-1] == ">"
    if is_open:
        tokens.pop()
    literals = tuple((place, token) for place, token in enumerate(tokens) if token != "*")
    stars = tuple(place for place, token in enumerate(tokens) if token == "*")
    # By length, if open, then by where the stars are; closed ones that match one topic have one length.
    order = bytes((not is_open, len(tokens), *(token == "*" for token in tokens)))
    return _Entry(value, literals, stars, len(tokens), is_open, order)


@attrs.define(eq=False)
class _Masks:
    """The patterns of a large bucket, one bit each, by what they ask of a topic.

    A topic is matched by keeping, of all bits, those that agree with one token after the other:
    the same few steps for a thousand patterns as for ten.
    """

    rows: list[_Entry | None] = attrs.field(factory=list)
    free: list[int] = attrs.field(factory=list)
    row_of: dict[_Entry, int] = attrs.field(factory=dict)
    literals: dict[Place, int] = attrs.field(factory=dict)
    stars: dict[int, int] = attrs.field(factory=dict)
    """By place."""
    closed: dict[int, int] = attrs.field(factory=dict)
    """By length."""
    opened: dict[int, int] = attrs.field(factory=dict)
    """Those that end in `>`, by length."""

    def add(self, entry: _Entry) -> None:
        if self.free:
            row = self.free.pop()
            self.rows[row] = entry
        else:
            row = len(self.rows)
            self.rows.append(entry)
        self.row_of[entry] = row
        for masks, key in self.places(entry):
            masks[key] = masks.get(key, 0) | 1 << row

    def remove(self, entry: _Entry) -> None:
        row = self.row_of.pop(entry)
        self.rows[row] = None
        self.free.append(row)
        for masks, key in self.places(entry):
            left = masks[key] ^ 1 << row
            if left:
                masks[key] = left
            else:
                del masks[key]

    def places(self, entry: _Entry) -> Iterator[tuple[dict[Any, int], object]]:
        """The masks that have a bit for this pattern."""
        for place in entry.literals:
            yield self.literals, place
        for star in entry.stars:
            yield self.stars, star
        yield self.opened if entry.is_open else self.closed, entry.length

    def match(self, places: list[Place], found: list[_Entry]) -> None:
        count = len(places)
        alive = self.closed.get(count, 0)
        for length, opened in self.opened.items():
            if length < count:
                alive |= opened
        ended = 0  # open ones that have, and agree with whatever follows
        for literal in places[:MAX_PATTERN_TOKENS]:
            if not alive:
                return
            place = literal[0]
            ended |= self.opened.get(place, 0)
            alive &= self.literals.get(literal, 0) | self.stars.get(place, 0) | ended
        bits = f"{alive:b}"[::-1]
        row = bits.find("1")
        while row >= 0:
            entry = self.rows[row]
            assert entry is not None
            found.append(entry)
            row = bits.find("1", row + 1)


@attrs.define(eq=False)
class _Bucket:
    """The patterns that are filed under one token at one place."""

    place: Place | None
    entries: dict[_Entry, None] = attrs.field(factory=dict)
    masks: _Masks | None = None

    def add(self, entry: _Entry) -> None:
        self.entries[entry] = None
        if self.masks is not None:
            self.masks.add(entry)
        elif len(self.entries) > 2 * FEW:
            self._mask()

    def remove(self, entry: _Entry) -> None:
        del self.entries[entry]
        if self.masks is None:
            return
        self.masks.remove(entry)
        if len(self.entries) <= FEW:
            self.masks = None
        elif len(self.masks.rows) > 4 * len(self.entries):
            self._mask()  # as many have gone as are looked at here, three times over

    def _mask(self) -> None:
        self.masks = _Masks()
        for entry in self.entries:
            self.masks.add(entry)


@attrs.define(eq=False)
class PatternIndex(Generic[T]):
    """Well-formed patterns, each with one value; like a dict, but for `match`.

    A pattern is filed under one of its literal tokens: of the buckets it could be in, the smallest.
    So `user.7.*` is found by the 7, and a topic is compared only with patterns that share a token
    with it at the same place. A pattern that is removed leaves nothing behind, so memory follows the patterns
    that are in use.
    """

    _entries: dict[str, _Entry] = attrs.field(init=False, factory=dict)
    # The patterns without a literal token are under None.
    _buckets: dict[Place | None, _Bucket] = attrs.field(init=False, factory=dict)
    # Matches found since the patterns last changed, by topic.
    _memo: dict[str, list[T]] = attrs.field(init=False, factory=dict)
    _memo_left: int = attrs.field(init=False, default=MEMO)

    def __len__(self) -> int:
        return len(self._entries)

    def insert(self, pattern: str, value: T) -> None:
        """Give `pattern` this value, in place of the one it had. Check the pattern first."""
        self._forget()
        entry = self._entries.get(pattern)
        if entry is not None:
            entry.value = value
            return
        entry = self._entries[pattern] = _entry(pattern, value)
        # The last of equals, as names grow more special to their end.
        buckets = [self._buckets.get(place) for place in reversed(entry.literals)]
        sizes = [0 if bucket is None else len(bucket.entries) for bucket in buckets]
        place = entry.literals[-1 - sizes.index(min(sizes))] if sizes else None
        bucket = self._buckets.get(place)
        if bucket is None:
            bucket = self._buckets[place] = _Bucket(place)
        bucket.add(entry)
        entry.bucket = bucket

    def get(self, pattern: str) -> T | None:
        """The value of this very pattern, or None."""
        entry = self._entries.get(pattern)
        return None if entry is None else cast(T, entry.value)

    def remove(self, pattern: str) -> T:
        """Take `pattern` out and return its value. Raises `KeyError` if it is not there."""
        entry = self._entries.pop(pattern)
        self._forget()
        assert entry.bucket is not None
        entry.bucket.remove(entry)
        if not entry.bucket.entries:
            del self._buckets[entry.bucket.place]
        return cast(T, entry.value)

    def match(self, topic: str) -> list[T]:
        """The values of all patterns that match `topic`.

        In an order that depends on the patterns alone: those that end in `>`, shortest first,
        then the others; of two that first differ in one token, the literal comes before `*`.

        The cost follows the patterns that match, and the tokens of the topic; of patterns that
        share one token with it and still differ, 64 cost as much as one. A topic that has been
        asked for since the patterns last changed is one look-up.
        """
        known = self._memo.get(topic)
        if known is None:
            known = self._find(topic)
            places = TOPIC_PLACES + len(known)
            if places > self._memo_left:
                self._forget()
            if places <= self._memo_left:
                self._memo_left -= places
                self._memo[topic] = known
        return known[:]

    def values(self) -> Iterator[T]:
        """The values of all patterns, in no order that anyone should rely on."""
        for entry in self._entries.values():
            yield cast(T, entry.value)

    def _find(self, topic: str) -> list[T]:
        tokens = topic.split(".")
        places = list(enumerate(tokens))
        found: list[_Entry] = []
        get = self._buckets.get
        for place in (None, *places):
            bucket = get(place)
            if bucket is None:
                continue
            if bucket.masks is None:
                found += [entry for entry in bucket.entries if entry.fits(tokens)]
            else:
                bucket.masks.match(places, found)
        if len(found) > 1:
            found.sort(key=attrgetter("order"))
        return [entry.value for entry in found]  # type: ignore[misc]

    def _forget(self) -> None:
        self._memo.clear()
        self._memo_left = MEMO
