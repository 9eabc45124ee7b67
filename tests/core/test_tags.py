"""Filters by tags: what each comparison means, and which filters are refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core import tags as module
from broker.core.tags import (
    CACHED_NUMBERS,
    MAX_BYTES,
    MAX_DEPTH,
    MAX_NODES,
    MAX_VALUES,
    CompiledFilter,
    FilterNode,
    check_filter,
    matches,
)

TAGS = {"ticker": "AAPL", "price": "101.50", "empty": ""}


def leaf(key: str, cmp: str, val: str = "", *vals: str) -> FilterNode:
    return FilterNode(key=key, cmp=cmp, val=val, vals=vals)


def tree(op: str, *nodes: FilterNode) -> FilterNode:
    return FilterNode(op=op, nodes=nodes)


YES = leaf("ticker", "ex")
NO = leaf("ticker", "nex")


@pytest.mark.parametrize(
    "node, wanted",
    [
        (leaf("ticker", "eq", "AAPL"), True),
        (leaf("ticker", "eq", "aapl"), False),
        (leaf("gone", "eq", ""), False),
        (leaf("ticker", "neq", "AAPL"), False),
        (leaf("gone", "neq", "AAPL"), True),
        (leaf("ticker", "in", "", "MSFT", "AAPL"), True),
        (leaf("ticker", "in", "", "MSFT"), False),
        (leaf("gone", "in", "", ""), True),
        (leaf("ticker", "nin", "", "MSFT"), True),
        (leaf("ticker", "nin", "", "AAPL"), False),
        (leaf("gone", "nin", "", "AAPL"), True),
        (leaf("empty", "ex"), True),
        (leaf("gone", "ex"), False),
        (leaf("empty", "nex"), False),
        (leaf("gone", "nex"), True),
        (leaf("ticker", "sw", "AA"), True),
        (leaf("ticker", "sw", "PL"), False),
        (leaf("gone", "sw", ""), False),
        (leaf("ticker", "ew", "PL"), True),
        (leaf("ticker", "ew", "AA"), False),
        (leaf("gone", "ew", ""), False),
        (leaf("ticker", "ct", "AP"), True),
        (leaf("ticker", "ct", "PA"), False),
        (leaf("gone", "ct", ""), False),
        (leaf("price", "gt", "101.5"), False),
        (leaf("price", "gte", "101.5"), True),
        (leaf("price", "lt", "1000"), True),  # as numbers, not as text
        (leaf("price", "lt", "101.5"), False),
        (leaf("price", "lte", "101.500"), True),
        (leaf("price", "gt", "-1"), True),
        (leaf("ticker", "gt", "1"), False),
        (leaf("gone", "lt", "1"), False),
        (leaf("empty", "lt", "1"), False),
        (tree("and", YES, YES), True),
        (tree("and", YES, NO), False),
        (tree("or", NO, YES), True),
        (tree("or", NO, NO), False),
        (tree("not", NO), True),
        (tree("not", tree("or", NO, tree("and", YES, YES))), False),
    ],
    ids=repr,
)
def test_a_filter_wants_what_it_says(node: FilterNode, wanted: bool) -> None:
    check_filter(node)
    assert matches(node, TAGS) is wanted
    assert CompiledFilter(node).matches(TAGS) is wanted


@pytest.mark.parametrize("number", ["1e9", "NaN", "Infinity", "1" * 41, "１", "", "0x1"])
def test_a_tag_that_is_no_plain_number_is_neither_less_nor_more(number: str) -> None:
    for asked in (leaf("n", "gte", "0"), leaf("n", "lt", "0")):
        assert not matches(asked, {"n": number})
        assert not CompiledFilter(asked).matches({"n": number})
    with pytest.raises(ValueError, match="needs a number"):
        check_filter(leaf("n", "gt", number))


@pytest.mark.parametrize(
    "node, why",
    [
        (FilterNode(), "without a key"),
        (leaf("a", ""), "no comparison ''"),
        (leaf("a", "like", "b"), "no comparison 'like'"),
        (FilterNode(key="a", cmp="ex", nodes=(YES,)), "nodes below"),
        (tree("xor", YES, YES), "no operation 'xor'"),
        (tree("and"), "and without nodes"),
        (tree("or"), "or without nodes"),
        (tree("not"), "exactly one"),
        (tree("not", YES, NO), "exactly one"),
        (tree("and", YES, tree("or", leaf("", "ex"))), "without a key"),
        (tree("or", *[YES] * MAX_NODES), "more than 100 nodes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_filter_that_could_never_be_meant_is_refused(node: FilterNode, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_filter(node)
    with pytest.raises(ValueError, match=why):
        CompiledFilter(node)


def test_the_size_of_a_filter_is_bounded() -> None:
    check_filter(tree("or", *[YES] * (MAX_NODES - 1)))
    node = YES
    for _ in range(MAX_DEPTH - 1):
        node = tree("not", node)
    check_filter(node)
    with pytest.raises(ValueError, match="nested more than 16 deep"):
        check_filter(tree("not", node))
    half = leaf("a", "in", "", *"b" * (MAX_VALUES // 2))
    check_filter(tree("and", half, tree("not", half)))
    for each in (
        tree("and", half, half, leaf("a", "in", "", "b")),
        leaf("a", "in", "", *"b" * 1001),
    ):
        with pytest.raises(ValueError, match="more than 1000 values"):
            check_filter(each)


def test_equal_filters_are_one() -> None:
    one, other = tree("and", leaf("a", "in", "", "b")), tree("and", leaf("a", "in", "", "b"))
    assert {one} == {other}


def test_the_texts_of_a_filter_are_bounded() -> None:
    key, half = "k", MAX_BYTES // 2 - 1
    check_filter(leaf(key, "eq", "x" * (MAX_BYTES - 1)))
    for each in (
        leaf(key, "eq", "x" * MAX_BYTES),
        leaf("k" * MAX_BYTES, "eq", "x"),
        leaf(key, "in", "", "x" * half, "y" * (half + 2)),
        leaf(key, "eq", "新" * (MAX_BYTES // 4)),
        tree("or", leaf(key, "eq", "x" * half), tree("not", leaf(key, "sw", "x" * (half + 2)))),
    ):
        with pytest.raises(ValueError, match="more than 65536 bytes"):
            check_filter(each)


# compiled


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (leaf("a", "in", "", "b", "c", "b"), leaf("a", "in", "", "c", "b")),
        (tree("and", YES, leaf("a", "ex")), tree("and", leaf("a", "ex"), YES)),
        (tree("or", YES, NO, YES), tree("or", NO, YES)),
        (tree("and", YES), YES),
        (tree("or", tree("and", YES, YES)), YES),
        (leaf("a", "gt", "1.0"), leaf("a", "gt", "1")),
        (tree("not", YES), tree("not", YES)),
    ],
)
def test_filters_that_differ_only_in_their_order_share_an_audience(
    one: FilterNode, other: FilterNode
) -> None:
    audiences = {CompiledFilter(one): "all"}
    assert audiences[CompiledFilter(other)] == "all"


def test_different_filters_are_different() -> None:
    filters = [
        *(leaf("a", cmp, "1") for cmp in ("eq", "neq", "sw", "ew", "ct", "lt", "lte", "gt", "gte")),
        *(leaf("a", cmp, "", "1") for cmp in ("in", "nin", "ex", "nex")),
        *(leaf("b", "eq", "1"), leaf("a", "eq", "2"), leaf("a", "in", "", "1", "2")),
        *(tree(op, YES, NO) for op in ("and", "or")),
        *(tree("not", YES), tree("not", tree("not", YES))),
    ]
    assert len({CompiledFilter(node) for node in filters}) == len(filters)
    assert CompiledFilter(YES) != YES


def test_comparing_equal_filters_does_not_walk_them(monkeypatch: pytest.MonkeyPatch) -> None:
    one = CompiledFilter(leaf("a", "in", "", *map(str, range(1000))))
    assert hash(one) == one._hash
    assert one == one
    other = CompiledFilter(leaf("a", "in", "", *map(str, range(1001, 2001))))
    other._key = ()
    assert one != other  # by their hashes


def test_a_filter_knows_its_size() -> None:
    small = CompiledFilter(YES)
    assert small.nodes == 1
    large = CompiledFilter(
        tree("and", leaf("p", "gt", "1"), tree("not", leaf("t", "ct", "x")), YES)
    )
    assert large.nodes == 5
    text = CompiledFilter(leaf("a", "eq", "x" * 10_000))
    assert small.bytes + 9_000 < text.bytes < small.bytes + 11_000
    values = CompiledFilter(leaf("a", "in", "", *map(str, range(1000))))
    assert 400 * 1000 < values.bytes < 500 * 1000


@pytest.mark.parametrize(
    ("node", "equalities"),
    [
        (leaf("a", "eq", "1"), ["a=1"]),
        (leaf("a", "in", "", "1", "2"), ["a=12"]),
        (leaf("a", "in"), ["a="]),  # which nothing has
        (tree("and", leaf("a", "eq", "1")), ["a=1"]),
        (tree("or", leaf("a", "eq", "1"), leaf("a", "in", "", "2", "3")), ["a=123"]),
        (tree("and", leaf("a", "in", "", "1", "2"), leaf("b", "eq", "3"), YES), ["a~12", "b~3"]),
        (tree("and", YES, tree("and", leaf("a", "eq", "1"))), ["a~1"]),
        (tree("or", leaf("a", "eq", "1"), tree("and", YES, leaf("a", "eq", "2"))), ["a~12"]),
        (
            tree(
                "or",
                tree("and", leaf("a", "eq", "1"), leaf("b", "eq", "1"), leaf("c", "eq", "1")),
                tree("and", leaf("c", "eq", "2"), leaf("a", "eq", "3")),
            ),
            ["a~13", "c~12"],
        ),
    ],
)
def test_a_filter_may_ask_for_some_values_of_a_tag(node: FilterNode, equalities: list[str]) -> None:
    """`=` where that is all it asks for."""
    found = [
        f"{each.key}{'=' if each.decides else '~'}{''.join(sorted(each.values))}"
        for each in CompiledFilter(node).equalities
    ]
    assert found == equalities


@pytest.mark.parametrize(
    "node",
    [
        leaf("a", "neq", "1"),
        leaf("a", "in", "", "1", ""),
        leaf("a", "nin", "", "1"),
        leaf("a", "sw", "1"),
        tree("not", leaf("a", "eq", "1")),
        tree("or", leaf("a", "eq", "1"), leaf("b", "eq", "1")),
        tree("or", leaf("a", "eq", "1"), YES),
        tree("or", YES, leaf("a", "eq", "1")),
        tree("and", YES, NO),
    ],
)
def test_a_filter_that_leaves_a_tag_open_asks_for_no_values(node: FilterNode) -> None:
    assert CompiledFilter(node).equalities == ()


def test_a_number_is_read_once_for_all_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    filters = [
        CompiledFilter(
            tree("or", *(leaf("price", "gt", f"{number}.{each}") for each in range(1, 90)))
        )
        for number in range(10, 30)
    ]
    module._number_of.cache_clear()
    assert not any(each.matches({"price": "9"}) for each in filters)
    assert module._number_of.cache_info().misses == 1
    # And its own numbers never again.
    monkeypatch.setattr(module, "Decimal", None)
    assert not any(each.matches({"price": "9"}) for each in filters)


def test_remembered_numbers_are_bounded() -> None:
    wanted = CompiledFilter(leaf("price", "gt", "1"))
    for number in range(3 * CACHED_NUMBERS):
        assert wanted.matches({"price": f"{number + 2}"})
    assert not wanted.matches({"price": "1" * 1_000_000})
    assert module._number_of.cache_info().currsize == CACHED_NUMBERS


def test_a_publication_without_tags_is_judged_without_a_look() -> None:
    class Untouchable(dict[str, str]):
        def get(self, key: object, default: object = None) -> str:
            raise AssertionError(key)

    for node, wanted in ((leaf("a", "eq", "1"), False), (leaf("a", "neq", "1"), True)):
        compiled = CompiledFilter(node)
        assert compiled.matches(None) is compiled.matches(Untouchable()) is wanted
        with pytest.raises(AssertionError):
            compiled.matches(Untouchable(b="1"))


texts = st.sampled_from(["", "a", "b", "ab", "1", "1.0", "2", "-1", "x1"])
numbers = st.sampled_from(["0", "1", "1.0", "2", "-1.5"])
keys = st.sampled_from(["k", "l", "m"])
leaves = st.one_of(
    st.builds(
        lambda key, cmp, val, vals: leaf(key, cmp, val, *vals),
        keys,
        st.sampled_from(["eq", "neq", "in", "nin", "ex", "nex", "sw", "ew", "ct"]),
        texts,
        st.lists(texts, max_size=3),
    ),
    st.builds(leaf, keys, st.sampled_from(["lt", "lte", "gt", "gte"]), numbers),
)
filters = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(
            lambda op, nodes: tree(op, *nodes),
            st.sampled_from(["and", "or"]),
            st.lists(inner, min_size=1, max_size=4),
        ),
        st.builds(lambda node: tree("not", node), inner),
    ),
    max_leaves=12,
)


@given(filters, filters, st.lists(st.dictionaries(keys, texts), min_size=1, max_size=8))
def test_compiled_a_filter_wants_what_it_wants_by_definition(
    node: FilterNode, other: FilterNode, publications: list[dict[str, str]]
) -> None:
    compiled, against = CompiledFilter(node), CompiledFilter(other)
    for tags in publications:
        wanted = matches(node, tags)
        assert compiled.matches(tags) is wanted
        for equality in compiled.equalities:
            found = tags.get(equality.key) in equality.values
            assert found or not wanted
            assert wanted or not (found and equality.decides)
        if compiled == against:
            assert matches(other, tags) is wanted
    assert compiled == CompiledFilter(node)
    if node == other:
        assert compiled == against
        assert hash(compiled) == hash(against)
