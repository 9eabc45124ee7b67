"""Names: which are topics, which are patterns; and the index against the plain definition."""

import random
from functools import cmp_to_key
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from broker.core.topics import (
    FEW,
    MAX_PATTERN_STARS,
    MAX_PATTERN_TOKENS,
    MEMO,
    TOPIC_PLACES,
    PatternIndex,
    check_pattern,
    check_topic,
    is_pattern,
    matches,
    mistaken_for_pattern,
)

TOPICS = [
    "news",
    "news:europe",
    "$private",
    "user#1,2",
    "chat index",
    "新闻.欧洲",
    "ideographic\u3000space",
    "a..b",
    "a.",
    ".",
    "a.b*",
    "*a",
    ">>",
    "a.**.b",
    "\U0001f600",
    "\x80",  # a C1 control character is no danger to us, and Latin-1 text may hold one
]
PATTERNS = ["*", ">", "news.*", "news.>", "*.europe.*", "a.*.>", "*.*", "..*", "user#1,2.*"]
NEITHER = {
    "": "empty",
    "a\x00b": "control character",
    "line\n": "control character",
    "\x7f": "control character",
    "\ud800": "lone surrogate",
    "a\udfff.>": "lone surrogate",
    "x" * 256: "longer than 255 bytes",
    "é" * 128: "longer than 255 bytes",
    "x" * 1_000_000: "longer than 255 bytes",
}


@pytest.mark.parametrize("name", TOPICS)
def test_a_topic_is_accepted_as_a_topic_and_only_so(name: str) -> None:
    check_topic(name, 255)
    assert not is_pattern(name)
    with pytest.raises(ValueError, match="at least one wildcard token"):
        check_pattern(name, 255)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_is_accepted_as_a_pattern_and_only_so(name: str) -> None:
    check_pattern(name, 255)
    assert is_pattern(name)
    with pytest.raises(ValueError, match="this is a pattern"):
        check_topic(name, 255)


@pytest.mark.parametrize(("name", "reason"), NEITHER.items(), ids=lambda text: repr(text)[:20])
def test_bad_text_is_refused_with_its_reason(name: str, reason: str) -> None:
    for check in (check_topic, check_pattern):
        with pytest.raises(ValueError, match=reason) as caught:
            check(name, 255)
        assert len(str(caught.value)) < 80  # fit for a close reason, and the name is not echoed


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (">.a", "last token"),
        ("a.>.b", "last token"),
        (">.>", "last token"),
        (".".join(["*"] * 9), f"at most {MAX_PATTERN_STARS}"),
        (".".join(["a"] * 32 + [">"]), f"at most {MAX_PATTERN_TOKENS}"),
    ],
)
def test_a_malformed_pattern_is_neither_topic_nor_pattern(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_pattern(name, 255)
    with pytest.raises(ValueError, match="this is a pattern"):
        check_topic(name, 255)


@pytest.mark.parametrize(
    "name, pattern",
    [
        ("news*", "news.*"),
        ("*news", "*.news"),
        ("a*b", "a.*.b"),
        ("news.**", "news.>"),
        ("**", ">"),
        ("news/*", "news.*"),
        ("/news/>", "news.>"),
        ("a/**/b", "a.*.b"),
        ("news:*", "news.*"),
        ("chat:room-*", "chat:room.*"),
        ("a:*:b", "a.*.b"),
        ("a/+/b", "a.*.b"),
        ("a/#", "a.>"),
        ("news.#", "news.>"),
        ("news.+", "news.*"),
        ("#", ">"),
        ("新闻*", "新闻.*"),
        ("*" * 255, ">"),
        ("news?", "news.*"),
        ("news.?", "news.*"),
        ("a??b", "a.*.b"),
        ("room[1-3]", "room.*"),
        ("room.[a-c]", "room.*"),
        ("room[^a]", "room.*"),
    ],
)
def test_a_topic_that_is_a_pattern_elsewhere_is_told_with_the_nearest_pattern(
    name: str, pattern: str
) -> None:
    check_topic(name, 255)
    check_pattern(pattern, 255)
    hint = mistaken_for_pattern(name)
    assert hint.startswith(
        f"{name!r} is the name of one topic, no pattern: did you mean {pattern!r}?"
    )
    assert hint.endswith("Names are split at dots") == (name.count(".") != pattern.count("."))


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            "news",
            "news:europe",
            "$private",
            "user#1,2",
            "a..b",
            "chat index",
            "a/b",
            *PATTERNS,
        ),
        *(
            "a->b",
            "a>b",
            ">>",
            "=>",
            "c/c++",
            "C#",
            "#general",
            "a + b",
            "a/>/b",
            "are you there?",
            "room?id=7",
            "room[7]",
            "user[name]",
            "[]",
            "a-b[",
            "\ud800*",
            "\x00*",
        ),
    ],
)
def test_of_other_names_there_is_nothing_to_tell(name: str) -> None:
    assert mistaken_for_pattern(name) == ""


