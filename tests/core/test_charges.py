"""What is charged to whom: nothing while there is room, then all that was kept before, a piece at a time."""

from broker.core.charges import OWNER_BYTES, Charges
from broker.core.messages import ClientInfo, Publication
from broker.core.topic_history import History

ALICE, BOB = ClientInfo("1", "alice"), ClientInfo("2", "bob")


def kept(charges: Charges, topic: str, *publishers: ClientInfo) -> History:
    """A topic with one publication of each, none of it charged."""
    history = History(topic, "e", 0, 60.0, 0.0, bytes=1000)
    charges.add(history.bytes, None)
    for each in publishers:
        charges.add(history.ring.append(Publication(topic, b"x" * 100, each), 0.0), None)
        history.top += 1
    return history


def charged(charges: Charges, user: str) -> int:
    account = charges.shares.get(user)
    return 0 if account is None else account.bytes - OWNER_BYTES


def test_nothing_is_charged_until_it_begins_and_then_all_is() -> None:
    charges = Charges(0)
    topics = [kept(charges, "a", ALICE), kept(charges, "b", BOB)]
    assert (charges.held, charges.is_behind) == (charges.bytes, False)
    charges.begin(topics)
    assert charged(charges, "alice") == 0
    charges.catch_up(1)  # the one that was published to longest ago comes first
    assert (charged(charges, "alice") > 1000, charged(charges, "bob")) == (True, 0)
    charges.catch_up(1)
    assert not charges.is_behind
    assert charged(charges, "alice") + charged(charges, "bob") == charges.bytes
    assert charges.held == charges.bytes + 2 * OWNER_BYTES


def test_whoever_has_nothing_left_in_a_topic_hands_it_on() -> None:
    charges = Charges(0)
    history = kept(charges, "a", ALICE, BOB)
    assert charges.charge_topic(history) == charges.bytes
    assert history.payer is charges.shares.get("alice")
    charges.add(-charges.drop_oldest(history), None)
    alice = charges.shares.get("alice")
    assert alice is not None
    assert charges.topic_to_trim(alice) is None  # and so it is seen that nothing of hers is there
    assert charges.shares.get("alice") is None
    assert charged(charges, "bob") == charges.bytes


def test_a_topic_that_has_gone_since_it_was_listed_is_charged_to_nobody() -> None:
    charges = Charges(0)
    history = kept(charges, "a", ALICE)
    charges.begin([history])
    charges.add(-charges.drop_oldest(history), None)
    charges.close(history)
    charges.catch_up(1)
    assert (charges.held, len(charges.shares)) == (0, 0)
