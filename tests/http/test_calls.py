"""One request to the HTTP API while it is carried out: its turns, and the room in its answer."""

import json

import pytest
from trio.testing import MockClock, assert_checkpoints, assert_no_checkpoints

from broker.core.work import BURST, Meter
from broker.errors import Refused
from broker.http.calls import Call, Listing, member, pieces
from broker.routing.turns import Share, Turns


def test_pieces_are_all_entries_in_their_order() -> None:
    assert list(pieces([], 3)) == []
    assert list(pieces([1, 2, 3], 3)) == [[1, 2, 3]]
    assert list(pieces([1, 2, 3, 4], 3)) == [[1, 2, 3], [4]]


async def test_what_was_done_in_a_step_is_charged_before_the_next(
    autojump_clock: MockClock,
) -> None:
    share, meter = Share(turns=Turns()), Meter()
    meter.add(10 * BURST)  # by others, before
    call = Call(share, meter, 100)
    with assert_no_checkpoints():
        await call.turn()
        meter.add(BURST / 2)
        await call.turn(BURST / 2)
        meter.add(BURST / 2)
    with assert_checkpoints():
        await call.turn()
    call.settle()
    assert share.has_room(), "nothing was done since"


async def test_what_others_do_between_two_steps_is_not_charged(autojump_clock: MockClock) -> None:
    share, meter = Share(turns=Turns()), Meter()
    call = Call(share, meter, 100)
    meter.add(BURST / 2)
    call.settle()
    meter.add(10 * BURST)
    await Call(share, meter, 100).turn()
    assert share.has_room(BURST / 2)


@pytest.mark.parametrize("names", [[], ["a"], ["a", 'quote "', "é"]])
def test_a_listing_is_json_of_the_size_that_it_says(names: list[str]) -> None:
    listed, members = Listing(None), Listing(None)
    for name in names:
        listed.add(json.dumps(name).encode())
        members.add(member(name, {"of": name}))
    assert json.loads(bytes(listed.as_list())) == names
    assert json.loads(bytes(members.as_object())) == {name: {"of": name} for name in names}
    assert len(listed) == len(names)
    assert len(bytes(listed.as_list())) <= listed.size <= len(bytes(listed.as_list())) + 1


def test_a_listing_never_takes_more_room_than_it_has() -> None:
    listed = Listing(2 + 2 * 10)
    for _ in range(2):
        assert listed.fits(b"123456789")
        listed.add(b"123456789")
    assert not listed.fits(b"")
    with pytest.raises(Refused) as caught:
        listed.add(b"1")
    assert caught.value.code == 106
    assert bytes(listed.as_list()) == b"[123456789,123456789]"
