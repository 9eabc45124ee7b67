"""The life of a session, as its table has it."""

import pytest

from broker.core.messages import ClientInfo
from broker.core.session import TRANSITIONS, Happening, IllegalTransition, Phase, Session

M, C, X, G = Happening

# Written out anew, so that an entry that is changed by accident has to be changed twice.
LIFE = {
    Phase.OPEN: {M: Phase.PLAIN, C: Phase.CONNECTED, X: Phase.CLOSING, G: Phase.CLOSED},
    Phase.PLAIN: {M: Phase.PLAIN, X: Phase.CLOSING, G: Phase.CLOSED},
    Phase.CONNECTED: {M: Phase.CONNECTED, X: Phase.CLOSING, G: Phase.CLOSED},
    Phase.CLOSING: {G: Phase.CLOSED},
    Phase.CLOSED: {},
}


def session(phase: Phase) -> Session:
    return Session(7, None, None, ClientInfo("7"), phase)


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("happening", Happening)
def test_each_happening_moves_a_session_as_the_table_says_or_not_at_all(
    phase: Phase, happening: Happening
) -> None:
    peer = session(phase)
    after = LIFE[phase].get(happening)
    if after is not None:
        peer.note(happening)
        assert peer.phase is after
        return
    with pytest.raises(IllegalTransition, match=rf"^{happening} while {phase} \(fd 7\)$"):
        peer.note(happening)
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
        peer.note(Happening.GONE)
        assert peer.phase is Phase.CLOSED
