"""Names: which are topics, which are patterns; and the tree against the plain definition."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from broker.core.topics import (
    MAX_PATTERN_STARS,
    MAX_PATTERN_TOKENS,
    PatternTree,
    check_pattern,
    check_topic,
    is_pattern,
    matches,
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
def test_what_a_pattern_matches(pattern: str, topic: str, expected: bool) -> None:
    assert matches(pattern, topic) is expected
    tree = PatternTree[str]()
    tree.insert(pattern, "here")
    assert tree.match(topic) == (["here"] if expected else [])


def test_the_order_of_matches_does_not_depend_on_the_order_of_insertion() -> None:
    # `>` by depth, then the others, literal before `*`.
    patterns = [">", "a.>", "*.>", "a.*", "*.b", "*.*"]
    for turned in (patterns, patterns[::-1], patterns[3:] + patterns[:3]):
        tree = PatternTree[str]()
        for pattern in turned:
            tree.insert(pattern, pattern)
        assert tree.match("a.b") == patterns


def test_a_pattern_has_one_value() -> None:
    tree = PatternTree[int]()
    tree.insert("a.*", 1)
    tree.insert("a.*", 2)
    assert (len(tree), tree.get("a.*"), tree.match("a.b")) == (1, 2, [2])
    assert tree.remove("a.*") == 2
    assert (len(tree), tree.get("a.*"), tree.match("a.b")) == (0, None, [])


@pytest.mark.parametrize("pattern", ["a", "a.b.>", "a.b", "a.*.c", "*", ">", "b.*"])
def test_removing_what_is_not_there_raises_and_changes_nothing(pattern: str) -> None:
    tree = PatternTree[int]()
    tree.insert("a.*", 1)
    tree.insert("a.>", 2)
    with pytest.raises(KeyError):
        tree.remove(pattern)
    assert tree.get(pattern) is None
    assert (len(tree), tree.match("a.b")) == (2, [2, 1])


def test_none_and_false_are_values_like_others() -> None:
    tree = PatternTree[bool | None]()
    tree.insert("*", None)
    tree.insert(">", False)
    assert tree.match("a") == [False, None]
    assert tree.remove("*") is None
    assert len(tree) == 1


def test_patterns_that_differ_early_cost_a_match_nothing() -> None:
    tree = PatternTree[int]()
    for number in range(1000):
        tree.insert(f"other{number}.*.>", number)
    tree.insert("news.*", -1)
    # With everything below the other first tokens gone, a match that went there would raise.
    for token, node in tree._root.literal.items():
        if token != "news":
            del node.literal, node.star, node.rest, node.here
    assert tree.match("news.eu") == [-1]
    with pytest.raises(AttributeError):
        tree.match("other7.eu")


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


class PatternTreeModel(RuleBasedStateMachine):
    """The tree does what a dict of patterns and `matches` do, and forgets as completely."""

    @initialize()
    def start(self) -> None:
        self.tree = PatternTree[int]()
        self.model: dict[str, int] = {}

    @rule(pattern=patterns, value=st.integers())
    def insert(self, pattern: str, value: int) -> None:
        self.tree.insert(pattern, value)
        self.model[pattern] = value

    @rule(data=st.data(), pattern=patterns, known=st.booleans())
    def remove(self, data: st.DataObject, pattern: str, known: bool) -> None:
        if known and self.model:
            pattern = data.draw(st.sampled_from(sorted(self.model)))
        if pattern in self.model:
            assert self.tree.remove(pattern) == self.model.pop(pattern)
        else:
            with pytest.raises(KeyError):
                self.tree.remove(pattern)

    @rule(pattern=patterns)
    def get(self, pattern: str) -> None:
        assert self.tree.get(pattern) == self.model.get(pattern)

    @rule(topic=topics)
    def match(self, topic: str) -> None:
        expected = sorted(v for pattern, v in self.model.items() if matches(pattern, topic))
        assert sorted(self.tree.match(topic)) == expected

    @invariant()
    def sizes_agree_and_what_is_empty_is_dropped(self) -> None:
        assert len(self.tree) == len(self.model)
        # One node per different prefix of the patterns that are in, and no other.
        prefixes: set[tuple[str, ...]] = set()
        for pattern in self.model:
            split = pattern.split(".")
            if split[-1] == ">":
                split.pop()
            prefixes |= {tuple(split[: depth + 1]) for depth in range(len(split))}
        nodes = 0
        waiting = [self.tree._root]
        while waiting:
            node = waiting.pop()
            below = [*node.literal.values(), *([node.star] if node.star else [])]
            nodes += len(below)
            waiting += below
        assert nodes == len(prefixes)


TestPatternTreeModel = PatternTreeModel.TestCase
TestPatternTreeModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
