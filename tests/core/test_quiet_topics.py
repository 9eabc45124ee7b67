"""Topics of which nothing is left: which of them is forgotten first, and who is charged meanwhile."""

from broker.core.charges import OWNER_BYTES, Charges
from broker.core.messages import Position
from broker.core.quiet_topics import QUIET_BYTES, QuietTopics


def test_each_costs_the_same_until_it_is_forgotten() -> None:
    charges = Charges(0)
    quiet = QuietTopics(charges)
    quiet.put("a", Position(3, "e"), 1.0, None)
    quiet.put("bb", Position(4, "f"), 2.0, charges.shares.account("alice"))
    assert charges.held == 2 * QUIET_BYTES + 3 + OWNER_BYTES
    found = quiet.pop("bb")
    assert found is not None
    assert (found.position, found.asked) == (Position(4, "f"), 2.0)
    assert charges.held == QUIET_BYTES + 1
    assert quiet.pop("bb") is None
    assert [*quiet] == ["a"]


def test_that_asked_for_longest_ago_is_forgotten_first() -> None:
    quiet = QuietTopics(Charges(0))
    assert quiet.asked_longest_ago(9.0) is None
    quiet.put("a", Position(1, "e"), 1.0, None)
    quiet.put("b", Position(1, "e"), 2.0, None)
    assert quiet.asked_longest_ago(0.9) is None
    assert quiet.asked_longest_ago(1.0) == "a"


def test_topics_that_nobody_is_charged_for_go_first_only_beyond_their_bound() -> None:
    charges = Charges(0)
    quiet = QuietTopics(charges)
    alice = charges.shares.account("alice")
    quiet.put("hers", Position(1, "e"), 1.0, alice)
    alice = charges.shares.account("alice")
    quiet.put("unpaid", Position(1, "e"), 1.0, None)
    assert quiet.first_to_go(alice, QUIET_BYTES) == "hers"
    assert quiet.first_to_go(alice, QUIET_BYTES - 1) == "unpaid"
    assert quiet.first_to_go(None, QUIET_BYTES) == "unpaid"


def test_another_epoch_leaves_offsets_and_the_order_as_they_were() -> None:
    quiet = QuietTopics(Charges(0))
    for name, offset in (("a", 3), ("b", 4)):
        quiet.put(name, Position(offset, name), 1.0, None)
    quiet.renew(str.upper)
    found = [quiet.pop(name) for name in [*quiet]]
    assert [each and each.position for each in found] == [Position(3, "A"), Position(4, "B")]
