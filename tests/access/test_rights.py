"""Rights, as tables of who may do what with which name, then as a broker in memory grants them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import pytest
from trio.testing import MockClock

from broker import (
    Broker,
    Config,
    PublishEvent,
    ReadEvent,
    Refused,
    SubscribeEvent,
    TopicRules,
)
from broker.access.rights import Reading, Rights, allows
from broker.access.tokens import SubscriptionToken
from broker.config.reload import Settings
from broker.config.settings import Askers, Joiners, TopicPattern
from broker.core.session import Decider, Grant, Phase, Subscription
from broker.hooks import Hooks
from broker.testing import name_users_by_token, open_test_broker
from tests.access.conftest import COMMANDS, codes
from tests.conftest import code_of, data_of, received, served, subscribe
from tests.core.conftest import Listener, join

# the tables: each letter is one user, of nobody, ann and bob


USERS = ("", "ann", "bob")


async def nothing(event: Any) -> None:
    """A hook that lets everybody do everything."""


def make_rights(*hooks: str, tokens_count: bool = False, **settings: Any) -> Rights:
    """Rights in an app that has set these hooks."""
    held = Hooks()
    for kind in hooks:
        held.set(kind, nothing)
    return Rights(Settings(Config(**settings)), held, tokens_count)


def session(user: str, subscribed: str = "") -> Listener:
    """A client, which is subscribed to one name if that is given."""
    peer = Listener(7, Phase.CONNECTED, user)
    if subscribed:
        peer.subscriptions[subscribed] = join(peer, subscribed)
    return peer


def letters(ask: Callable[[str], object]) -> str:
    """A `y` for each user who may, an `n` for each who is refused with 103."""
    said = ""
    for user in USERS:
        try:
            ask(user)
        except Refused as refusal:
            assert refusal.code == 103
            said += "n"
        else:
            said += "y"
    return said


@pytest.mark.parametrize(
    "who, nobody, alice, subscribed",
    [
        ("all", True, True, True),
        ("users", False, True, False),
        ("subscribers", False, False, True),
        ("none", False, False, False),
    ],
)
def test_each_word_of_the_rules_means_some(
    who: Askers, nobody: bool, alice: bool, subscribed: bool
) -> None:
    assert allows(who, "") is nobody
    assert allows(who, "alice") is alice
    assert allows(who, "", subscribed=True) is subscribed


BY_RULES = [
    # name, may_subscribe: all, users, none
    ("a", "yyy", "nyy", "nnn"),
    ("a$", "yyy", "nyy", "nnn"),
    ("$a", "nnn", "nnn", "nnn"),
    ("a#ann", "nyn", "nyn", "nnn"),
    ("a#ann,bob", "nyy", "nyy", "nnn"),
    ("#ann", "nyn", "nyn", "nnn"),
    ("a#", "nnn", "nnn", "nnn"),  # nobody in particular is not a user called ""
    ("a#,ann", "nyn", "nyn", "nnn"),
    ("a#anna", "nnn", "nnn", "nnn"),
    ("a#ann#bob", "nny", "nny", "nnn"),  # the last sign counts
    ("$a#ann", "nnn", "nnn", "nnn"),
    ("a.*", "yyy", "nyy", "nnn"),
    (">", "yyy", "nyy", "nnn"),
    ("$a.*", "nnn", "nnn", "nnn"),
]
BY_HOOK = [
    # A hook decides after the rules, not instead; about topics, and not about patterns.
    ("a", "yyy", "nyy", "nnn"),
    ("$a", "yyy", "nyy", "nnn"),
    ("a#ann", "nyn", "nyn", "nnn"),
    ("a#,ann", "nyn", "nyn", "nnn"),
    ("$a#ann", "nyn", "nyn", "nnn"),
    ("a.*", "nnn", "nnn", "nnn"),
    (">", "nnn", "nnn", "nnn"),
    ("$a.*", "nnn", "nnn", "nnn"),
]
BY_HOOK_OF_PATTERNS = [
    ("a", "yyy", "nyy", "nnn"),
    ("a.*", "yyy", "nyy", "nnn"),
    (">", "yyy", "nyy", "nnn"),
    ("$a.*", "yyy", "nyy", "nnn"),
    ("$a#ann", "nyn", "nyn", "nnn"),
]
WITH_KEYS = [
    # A name that is private, or may cover that, is for the bearer of a token.
    ("a", "yyy", "nyy", "nnn"),
    ("a.*", "yyy", "nyy", "nnn"),
    ("a#ann", "nyn", "nyn", "nnn"),
    ("$a", "nnn", "nnn", "nnn"),
    ("*", "nnn", "nnn", "nnn"),
    (">", "nnn", "nnn", "nnn"),
    ("*.a", "nnn", "nnn", "nnn"),
    ("$a.>", "nnn", "nnn", "nnn"),
]
DECISIONS: dict[str, tuple[Decider, Callable[..., Rights], list[tuple[str, str, str, str]]]] = {
    "rules": (Decider.RULES, make_rights, BY_RULES),
    "hook": (Decider.HOOK, partial(make_rights, "subscribe"), BY_HOOK),
    "hook, patterns too": (
        Decider.HOOK,
        partial(make_rights, "subscribe", hook_decides_patterns=True),
        BY_HOOK_OF_PATTERNS,
    ),
    "keys": (Decider.RULES, partial(make_rights, tokens_count=True), WITH_KEYS),
    "keys and hook": (
        Decider.HOOK,
        partial(make_rights, "subscribe", tokens_count=True, hook_decides_patterns=True),
        WITH_KEYS,
    ),
}


@pytest.mark.parametrize(
    "decision, name, expected",
    [(key, name, row) for key, (_, _, rows) in DECISIONS.items() for name, *row in rows],
)
def test_a_subscription_without_a_token_is_for_those_the_table_says(
    decision: str, name: str, expected: list[str]
) -> None:
    by, make, _ = DECISIONS[decision]
    words: tuple[Joiners, ...] = ("all", "users", "none")
    for word, row in zip(words, expected, strict=True):
        rights = make(topics=TopicRules(may_subscribe=word))

        def ask(user: str, rights: Rights = rights) -> None:
            grant = rights.grant(session(user), name)
            assert grant == Grant(name, by, user)

        assert letters(ask) == row, word


@pytest.mark.parametrize("name", ["a", "$a", "a#bob", "$a#bob", "a.*", ">", "$a.*"])
@pytest.mark.parametrize("word", ["all", "users", "none"])
@pytest.mark.parametrize("hooks", [(), ("subscribe",)])
def test_a_token_is_above_rules_names_and_hooks_for_its_bearer_and_its_topic_alone(
    name: str, word: Joiners, hooks: tuple[str, ...]
) -> None:
    rights = make_rights(*hooks, tokens_count=True, topics=TopicRules(may_subscribe=word))

    def token(topic: str, user: str) -> SubscriptionToken:
        return SubscriptionToken({}, user, topic, "", b"1", b"2", 3.0)

    def ask(user: str) -> None:
        grant = rights.grant(session(user), name, token(name, "ann"))
        assert grant == Grant(name, Decider.TOKEN, user, b"1", b"2", 3.0)

    assert letters(ask) == "nyn"
    assert letters(lambda user: rights.grant(session(user), name, token("other", user))) == "nnn"


PUBLISHING = [
    # name, subscribed, and who may: all, users, subscribers, none
    ("a", False, "yyy", "nyy", "nnn", "nnn"),
    ("a", True, "yyy", "nyy", "yyy", "nnn"),
    ("$a", False, "nnn", "nnn", "nnn", "nnn"),
    ("$a", True, "yyy", "nyy", "yyy", "nnn"),
    ("a#ann", False, "nyn", "nyn", "nnn", "nnn"),
    ("a#ann", True, "yyy", "nyy", "yyy", "nnn"),  # let in by a token, which knows better
    ("$a#ann", False, "nnn", "nnn", "nnn", "nnn"),
    ("$a#ann", True, "yyy", "nyy", "yyy", "nnn"),
    ("a#", False, "nnn", "nnn", "nnn", "nnn"),
]
WORDS: tuple[Askers, ...] = ("all", "users", "subscribers", "none")


@pytest.mark.parametrize("name, subscribed, expected", [(n, s, r) for n, s, *r in PUBLISHING])
@pytest.mark.parametrize("act", ["publish", "history", "presence"])
def test_to_publish_and_to_read_is_for_those_the_table_says(
    act: str, name: str, subscribed: bool, expected: list[str]
) -> None:
    for word, row in zip(WORDS, expected, strict=True):
        rules = TopicRules(may_publish=word, may_read_history=word, may_read_presence=word)
        rights = make_rights(topics=rules)

        def ask(user: str, rights: Rights = rights) -> None:
            peer = session(user, name if subscribed else "")
            if act == "publish":
                rights.check_publish(peer, name)
            else:
                rights.check_read(peer, name, "history" if act == "history" else "presence")

        assert letters(ask) == row, word


READING = [
    # hooks, subscribed, and may_subscribe: all, users, none
    ((), False, "yyy", "nyy", "nnn"),
    ((), True, "yyy", "yyy", "yyy"),
    # A hook that decides about subscriptions was not asked about who has none.
    (("subscribe",), False, "nnn", "nnn", "nnn"),
    (("subscribe",), True, "yyy", "yyy", "yyy"),
    # One for just this is asked next.
    (("subscribe", "read"), False, "yyy", "nyy", "nnn"),
    (("subscribe", "other"), False, "nnn", "nnn", "nnn"),
    (("read",), False, "yyy", "nyy", "nnn"),
]


@pytest.mark.parametrize("hooks, subscribed, expected", [(h, s, r) for h, s, *r in READING])
@pytest.mark.parametrize("what, other", [("history", "presence"), ("presence", "history")])
def test_nobody_reads_a_topic_that_he_may_not_subscribe_to(
    what: Reading,
    other: str,
    hooks: tuple[str, ...],
    subscribed: bool,
    expected: list[str],
) -> None:
    kinds = [{"read": what, "other": other}.get(hook, hook) for hook in hooks]
    words: tuple[Joiners, ...] = ("all", "users", "none")
    for word, row in zip(words, expected, strict=True):
        rights = make_rights(*kinds, topics=TopicRules(may_subscribe=word))

        def ask(user: str, rights: Rights = rights) -> None:
            rights.check_read(session(user, "a" if subscribed else ""), "a", what)

        assert letters(ask) == row, word


@pytest.mark.parametrize(
    "name, rules, code",
    [
        ("a.*", TopicRules(), 108),
        ("fd:1", TopicRules(), 108),
        ("user:ann", TopicRules(), 108),
        ("", TopicRules(), 107),
        ("a\n", TopicRules(), 107),
        ("a", TopicRules(history_size=0, presence=False), 108),
        ("a", TopicRules(history_size=0, presence=False, may_subscribe="none"), 108),
    ],
)
@pytest.mark.parametrize("what", ["history", "presence"])
def test_there_is_nothing_to_read_where_there_is_no_topic_or_the_rules_keep_none(
    name: str, rules: TopicRules, code: int, what: Reading
) -> None:
    with pytest.raises(Refused, match=str(code)):
        make_rights(topics=rules).check_read(session("ann"), name, what)


RECEIVING = [
    # topic, and may_subscribe: all, users, none
    ("a", "yyy", "nyy", "nnn"),
    ("$a", "nnn", "nnn", "nnn"),
    ("a#ann", "nyn", "nyn", "nnn"),
    ("$a#ann", "nnn", "nnn", "nnn"),
]
NOBODY, EVERYBODY = "nnn", "yyy"


@pytest.mark.parametrize("topic, expected", [(topic, row) for topic, *row in RECEIVING])
@pytest.mark.parametrize("by", Decider)
@pytest.mark.parametrize("hook", ["none", "topics", "patterns"])
def test_through_a_pattern_nobody_gets_more_than_by_name(
    hook: str, by: Decider, topic: str, expected: list[str]
) -> None:
    words: tuple[Joiners, ...] = ("all", "users", "none")
    for word, row in zip(words, expected, strict=True):
        rules = TopicRules(may_subscribe=word)
        hooks = () if hook == "none" else ("subscribe",)
        rights = make_rights(*hooks, topics=rules, hook_decides_patterns=hook == "patterns")
        if by is Decider.PROGRAM:
            row = EVERYBODY
        elif hook == "topics" and by in (Decider.RULES, Decider.HOOK):
            row = NOBODY
        got = ""
        for user in USERS:
            peer = session(user)
            subscription = Subscription(peer, ">", Grant(">", by, user))
            receives = rights.receives(rules, topic, subscription)
            got += "y" if receives else "n"
            admits = rights.receiver(rules, topic)
            # Where all get it nobody is asked.
            assert receives if admits is None else admits(subscription) is receives
        assert got == row, word


def test_on_an_open_topic_nobody_is_looked_at_one_by_one() -> None:
    assert make_rights().receiver(TopicRules(), "a") is None
    assert make_rights("subscribe").receiver(TopicRules(), "a") is not None
    assert make_rights().receiver(TopicRules(may_subscribe="users"), "a") is not None
    assert make_rights().receiver(TopicRules(), "$a") is not None
    assert make_rights().receiver(TopicRules(), "a#ann") is not None


@pytest.mark.parametrize(
    "by, name, word, kept",
    [
        # Kept when ann's connection becomes nobody's, ann's own once more, or bob's.
        (Decider.RULES, "a", "all", "yyy"),
        (Decider.RULES, "a", "users", "nyy"),
        (Decider.RULES, "a", "none", "nnn"),
        (Decider.RULES, "a#ann", "all", "nyn"),
        (Decider.TOKEN, "a", "none", "nyn"),
        (Decider.TOKEN, "$a", "all", "nyn"),
        (Decider.TOKEN, "a#bob", "all", "nnn"),
        (Decider.HOOK, "a", "none", "yyy"),
        (Decider.HOOK, "$a", "all", "yyy"),
        (Decider.HOOK, "a#ann", "all", "nyn"),
        (Decider.SERVER, "a", "none", "yyy"),
        (Decider.SERVER, "$a", "none", "yyy"),
        (Decider.SERVER, "#ann", "all", "nyn"),
        (Decider.SERVER, "a#ann,bob", "all", "nyy"),
    ],
)
def test_a_subscription_outlives_a_change_of_its_user_where_he_may_have_it(
    by: Decider, name: str, word: Joiners, kept: str
) -> None:
    rights = make_rights(topics=TopicRules(may_subscribe=word))
    got = ""
    for user in USERS:
        peer = session(user)
        got += "y" if rights.keeps(peer, Subscription(peer, name, Grant(name, by, "ann"))) else "n"
    assert got == kept


def test_a_subscription_whose_namespace_is_gone_outlives_no_change_of_user() -> None:
    rights = make_rights(namespaces={"chat": TopicRules()})
    peer = session("ann")
    assert rights.keeps(peer, Subscription(peer, "chat:a", Grant("chat:a", Decider.RULES, "ann")))
    assert not rights.keeps(peer, Subscription(peer, "olds:a", Grant("olds:a", Decider.RULES)))


@pytest.mark.parametrize(
    "name, code",
    [
        ("fd:1", 103),
        ("fd:x", 103),
        ("user:ann", 103),
        ("", 107),
        ("a\x00", 107),
        ("a.>.b", 107),
        ("x" * 256, 107),
        ("olds:a", 102),
        ("olds:*", 102),
        ("chat:a", 0),
        ("chat:a.*", 0),
        ("$chat:a", 0),
        (">", 0),
    ],
)
def test_some_names_nobody_can_listen_to(name: str, code: int) -> None:
    rights = make_rights(namespaces={"chat": TopicRules()})
    if code:
        with pytest.raises(Refused, match=str(code)):
            rights.check_listenable(name)
    else:
        rights.check_listenable(name)


@pytest.mark.parametrize("may_send, said", [("all", "yyy"), ("users", "nyy"), ("none", "nnn")])
@pytest.mark.parametrize("name", ["fd:1", "user:ann"])
def test_a_direct_message_is_for_those_who_may_send(
    may_send: Joiners, said: str, name: str
) -> None:
    rights = make_rights(may_send=may_send)
    assert letters(lambda user: rights.check_publish(session(user), name)) == said


def test_a_connection_sends_nothing_to_itself() -> None:
    with pytest.raises(Refused, match="107: fd:7 is this connection itself"):
        make_rights().check_publish(session("ann"), "fd:7")


@pytest.mark.parametrize(
    "settings, name, is_open",
    [
        ({}, "a", True),
        ({}, "$a", False),
        ({}, "a#ann", False),
        ({"topics": TopicRules(may_publish="users")}, "a", False),
        ({"topics": TopicRules(may_publish="subscribers")}, "a", False),
        ({}, "fd:1", True),
        ({}, "user:ann", True),
        ({"may_send": "users"}, "fd:1", False),
    ],
)
def test_only_of_a_topic_that_is_open_to_all_it_need_not_be_asked_again(
    settings: dict[str, Any], name: str, is_open: bool
) -> None:
    rights = make_rights(**settings)
    assert rights.check_publish(session("ann", name), name) is is_open


def test_rules_of_new_settings_count_at_once() -> None:
    rights = make_rights()
    book = rights.book
    assert rights.book is book
    rights.settings.replace(Config(topics=TopicRules(may_publish="none")))
    assert rights.book is not book
    with pytest.raises(Refused, match="103"):
        rights.check_publish(session("ann"), "a")


# asked of a broker


LOCKED = TopicRules(
    may_publish="none", may_subscribe="none", may_read_presence="none", may_read_history="none"
)


@pytest.mark.parametrize(
    "rules, answers",
    [
        (TopicRules(), [0, 0, 0, 0, 0]),
        (LOCKED, [103, 103, 103, 103, 103]),
        (TopicRules(may_publish="users"), [103, 0, 0, 0, 0]),
        (TopicRules(may_publish="subscribers"), [103, 0, 0, 0, 0]),
        (TopicRules(may_subscribe="users"), [0, 103, 103, 103, 103]),  # no way around it
        (TopicRules(may_read_presence="users"), [0, 0, 103, 103, 0]),
        (TopicRules(may_read_presence="subscribers"), [0, 0, 0, 0, 0]),  # it is one by then
        (TopicRules(may_read_history="users"), [0, 0, 0, 0, 103]),
        (TopicRules(presence=False), [0, 0, 108, 108, 0]),
        (TopicRules(history_size=0), [0, 0, 0, 0, 108]),
        (TopicRules(history_size=0, may_read_history="none"), [0, 0, 0, 0, 108]),
    ],
)
@pytest.mark.parametrize("place", ["default", "namespace", "pattern"])
async def test_each_rule_holds_wherever_it_stands(
    autojump_clock: MockClock, rules: TopicRules, answers: list[int], place: str
) -> None:
    config = {
        "default": Config(topics=rules),
        "namespace": Config(topics=LOCKED, namespaces={"chat": rules}),
        "pattern": Config(namespaces={"chat": LOCKED}, patterns=(TopicPattern("chat:r", rules),)),
    }[place]
    async with open_test_broker(name_users_by_token(Broker(config))) as net:
        peer = await net.open_client()
        assert list((await codes(peer, "chat:r")).values()) == answers


async def test_a_user_may_what_nobody_in_particular_may_not(autojump_clock: MockClock) -> None:
    rules = TopicRules(
        may_publish="users",
        may_subscribe="users",
        may_read_presence="users",
        may_read_history="users",
    )
    async with open_test_broker(name_users_by_token(Broker(Config(topics=rules)))) as net:
        nobody, alice = await net.open_client(), await net.open_client(token="alice")
        assert set((await codes(nobody, "a")).values()) == {103}
        assert set((await codes(alice, "a")).values()) == {0}
        # Joiners it is may change under way.
        net.broker.bind(alice.fd, "")
        net.broker.bind(nobody.fd, "bob")
        assert set((await codes(nobody, "a")).values()) == {0}
        assert set((await codes(alice, "a")).values()) == {103}


async def test_the_right_to_publish_is_decided_for_each_topic_and_each_time(
    autojump_clock: MockClock,
) -> None:
    config = Config(
        namespaces={"open": TopicRules(), "subs": TopicRules(may_publish="subscribers")}
    )
    async with open_test_broker(Broker(config)) as net:
        peer = await net.open_client()

        async def publish(topic: str) -> int:
            return await code_of(peer, publish={"channel": topic, "data": 1})

        assert [await publish(t) for t in ("open:a", "subs:a", "open:a", "open:b")] == [
            0,
            103,
            0,
            0,
        ]
        await peer.request(subscribe={"channel": "subs:a"})
        assert [await publish(t) for t in ("subs:a", "subs:b", "subs:a")] == [0, 103, 0]
        await peer.request(unsubscribe={"channel": "subs:a"})
        assert await publish("subs:a") == 103


async def test_hooks_are_asked_only_for_what_the_rules_allow(autojump_clock: MockClock) -> None:
    broker, asked = Broker(Config(namespaces={"no": LOCKED, "yes": TopicRules()})), []

    @broker.on_publish
    async def publish(event: PublishEvent) -> None:
        asked.append(("publish", event.topic))

    @broker.on_subscribe
    async def subscribe(event: SubscribeEvent) -> None:
        asked.append(("subscribe", event.topic))

    @broker.on_presence
    async def presence(event: ReadEvent) -> None:
        asked.append(("presence", event.topic))

    @broker.on_history
    async def history(event: ReadEvent) -> None:
        asked.append(("history", event.topic))

    async with open_test_broker(broker) as net:
        peer = await net.open_client()
        assert set((await codes(peer, "no:a")).values()) == {103}
        assert not asked
        assert set((await codes(peer, "yes:a")).values()) == {0}
        assert {method for method, _ in asked} == {"publish", "subscribe", "presence", "history"}


async def test_a_hook_lets_into_a_private_topic_and_only_members_use_it(
    autojump_clock: MockClock,
) -> None:
    broker = name_users_by_token(Broker(Config()))
    async with open_test_broker(broker) as net:
        ann, bob = await net.open_client(token="ann"), await net.open_client(token="bob")
        assert set((await codes(ann, "$plans")).values()) == {103}

        @broker.on_subscribe
        async def only_ann(event: SubscribeEvent) -> None:
            if event.connection.user != "ann":
                raise Refused(103)

        assert await code_of(ann, subscribe={"channel": "$plans"}) == 0
        assert await code_of(bob, subscribe={"channel": "$plans"}) == 103
        for method, rest in COMMANDS.items():
            if method != "subscribe":
                command = {method: {"channel": "$plans", **rest}}
                assert (await code_of(ann, **command), await code_of(bob, **command)) == (0, 103)


async def test_a_topic_for_some_users_is_for_no_others(autojump_clock: MockClock) -> None:
    async with open_test_broker(name_users_by_token(Broker(Config()))) as net:
        for token, expected in (("ann", 0), ("bob", 0), ("eve", 103), ("", 103)):
            peer = await net.open_client(token=token)
            assert set((await codes(peer, "room#ann,bob")).values()) == {expected}, token


async def test_a_session_that_loses_its_user_loses_the_rights_of_users(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(name_users_by_token(Broker(Config(may_send="users")))) as net:
        ann, other = await net.open_client(token="ann"), await net.open_client()
        for topic in ("room#ann", f"fd:{other.fd}"):
            net.broker.bind(ann.fd, "ann")
            command = {"publish": {"channel": topic, "data": 1}}
            assert await code_of(ann, **command) == 0
            net.broker.bind(ann.fd, "")
            assert await code_of(ann, **command) == 103


async def test_a_pattern_shows_nobody_what_he_may_not_subscribe_to(
    autojump_clock: MockClock,
) -> None:
    config = Config(
        namespaces={
            "all": TopicRules(),
            "users": TopicRules(may_subscribe="users"),
            "none": TopicRules(may_subscribe="none"),
        }
    )
    async with open_test_broker(name_users_by_token(Broker(config))) as net:
        nobody, ann = await net.open_client(), await net.open_client(token="ann")
        for peer in (nobody, ann):
            assert await code_of(peer, subscribe={"channel": "*"}) == 0
        async with net.broker.subscribe("*") as inside:
            topics = ["all:a", "users:a", "none:a", "$a", "room#ann", "room#bob", "#ann", "a"]
            for topic in topics:
                net.broker.publish_nowait(topic, topic)
            assert data_of(await nobody.receive_all()) == ["all:a", "a"]
            assert data_of(await ann.receive_all()) == ["all:a", "users:a", "room#ann", "#ann", "a"]
            # The program itself is behind no rule.
            assert [(await inside.receive()).value for _ in topics] == topics


async def test_a_pattern_itself_goes_by_the_rules_of_its_own_name(
    autojump_clock: MockClock,
) -> None:
    config = Config(topics=LOCKED, namespaces={"chat": TopicRules()})
    async with open_test_broker(Broker(config)) as net:
        peer = await net.open_client()
        assert await code_of(peer, subscribe={"channel": ">"}) == 103
        assert await code_of(peer, subscribe={"channel": "chat:room.*"}) == 0
        assert await code_of(peer, subscribe={"channel": "chta:room.*"}) == 102


@pytest.mark.parametrize(
    "may_send, nobody, user", [("all", 0, 0), ("users", 103, 0), ("none", 103, 103)]
)
async def test_direct_messages_need_the_right_of_may_send(
    autojump_clock: MockClock, may_send: Any, nobody: int, user: int
) -> None:
    config = attrs.evolve(Config(topics=LOCKED), may_send=may_send)
    async with open_test_broker(name_users_by_token(Broker(config))) as net:
        receiver = await net.open_client()
        message = {"publish": {"channel": f"fd:{receiver.fd}", "data": 1}}
        assert await code_of(await net.open_client(), **message) == nobody
        assert await code_of(await net.open_client(token="ann"), **message) == user
        assert data_of(await receiver.receive_all()) == [1] * (nobody, user).count(0)


async def test_nobody_gets_through_a_group_or_a_retained_value_what_it_may_not_subscribe_to(
    autojump_clock: MockClock,
) -> None:
    async with served() as net:
        eve = await net.open_client(token="eve")
        net.broker.publish_nowait("$secret", 1, retain=True)
        net.broker.publish_nowait("room#ann", 1, retain=True)
        net.broker.publish_nowait("open", 1, retain=True)
        await subscribe(eve, ">")
        assert await received(net, eve) == [1]
        spy = await net.open_client(token="eve")
        await subscribe(spy, "*", "spies")
        for topic, queued in (("$secret", 0), ("room#ann", 0), ("open", 2)):
            assert (await net.broker.publish(topic, topic)).queued == queued
        assert await received(net, spy) == ["open"]
        with pytest.raises(Refused, match="503"):
            await net.broker.request("$secret", 1)
