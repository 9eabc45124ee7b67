"""The ring of one topic: what goes in comes out, whoever shares what, and its bytes are given back."""

from hypothesis import given
from hypothesis import strategies as st

from broker.core.messages import ClientInfo, Publication, Series
from broker.core.ring import KEPT_BYTES, SHAPE_BYTES, Ring

INFOS = [None, ClientInfo("1"), ClientInfo("2")]
TAGS = [None, {"k": "v"}, {"k": "w"}]
ONE = st.builds(
    lambda data, info, tags, opaque, time: [Publication("t", data, info, 0, time, tags, opaque)],
    st.binary(max_size=3),
    st.sampled_from(INFOS),
    st.sampled_from(TAGS),
    st.booleans(),
    st.sampled_from([0, 7]),
)
SAID = st.builds(
    lambda contents, info, opaque: Series("t", contents, info, 0, opaque),
    st.lists(st.binary(max_size=3), min_size=1, max_size=5),
    st.sampled_from(INFOS),
    st.booleans(),
)


@given(st.lists(st.tuples(st.one_of(ONE, SAID), st.integers(0, 6)), max_size=30))
def test_what_goes_in_comes_out_with_its_bytes(steps: list[tuple[object, int]]) -> None:
    ring, kept, held = Ring(), list[tuple[float, Publication]](), 0
    for when, (more, dropped) in enumerate(steps):
        if isinstance(more, Series):
            held += ring.extend(more.contents, more.info, more.opaque, when)
        else:
            assert isinstance(more, list)
            held += ring.append(more[0], when)
        kept += [(when, each) for each in more]
        count = min(dropped, len(kept) - 1)  # a ring that is empty is closed
        if count:
            weights = sum(map(ring.weight, range(count)))
            assert ring.drop(count) == weights
            held -= weights
            del kept[:count]
        assert ring.count == len(kept)
        places = range(len(kept))
        assert [(ring.when(i), ring.publication(i, "t", 0)) for i in places] == kept
        assert [ring.info(i) for i in places] == [each.info for _, each in kept]
        assert sum(map(ring.weight, places)) == held


def test_what_is_said_in_a_row_shares_all_but_its_data() -> None:
    ring = Ring()
    assert ring.extend([b"a", b"b"], INFOS[1], False, 0.0) == 2 * (KEPT_BYTES + 1)
    assert ring.extend([b"c"], INFOS[1], False, 1.0) == KEPT_BYTES + 1
    assert ring.extend([b"d", b"e"], INFOS[2], False, 2.0) == 2 * (KEPT_BYTES + 1) + SHAPE_BYTES
    shapes = {id(shape) for shape in ring._shapes}
    assert len(shapes) == 3  # one of the first publisher, two of the second


def test_data_that_is_dropped_is_let_go_at_once() -> None:
    ring = Ring()
    ring.extend([b"gone", b"kept", b"kept", b"kept"], None, False, 0.0)
    ring.drop(1)
    assert b"gone" not in ring._contents
    ring.drop(2)
    assert ring._contents == [b"kept"]


def test_a_series_is_the_publications_that_it_stands_for() -> None:
    for first, offsets in ((0, [0, 0, 0]), (7, [7, 8, 9])):
        said = Series("t", [b"1", b"2", b"3"], INFOS[1], first, True)
        made = [
            Publication("t", data, INFOS[1], offset, 0, None, True)
            for data, offset in zip((b"1", b"2", b"3"), offsets, strict=True)
        ]
        assert len(said) == 3
        assert [said[0], said[2], said[-1], said[-3]] == [made[0], made[2], made[2], made[0]]
        assert list(said) == made
        assert list(said[1:]) == made[1:]
        assert said[1] is said[-2]  # once they are made, nobody makes them again
