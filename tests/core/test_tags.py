"""Filters by tags: what each comparison means, and which filters are refused."""

import pytest

from broker.core.tags import MAX_DEPTH, MAX_NODES, MAX_VALUES, FilterNode, check_filter, matches

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


@pytest.mark.parametrize("number", ["1e9", "NaN", "Infinity", "1" * 41, "１", "", "0x1"])
def test_what_is_no_plain_number_is_neither_less_nor_more(number: str) -> None:
    assert not matches(leaf("n", "gte", "0"), {"n": number})
    assert not matches(leaf("n", "lt", "0"), {"n": number})
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
def test_what_could_never_be_meant_is_refused(node: FilterNode, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_filter(node)


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
