"""The life of a session, as its table has it."""

import pytest

from broker.core.messages import ClientInfo
from broker.core.session import (
    TRANSITIONS,
    Decider,
    Grant,
    IllegalTransition,
    Phase,
    PhaseEvent,
    Session,
    Subscription,
)
from broker.core.tags import CompiledFilter, FilterNode
from tests.core.conftest import Listener

M, C, X, G = PhaseEvent

# Written out anew, so that an entry that is changed by accident has to be changed twice.
LIFE = {
    Phase.OPEN: {M: Phase.PLAIN, C: Phase.CONNECTED, X: Phase.CLOSING, G: Phase.CLOSED},
    Phase.PLAIN: {M: Phase.PLAIN, X: Phase.CLOSING, G: Phase.CLOSED},
    Phase.CONNECTED: {M: Phase.CONNECTED, X: Phase.CLOSING, G: Phase.CLOSED},
    Phase.CLOSING: {G: Phase.CLOSED},
    Phase.CLOSED: {},
}


def session(phase: Phase) -> Session:
    return Session(7, phase)


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("event", PhaseEvent)
def test_each_event_moves_a_session_as_the_table_says_or_not_at_all(
    phase: Phase, event: PhaseEvent
) -> None:
    peer = session(phase)
    after = LIFE[phase].get(event)
    if after is not None:
        peer.transition(event)
        assert peer.phase is after
        return
    with pytest.raises(IllegalTransition, match=rf"^{event} while {phase} \(fd 7\)$"):
        peer.transition(event)
    assert peer.phase is phase


def test_the_table_has_nothing_else() -> None:
    assert len(TRANSITIONS) == sum(map(len, LIFE.values()))


@pytest.mark.parametrize("phase", Phase)
def test_a_session_can_be_sent_something_until_it_is_told_to_end(phase: Phase) -> None:
    established = {Phase.OPEN, Phase.PLAIN, Phase.CONNECTED}
    assert session(phase).is_established is (phase in established)


def test_from_every_phase_there_is_a_way_to_the_end() -> None:
    for phase in set(Phase) - {Phase.CLOSED}:
        peer = session(phase)
        peer.transition(PhaseEvent.GONE)
        assert peer.phase is Phase.CLOSED


@pytest.mark.parametrize("phase", Phase)
def test_a_session_speaks_once_its_protocol_is_known(phase: Phase) -> None:
    assert session(phase).speaks is (phase in {Phase.PLAIN, Phase.CONNECTED})


def test_others_see_a_session_as_it_is_now() -> None:
    peer = session(Phase.CONNECTED)
    assert peer.info == ClientInfo("7")
    assert peer.info is peer.info  # one for all publications, until it changes
    peer.user = "ann"
    assert peer.info == ClientInfo("7", "ann")
    peer.conn_info = b'{"name":"Ann"}'
    assert peer.info == ClientInfo("7", "ann", b'{"name":"Ann"}')
    assert peer.info_on(None) is peer.info
    assert peer.info_on(b"1") == ClientInfo("7", "ann", b'{"name":"Ann"}', b"1")
    peer.user = ""
    assert peer.info_on(b"1") == ClientInfo("7", "", b'{"name":"Ann"}', b"1")


def test_a_subscription_shows_its_subscriber_as_it_is_now() -> None:
    peer = Listener(7, Phase.CONNECTED)
    grant = Grant("news", Decider.RULES, info=b"2")
    subscription = Subscription(peer, "news", grant)
    assert subscription.info == ClientInfo("7", chan_info=b"2")
    peer.user = "ann"
    assert subscription.info == ClientInfo("7", "ann", chan_info=b"2")


@pytest.mark.parametrize(
    "wanted, tags, wants",
    [
        (None, None, True),
        (None, {"a": "1"}, True),
        (CompiledFilter(FilterNode(key="a", cmp="eq", val="1")), {"a": "1"}, True),
        (CompiledFilter(FilterNode(key="a", cmp="eq", val="1")), {"a": "2"}, False),
        (CompiledFilter(FilterNode(key="a", cmp="eq", val="1")), None, False),
        (CompiledFilter(FilterNode(key="a", cmp="nex")), None, True),
    ],
)
def test_a_subscription_wants_what_its_filter_lets_through(
    wanted: CompiledFilter | None, tags: dict[str, str] | None, wants: bool
) -> None:
    grant = Grant("news", Decider.RULES)
    subscription = Subscription(Listener(7), "news", grant, wanted=wanted)
    assert subscription.wants(tags) is wants
