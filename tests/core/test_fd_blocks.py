"""`broker.core.fd_blocks`: which node a number is of, against a list that is searched in full."""

from hypothesis import given
from hypothesis import strategies as st

from broker.core.fd_blocks import FdBlocks

WIDTH = 10
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "remove", "forget"]), st.sampled_from("abc"), st.integers(0, 8)
    )
)


@given(STEPS)
def test_a_number_is_of_the_node_whose_block_it_is_in(steps: list[tuple[str, str, int]]) -> None:
    blocks, model, top = FdBlocks(), dict[int, str](), 0
    for step, node, number in steps:
        first = number * WIDTH
        if step == "add" and model.get(first, node) == node:  # no two nodes lease one block
            blocks.add(node, range(first, first + WIDTH))
            model[first] = node
            top = max(top, first + WIDTH - 1)
        elif step == "remove":
            blocks.remove(node, first)
            if model.get(first) == node:
                del model[first]
        elif step == "forget":
            blocks.forget(node)
            model = {each: owner for each, owner in model.items() if owner != node}
    for fd in range(-1, 10 * WIDTH):
        assert blocks.node_of(fd) == model.get(fd // WIDTH * WIDTH)
    assert (len(blocks), blocks.top) == (len(model), top)


def test_a_number_behind_the_end_of_a_block_is_of_nobody() -> None:
    blocks = FdBlocks()
    blocks.add("a", range(1, 5))
    blocks.add("b", range(7, 9))
    assert [blocks.node_of(fd) for fd in range(10)] == [
        None, "a", "a", "a", "a", None, None, "b", "b", None,
    ]  # fmt: skip