@given(st.text(alphabet="a.*>+#/:-?[^]= \x00\ud800", max_size=12))
def test_what_is_told_names_a_pattern_and_never_fails(name: str) -> None:
    hint = mistaken_for_pattern(name)
    if hint:
        assert not is_pattern(name)
        check_pattern(hint.rpartition("did you mean '")[2].partition("'?")[0], 255)


def test_the_bounds_themselves_are_allowed() -> None:
    check_pattern(".".join(["*"] * 8 + ["a"] * 23 + [">"]), 255)
    check_topic("x" * 255, 255)
    check_topic("é" * 127 + "x", 255)


@pytest.mark.parametrize(
    ("pattern", "topic", "expected"),
    [
        ("news.*", "news.eu", True),
        ("news.*", "news.", True),
        ("news.*", "news", False),
        ("news.*", "news.eu.fr", False),
        ("news.*", "newsroom.eu", False),
        ("news.>", "news.eu", True),
        ("news.>", "news.eu.fr", True),
        ("news.>", "news", False),
        ("a.*.b", "a.x.b", True),
        ("a.*.b", "a..b", True),
        ("a.*.b", "a.b", False),
        ("a.*.b", "a.x.y.b", False),
        ("*", "news", True),
        ("*", "news:europe", True),
        ("*", "a.b", False),
        (">", "a.b.c", True),
        (">", ".", True),
        ("*.>", "a", False),
        ("*.>", "a.b", True),
        ("fd:7.>", "fd:7.x", True),
        ("fd:7.>", "fd:7", False),
    ],
)
def test_a_pattern_matches_token_by_token(pattern: str, topic: str, expected: bool) -> None:
    assert matches(pattern, topic) is expected
    index = PatternIndex[str]()
    index.insert(pattern, "here")
    assert index.match(topic) == (["here"] if expected else [])


def test_the_order_of_matches_does_not_depend_on_the_order_of_insertion() -> None:
    # `>` by depth, then the others, literal before `*`.
    patterns = [">", "a.>", "*.>", "a.*", "*.b", "*.*"]
    for turned in (patterns, patterns[::-1], patterns[3:] + patterns[:3]):
        index = PatternIndex[str]()
        for pattern in turned:
            index.insert(pattern, pattern)
        assert index.match("a.b") == patterns


def test_a_pattern_has_one_value() -> None:
    index = PatternIndex[int]()
    index.insert("a.*", 1)
    index.insert("a.*", 2)
    assert (len(index), index.get("a.*"), index.match("a.b")) == (1, 2, [2])
    assert index.remove("a.*") == 2
    assert (len(index), index.get("a.*"), index.match("a.b")) == (0, None, [])


@pytest.mark.parametrize("pattern", ["a", "a.b.>", "a.b", "a.*.c", "*", ">", "b.*"])
def test_removing_what_is_not_there_raises_and_changes_nothing(pattern: str) -> None:
    index = PatternIndex[int]()
    index.insert("a.*", 1)
    index.insert("a.>", 2)
    with pytest.raises(KeyError):
        index.remove(pattern)
    assert index.get(pattern) is None
    assert (len(index), index.match("a.b")) == (2, [2, 1])


def test_none_and_false_are_values_like_others() -> None:
    index = PatternIndex[bool | None]()
    index.insert("*", None)
    index.insert(">", False)
    assert index.match("a") == [False, None]
    assert index.remove("*") is None
    assert len(index) == 1


