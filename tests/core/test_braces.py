"""Braces in patterns: what they stand for, and that nothing in them is worth much work."""

import re
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.braces import TooMany, alternatives


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("", {""}),
        ("a", {"a"}),
        ("a,b", {"a,b"}),
        ("{a}", {"a"}),
        ("{}", {""}),
        ("{,}", {""}),
        ("{a,b}.c", {"a.c", "b.c"}),
        ("{a,{b,c}d}", {"a", "bd", "cd"}),
        ("{a,b}{c,d}", {"ac", "ad", "bc", "bd"}),
        ("a{,b}", {"a", "ab"}),
        ("{a,a}", {"a"}),
        ("{{a,b},{b,c}}", {"a", "b", "c"}),
        ("a}{b", {"a}{b"}),
        ("}a,b{", {"}a,b{"}),
        ("{a,b", {"{a,b"}),
        ("a,b}", {"a,b}"}),
        ("{x,{a,b}", {"{x,a", "{x,b"}),
        ("{a,b}},c", {"a},c", "b},c"}),
    ],
)
def test_braces_stand_for_what_is_between_them(pattern: str, found: set[str]) -> None:
    assert alternatives(pattern, 100, 1000) == found


def by_rewriting(pattern: str) -> set[str]:
    """The same, slowly: braces with none in them are replaced, until there are no more."""
    found, todo = set[str](), {pattern}
    while todo:
        text = todo.pop()
        braces = re.search(r"\{([^{}]*)\}", text)
        if braces is None:
            found.add(text)
        else:
            begin, end = braces.span()
            todo |= {text[:begin] + each + text[end:] for each in braces[1].split(",")}
    return found


@given(st.text("{},ab", max_size=14))
def test_it_is_what_comes_of_replacing_braces_one_after_the_other(pattern: str) -> None:
    assert alternatives(pattern, 10**6, 10**6) == by_rewriting(pattern)


@pytest.mark.parametrize("form", ["{%s}", "{x,{%s}}", "{%s}{,}", "{%s}{a,}", "{{{%s}}}"])
def test_so_many_are_found(form: str) -> None:
    pattern = form % ",".join(map(str, range(100)))
    count = len(by_rewriting(pattern))
    assert count >= 100
    assert len(alternatives(pattern, count, 10_000)) == count
    with pytest.raises(TooMany, match=rf"^more than {count - 1} patterns without braces$"):
        alternatives(pattern, count - 1, 10_000)


def test_they_have_so_many_characters_together() -> None:
    pattern = "{a,b}" + "x" * 99
    assert len(alternatives(pattern, 2, 200)) == 2
    with pytest.raises(TooMany, match=r"^more than 199 characters without braces$"):
        alternatives(pattern, 2, 199)


@pytest.mark.parametrize(
    "pattern",
    [
        "{a,b}" * 100_000,
        "{" * 100_000 + "}" * 100_000,
        "{a," * 100_000 + "}" * 100_000,
        "{" * 200_000,
        "," * 200_000,
        "{" + "," * 200_000 + "}",
        "{" + ",".join(map(str, range(100_000))) + "}",
        "{1,2,3,4,5,6,7,8,9}{1,2,3,4,5,6,7,8,9}" + "{xxx}" * 40_000,
    ],
    ids=lambda pattern: pattern[:12],
)
def test_a_hostile_pattern_costs_what_it_is_long(pattern: str) -> None:
    tracemalloc.start()
    try:
        found = len(alternatives(pattern, 100, 4096))
    except TooMany:
        found = 0
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert found <= 100
    assert peak < 400 * len(pattern)  # tokens, and a level for two braces
