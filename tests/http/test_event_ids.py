"""`broker.http.event_ids`: where a reader is, in an id that it sends back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.messages import Position
from broker.http.event_ids import MAX_ID, UNKNOWN, Positions

TOPICS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
PLACES = st.dictionaries(
    TOPICS, st.tuples(st.integers(0, 10**15 - 1), st.text("abcz09", min_size=1, max_size=12))
)


@given(PLACES)
def test_an_id_says_where_its_reader_is_and_is_never_longer_than_it_may_be(
    places: dict[str, tuple[int, str]],
) -> None:
    positions = Positions()
    for topic, place in places.items():
        positions.set(topic, Position(*place))
    written = positions.written()
    assert len(written) <= positions.size <= MAX_ID
    read = Positions.read(written.decode()).of(places)
    for topic, place in places.items():
        assert read[topic] in (Position(*place), UNKNOWN)
        assert (read[topic] == UNKNOWN) == (topic not in positions)
    assert positions.has_others == (UNKNOWN in read.values())


def test_a_place_is_free_again_when_its_topic_is_forgotten() -> None:
    positions = Positions()
    empty = positions.size
    for number in range(500):
        positions.set(f"topic-{number}", Position(number, "e"))
    assert positions.has_others
    full = positions.size
    positions.keep({"topic-3"})
    assert "topic-3" in positions
    assert "topic-4" not in positions
    assert empty < positions.size < full
    assert positions.move("topic-3", 9)
    assert not positions.move("topic-4", 9)
    positions.forget("topic-3")
    assert (positions.size, positions.written()) == (empty, b"*")


@pytest.mark.parametrize(
    "text",
    ["", "7", "news:e", "news:e:", "news:e:-1", "news:e:1234567890123456", "news:e:1,", "a b:e:1",
     "news:e:1\n", "x" * (MAX_ID + 1), ",*", "*,news:e:1"],
)  # fmt: skip
def test_an_id_that_is_none_of_ours_says_nothing(text: str) -> None:
    assert not Positions.read(text)
    assert Positions.read(text).of({"news": None}) == {}