def test_patterns_that_share_no_token_with_a_topic_cost_a_match_nothing() -> None:
    index = PatternIndex[int]()
    for number in range(1000):
        index.insert(f"other{number}.*.>", number)
        index.insert(f"news.{number}.*", number)
    index.insert("news.*", -1)
    # With all other buckets emptied, a match that looked into one would raise.
    for place, bucket in index._buckets.items():
        if place not in {(0, "news"), None}:
            del bucket.entries
    assert index.match("news.eu") == [-1]
    with pytest.raises(AttributeError):
        index.match("other7.eu.x")


def planted(number: int) -> list[str]:
    """Patterns of 32 tokens that differ from `a.a.…` in their last one or in the middle."""
    chosen = random.Random(1)
    patterns: set[str] = set()
    while len(patterns) < number:
        tokens = ["a"] * 32
        for place in chosen.sample(range(31), MAX_PATTERN_STARS):
            tokens[place] = "*"
        literal = chosen.choice([place for place in range(32) if tokens[place] == "a"])
        tokens[literal] = "z"
        patterns.add(".".join(tokens))
    return sorted(patterns)


def test_thousands_of_patterns_that_almost_match_are_ruled_out_together() -> None:
    index = PatternIndex[str]()
    patterns = planted(3000)
    for pattern in patterns:
        check_pattern(pattern, 255)
        index.insert(pattern, pattern)
    index.insert("a.*.>", "found")
    steps = 0

    class Counted(dict[Any, int]):
        def get(self, key: object, default: int = 0) -> int:  # type: ignore[override]
            nonlocal steps
            steps += 1
            return super().get(key, default)

    for bucket in index._buckets.values():
        if bucket.masks is not None:
            bucket.masks.literals = Counted(bucket.masks.literals)
            bucket.masks.stars = Counted(bucket.masks.stars)
    assert index.match(".".join("a" * 32)) == ["found"]
    # 32 tokens in at most 32 buckets, and not in 3,000 patterns.
    assert 0 < steps <= 32 * 32 * 2
    for pattern in patterns:
        index.remove(pattern)
    index.remove("a.*.>")
    assert not index._buckets


def test_a_bucket_of_any_size_matches_alike_while_patterns_come_and_go() -> None:
    index = PatternIndex[int]()
    names = [f"a.{'*.' * stars}{tail}" for stars in range(1, 9) for tail in ("b", "*", ">", "b.>")]
    names.remove("a." + "*." * 8 + "*")
    for number, name in enumerate(names):
        index.insert(name, number)
        assert sorted(index.match("a.b.b.b")) == [
            other for other in range(number + 1) if matches(names[other], "a.b.b.b")
        ]
    for number, name in enumerate(names):
        index.remove(name)
        assert sorted(index.match("a.x.b.b.b")) == [
            other for other in range(number + 1, len(names)) if matches(names[other], "a.x.b.b.b")
        ]
    assert not index._buckets


def test_a_large_bucket_that_shrinks_gives_its_rows_back() -> None:
    index = PatternIndex[str]()
    names = planted(2000)
    for name in names:
        index.insert(name, name)
    for name in names[300:]:
        index.remove(name)
    large = [bucket for bucket in index._buckets.values() if bucket.masks is not None]
    assert len(large) > 20
    for bucket in large:
        assert bucket.masks is not None
        assert len(bucket.masks.rows) <= 4 * len(bucket.entries)
    for name in names[:300]:
        assert name in index.match(name.replace("*", "x"))


def test_a_match_is_remembered_until_a_pattern_comes_changes_or_goes() -> None:
    index = PatternIndex[int]()
    index.insert("a.*", 1)
    found = index.match("a.b")
    found.append(7)  # the caller's own
    assert index.match("a.b") == [1]
    index.insert("*.b", 2)
    assert index.match("a.b") == [1, 2]
    index.insert("*.b", 3)
    assert index.match("a.b") == [1, 3]
    index.remove("a.*")
    assert index.match("a.b") == [3]


def test_remembered_matches_are_bounded() -> None:
    index = PatternIndex[int]()
    for number in range(8):
        index.insert(f"{'*.' * number}>", number)
    for number in range(20_000):
        index.match(f"topic.{number}.x.y.z")
        held = sum(TOPIC_PLACES + len(found) for found in index._memo.values())
        assert held == MEMO - index._memo_left <= MEMO


