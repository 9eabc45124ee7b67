"""Publications by namespace."""

import pytest

from broker.routing.tallies import Tallies


@pytest.mark.parametrize(
    "topic, namespace",
    [
        ("news", ""),
        ("chat", ""),  # the name of a namespace is a topic of none
        ("chat:room", "chat"),
        ("chat:", "chat"),
        ("$chat:room", "chat"),
        ("$plans", ""),
        ("other:room", ""),
        (":room", ""),
        ("room#chat:1", ""),  # a user's name may have a colon of its own
        ("fd:7", "fd"),
        ("user:ann", "user"),
    ],
)
def test_a_topic_counts_for_its_namespace(topic: str, namespace: str) -> None:
    tallies = Tallies()
    tallies.count_by(["chat"])
    tallies.note(topic, 3)
    counted = {name: count for name, count in tallies.by_namespace(3).items() if count}
    assert counted == {namespace: 3}


def test_a_namespace_that_is_named_again_goes_on_counting() -> None:
    tallies = Tallies()
    tallies.count_by(["chat"])
    tallies.note("chat:room", 1)
    tallies.count_by([])
    tallies.count_by(["chat", "game"])
    tallies.note("chat:room", 1)
    assert tallies.by_namespace(5) == {"": 3, "fd": 0, "user": 0, "chat": 2, "game": 0}
