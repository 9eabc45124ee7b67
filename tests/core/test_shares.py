"""Accounts by owner: what they hold, which is the heaviest, and that none stays behind."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from broker.core.messages import ClientInfo
from broker.core.shares import (
    NO_FD,
    TAG_BYTES,
    TAGS_BYTES,
    Account,
    Owner,
    Shares,
    owner_of,
    tags_bytes,
    text_bytes,
)


def shares_of(**held: int) -> Shares[Account]:
    """Users by name; a name such as `fd7` is a stranger."""
    shares = Shares(Account)
    for name, held_bytes in held.items():
        owner = int(name[2:]) if name.startswith("fd") else name
        shares.charge(shares.account(owner), held_bytes)
    return shares


def heaviest(shares: Shares[Account]) -> Owner:
    account = shares.heaviest()
    assert account is not None
    return account.owner


@pytest.mark.parametrize(
    ("info", "owner"),
    [
        (None, None),
        (ClientInfo("7", "alice"), "alice"),
        (ClientInfo("7", "8"), "8"),  # a user whose name is a number is no connection
        (ClientInfo("7"), 7),
        (ClientInfo("123456789012345678"), 123456789012345678),
        (ClientInfo("1234567890123456789"), NO_FD),
        (ClientInfo("9" * 5000), NO_FD),  # more digits than `int` takes
        (ClientInfo("-7"), NO_FD),
        (ClientInfo("²"), NO_FD),
        (ClientInfo(""), NO_FD),
        (ClientInfo("bot"), NO_FD),
    ],
)
def test_an_owner_is_the_user_else_the_connection_else_the_app(
    info: ClientInfo | None, owner: Owner
) -> None:
    assert owner_of(info) == owner


def test_a_text_weighs_at_most_four_bytes_a_character() -> None:
    assert [text_bytes(text) for text in ("", "abc", "新闻", "ab😀")] == [0, 3, 8, 12]


def test_tags_weigh_by_their_number_and_their_texts() -> None:
    assert tags_bytes(None) == tags_bytes({}) == 0
    assert tags_bytes({"a": "bc", "d": ""}) == TAGS_BYTES + 2 * TAG_BYTES + 4
    assert tags_bytes({"a": "x" * 14_000}) > 14_000


def test_the_heaviest_follows_every_charge() -> None:
    shares = shares_of(alice=10, bob=20)
    assert heaviest(shares) == "bob"
    alice, bob = shares.account("alice"), shares.account("bob")
    shares.charge(alice, 11)
    assert heaviest(shares) == "alice"
    shares.charge(alice, -2)
    assert heaviest(shares) == "bob"
    shares.charge(bob, -20)
    assert heaviest(shares) == "alice"
    assert (shares.bytes, len(shares), shares.get("bob")) == (19, 1, None)
    shares.charge(alice, -19)
    assert shares.heaviest() is None


def test_strangers_together_weigh_as_one_user() -> None:
    strangers = {f"fd{fd}": 2 for fd in range(1, 11)}
    shares = shares_of(alice=19, bob=5, **strangers, fd99=4)
    assert heaviest(shares) == 99
    shares.charge(shares.account(99), -4)  # 20 bytes are left, with ten of them
    assert heaviest(shares) in range(1, 11)
    shares.charge(shares.account(1), -1)
    shares.charge(shares.account("alice"), 1)
    assert heaviest(shares) == "alice"
    only = shares_of(fd1=1)
    assert heaviest(only) == 1


def test_the_app_has_a_share_like_a_user() -> None:
    shares = shares_of(alice=10)
    shares.charge(shares.account(None), 11)
    assert heaviest(shares) is None


def test_owners_that_come_and_go_leave_nothing_behind() -> None:
    shares = shares_of(alice=100)
    for fd in range(1, 10_000):
        account = shares.account(fd)
        shares.charge(account, 10)
        shares.charge(account, 10)
        shares.charge(account, -20)
    assert len(shares) == 1
    assert len(shares._strangers._heap) <= 3 + 100


def test_finding_the_heaviest_of_many_equal_ones_looks_at_few() -> None:
    shares = shares_of(**{f"user{number}": 100 for number in range(10_000)})
    heaviest(shares)
    places = 0
    for number in range(0, 10_000, 7):
        shares.charge(shares.account(f"user{number}"), 1)
        before = shares._known._pushed
        account = shares.heaviest()
        assert account is not None
        assert account.bytes == 101
        shares.charge(account, -1)
        places += abs(shares._known._pushed - before)
    assert places < 5 * 10_000  # and not 10,000 for each


OWNERS = st.sampled_from([None, "alice", "bob", "carol", 1, 2, 3])


class SharesModel(RuleBasedStateMachine):
    """The accounts are a dict of numbers, and the heaviest is what a look at all of them finds."""

    @initialize()
    def start(self) -> None:
        self.shares = Shares(Account)
        self.held: dict[Owner, int] = {}

    @rule(owner=OWNERS, more=st.integers(1, 50))
    def charge(self, owner: Owner, more: int) -> None:
        self.shares.charge(self.shares.account(owner), more)
        self.held[owner] = self.held.get(owner, 0) + more

    @rule(owner=OWNERS, data=st.data())
    def refund(self, owner: Owner, data: st.DataObject) -> None:
        if owner in self.held:
            less = data.draw(st.one_of(st.just(self.held[owner]), st.integers(1, self.held[owner])))
            self.shares.charge(self.shares.account(owner), -less)
            self.held[owner] -= less
            if not self.held[owner]:
                del self.held[owner]

    @rule()
    def ask(self) -> None:
        strangers: dict[Owner, int] = {o: n for o, n in self.held.items() if isinstance(o, int)}
        known: dict[Owner, int] = {o: n for o, n in self.held.items() if not isinstance(o, int)}
        among = strangers if sum(strangers.values()) > max(known.values(), default=0) else known
        account = self.shares.heaviest()
        assert (account is None) == (not among)
        if account is not None:
            assert account.bytes == among[account.owner] == max(among.values())

    @invariant()
    def counts_agree(self) -> None:
        assert self.shares.bytes == sum(self.held.values())
        assert len(self.shares) == len(self.held)
        for owner in (None, "alice", "bob", "carol", 1, 2, 3):
            account = self.shares.get(owner)
            assert (0 if account is None else account.bytes) == self.held.get(owner, 0)


TestSharesModel = SharesModel.TestCase
TestSharesModel.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