tokens = st.sampled_from(["a", "b", "c", ""])
topics = st.lists(tokens, min_size=1, max_size=5).map(".".join)
pattern_tokens = st.lists(st.one_of(tokens, st.just("*")), max_size=3)
patterns = st.one_of(
    st.builds(lambda head: ".".join([*head, ">"]), pattern_tokens),
    st.builds(
        lambda head, star, tail: ".".join([*head, star, *tail]),
        pattern_tokens,
        st.just("*"),
        pattern_tokens,
    ),
)


@given(patterns)
def test_every_pattern_of_the_model_is_well_formed(pattern: str) -> None:
    check_pattern(pattern, 255)


@given(st.text(max_size=20))
def test_any_text_is_a_topic_or_a_pattern_or_refused_but_never_both(name: str) -> None:
    accepted = []
    for check in (check_topic, check_pattern):
        try:
            check(name, 255)
        except ValueError:
            continue
        accepted.append(check)
    assert len(accepted) <= 1
    if accepted:
        assert is_pattern(name) == (accepted == [check_pattern])


def compare(one: str, other: str) -> int:
    """Which of two patterns that match one topic comes first, as `match` promises it."""
    first, second = one.split("."), other.split(".")
    is_open, other_is_open = first[-1] == ">", second[-1] == ">"
    if is_open != other_is_open:
        return -1 if is_open else 1
    if len(first) != len(second):
        return len(first) - len(second)
    for token, against in zip(first, second, strict=True):
        if token != against:
            return 1 if token == "*" else -1
    return 0


@given(st.sets(patterns, max_size=120), st.lists(topics, min_size=1, max_size=5))
@settings(deadline=None)
def test_many_patterns_at_once_match_as_one_by_one_in_the_promised_order(
    chosen: set[str], asked: list[str]
) -> None:
    index = PatternIndex[str]()
    for pattern in sorted(chosen):
        index.insert(pattern, pattern)
    for topic in asked:
        expected = [pattern for pattern in chosen if matches(pattern, topic)]
        assert index.match(topic) == sorted(expected, key=cmp_to_key(compare))


class PatternIndexModel(RuleBasedStateMachine):
    """The tree does what a dict of patterns and `matches` do, and forgets as completely."""

    @initialize()
    def start(self) -> None:
        self.index = PatternIndex[int]()
        self.model: dict[str, int] = {}

    @rule(pattern=patterns, value=st.integers())
    def insert(self, pattern: str, value: int) -> None:
        self.index.insert(pattern, value)
        self.model[pattern] = value

    @rule(data=st.data(), pattern=patterns, known=st.booleans())
    def remove(self, data: st.DataObject, pattern: str, known: bool) -> None:
        if known and self.model:
            pattern = data.draw(st.sampled_from(sorted(self.model)))
        if pattern in self.model:
            assert self.index.remove(pattern) == self.model.pop(pattern)
        else:
            with pytest.raises(KeyError):
                self.index.remove(pattern)

    @rule(pattern=patterns)
    def get(self, pattern: str) -> None:
        assert self.index.get(pattern) == self.model.get(pattern)

    @rule(topic=topics)
    def match(self, topic: str) -> None:
        expected = sorted(v for pattern, v in self.model.items() if matches(pattern, topic))
        assert sorted(self.index.match(topic)) == expected

    @invariant()
    def sizes_agree_and_what_is_empty_is_dropped(self) -> None:
        assert len(self.index) == len(self.model)
        filed: list[str] = []
        for place, bucket in self.index._buckets.items():
            assert bucket.entries
            for entry in bucket.entries:
                assert entry.bucket is bucket
                assert place in entry.literals if entry.literals else place is None
                filed += [name for name, each in self.index._entries.items() if each is entry]
            if bucket.masks is not None:
                assert bucket.masks.row_of.keys() == bucket.entries.keys()
                masks = bucket.masks
                keys = {
                    (id(mask), key) for entry in bucket.entries for mask, key in masks.places(entry)
                }
                four = (masks.literals, masks.stars, masks.closed, masks.opened)
                assert {(id(mask), key) for mask in four for key in mask} == keys
            else:
                assert len(bucket.entries) <= 2 * FEW
        assert sorted(filed) == sorted(self.model)


TestPatternIndexModel = PatternIndexModel.TestCase
TestPatternIndexModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
