"""Sessions that are here, by fd and by user."""

import attrs
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from broker.core.registry import Registry, RegistryStatistics


@attrs.define
class Peer:
    """Stands for a session: all that a registry keeps true of it."""

    fd: int
    user: str = ""


def crowd(size: int) -> Registry[Peer]:
    registry = Registry[Peer]()
    for _ in range(size):
        registry.attach(Peer)
    return registry


def test_fds_start_at_1_and_grow() -> None:
    registry = Registry[Peer]()
    first = registry.attach(Peer)
    assert (first.fd, registry.attach(Peer).fd) == (1, 2)
    assert registry.get(1) is first
    assert len(registry) == 2
    assert list(registry) == [Peer(1), Peer(2)]


def test_an_fd_is_never_used_again() -> None:
    registry = crowd(3)
    assert registry.detach(3) == Peer(3)
    assert registry.get(3) is None
    assert registry.attach(Peer).fd == 4


def test_a_session_that_could_not_be_made_leaves_nothing_but_a_spent_number() -> None:
    registry = Registry[Peer]()

    def refuse(fd: int) -> Peer:
        raise OSError(fd)

    with pytest.raises(OSError, match="1"):
        registry.attach(refuse)
    assert len(registry) == 0
    assert registry.attach(Peer).fd == 2


def test_an_fd_that_is_not_here_cannot_be_detached() -> None:
    registry = crowd(1)
    registry.detach(1)
    for fd in (-1, 0, 1, 2, 2**64):
        assert registry.get(fd) is None
        with pytest.raises(KeyError):
            registry.detach(fd)
    assert registry.fds_of("alice") == ()


@pytest.mark.parametrize(
    ("after", "limit", "expected"),
    [
        (0, 2, [2, 3]),
        (3, 2, [5, 6]),
        (4, 2, [5, 6]),  # 4 has gone; the page after it is the same as after 3
        (6, 2, []),
        (2**64, 2, []),
        (0, 0, []),
        (-1, 100, [2, 3, 5, 6]),
    ],
)
def test_pages_come_in_fd_order(after: int, limit: int, expected: list[int]) -> None:
    registry = crowd(6)
    registry.detach(1)
    registry.detach(4)
    assert [peer.fd for peer in registry.page(after, limit)] == expected


def test_a_user_has_many_fds_and_an_fd_one_user() -> None:
    registry = crowd(3)
    one, two, three = registry
    registry.bind(three, "alice")
    registry.bind(one, "alice")
    registry.bind(two, "bob")
    assert registry.fds_of("alice") == (1, 3)
    assert three.user == "alice"

    registry.bind(three, "bob")
    assert registry.fds_of("alice") == (1,)
    assert registry.fds_of("bob") == (2, 3)

    registry.bind(one, "")
    assert registry.fds_of("alice") == ()
    assert registry.fds_of("") == ()
    assert one.user == ""
    assert registry.statistics() == RegistryStatistics(sessions=3, users=1, last_fd=3)


def test_detaching_drops_the_user_too() -> None:
    registry = crowd(1)
    (peer,) = registry
    registry.bind(peer, "alice")
    registry.detach(1)
    assert registry.fds_of("alice") == ()
    assert registry.get(1) is None
    assert registry.statistics() == RegistryStatistics(sessions=0, users=0, last_fd=1)


def test_a_session_on_its_way_out_is_no_longer_its_users() -> None:
    registry = crowd(2)
    one, two = registry
    for peer in (one, two):
        registry.bind(peer, "alice")
    for _ in range(2):  # once more changes nothing
        registry.retire(one)
        assert registry.fds_of("alice") == (2,)
    assert one.user == "alice"  # which close hooks show
    assert registry.get(1) is one
    registry.retire(two)
    assert registry.statistics() == RegistryStatistics(sessions=2, users=0, last_fd=2)
    registry.detach(1)
    assert len(registry) == 1


def test_the_first_fd_is_given_from_outside() -> None:
    registry = Registry[Peer](7)
    assert registry.next_fd == 7
    assert registry.statistics().last_fd == 6
    assert registry.attach(Peer).fd == 7
    assert registry.next_fd == 8


class RegistryModel(RuleBasedStateMachine):
    """The registry does what one plain map from fd to user does."""

    @initialize()
    def start(self) -> None:
        self.registry = Registry[Peer]()
        self.user_of: dict[int, str] = {}
        self.last_fd = 0

    @rule()
    def attach(self) -> None:
        peer = self.registry.attach(Peer)
        assert peer.fd == self.last_fd + 1
        self.last_fd = peer.fd
        self.user_of[peer.fd] = ""

    @precondition(lambda self: self.user_of)
    @rule(data=st.data())
    def detach(self, data: st.DataObject) -> None:
        fd = data.draw(st.sampled_from(sorted(self.user_of)))
        assert self.registry.detach(fd) == Peer(fd, self.user_of.pop(fd))

    @precondition(lambda self: self.user_of)
    @rule(data=st.data(), user=st.sampled_from(["", "alice", "bob"]))
    def bind(self, data: st.DataObject, user: str) -> None:
        fd = data.draw(st.sampled_from(sorted(self.user_of)))
        peer = self.registry.get(fd)
        assert peer is not None
        self.registry.bind(peer, user)
        self.user_of[fd] = user

    @rule(after=st.integers(-1, 30), limit=st.integers(0, 5))
    def page(self, after: int, limit: int) -> None:
        expected = [Peer(fd, self.user_of[fd]) for fd in sorted(self.user_of) if fd > after]
        assert self.registry.page(after, limit) == expected[:limit]

    @invariant()
    def agrees(self) -> None:
        fds = sorted(self.user_of)
        assert list(self.registry) == [Peer(fd, self.user_of[fd]) for fd in fds]
        for fd in range(self.last_fd + 2):
            assert (self.registry.get(fd) is not None) == (fd in self.user_of)
        for user in ("alice", "bob"):
            mine = tuple(fd for fd in fds if self.user_of[fd] == user)
            assert self.registry.fds_of(user) == mine
        users = set(self.user_of.values()) - {""}
        assert self.registry.statistics() == RegistryStatistics(len(fds), len(users), self.last_fd)


TestRegistryModel = RegistryModel.TestCase
TestRegistryModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
