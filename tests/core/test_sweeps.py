"""Each topic is asked about once, whenever that is."""

from broker.core.sweeps import Sweeps


def rest_of(sweeps: Sweeps) -> list[str]:
    """The topics that are found over by their turn."""
    found = []
    while (topic := sweeps.take()) is not None:
        if sweeps.touch(topic):
            found.append(topic)
    return found


def test_a_topic_is_asked_about_when_it_is_touched_or_when_its_turn_comes() -> None:
    sweeps, asked = Sweeps(), list[str]()

    def is_over(topic: str) -> bool:
        asked.append(topic)
        return topic in "bd"

    sweeps.begin(is_over, "abcd")
    assert asked == []
    assert [sweeps.touch(topic) for topic in ("a", "b", "b")] == [False, True, False]
    assert asked == ["a", "b"]
    assert rest_of(sweeps) == ["d"]
    assert sorted(asked) == ["a", "b", "c", "d"]
    assert not sweeps.begun


def test_a_later_question_takes_the_place_of_none() -> None:
    sweeps = Sweeps()
    sweeps.begin("ab".__contains__, "abcd")
    assert sweeps.touch("a")
    sweeps.begin("ac".__contains__, "abcd")
    assert sweeps.touch("a")  # it had begun anew by the second
    assert not sweeps.touch("a")
    assert sorted(rest_of(sweeps)) == ["b", "c"]


def test_one_that_began_anew_is_over_by_none_of_those_that_were_under_way() -> None:
    sweeps = Sweeps()
    sweeps.begin("a".__contains__, "a")
    sweeps.begin("a".__contains__, "a")
    assert sweeps.touch("a")
    assert rest_of(sweeps) == []


def test_nothing_is_over_where_nothing_was_asked() -> None:
    sweeps = Sweeps()
    assert sweeps.take() is None
    assert not sweeps.touch("a")
