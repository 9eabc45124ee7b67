"""May this session do this with this name now? One answer, for every door.

Rules:

1. Asked in the same atomic step as the act: an answer that is older than an await is none.
2. A name that says something of itself (private, these users only) is held to it whatever the rules
   say. A private topic is for those alone whom a token or a hook let subscribe.
3. Nobody gets through a pattern, a history, a presence, a recovery or a retained value what he may
   not subscribe to by name.
4. Where a hook or a backend decides about subscriptions, a topic that it was not asked about is
   closed: reading needs a subscription to that very topic, and patterns need
   `hook_decides_patterns`.
"""

from collections.abc import Callable
from typing import Final, Literal, TypeAlias

import attrs

from broker.access.tokens import SubscriptionToken
from broker.access.topic_rules import RuleBook
from broker.config.reload import Settings
from broker.config.settings import Askers, TopicRules
from broker.core.names import (
    DIRECT,
    PERSONAL,
    admits_user,
    check_name,
    check_publishable,
    direct_fd,
    guards_itself,
    is_connection_name,
    is_private,
    may_cover_private,
    users_of,
)
from broker.core.session import Decider, Grant, Session, Subscription
from broker.core.topics import is_pattern, mistaken_for_pattern
from broker.errors import ErrorCode, Refused
from broker.hooks import Hooks

Reading: TypeAlias = Literal["history", "presence"]

DENIED: Final = ErrorCode.PERMISSION_DENIED

NOT_AMONG: Final = "behind '#' this name lists users, and this one is not among them"


def allows(who: Askers, user: str, *, subscribed: bool = False) -> bool:
    """Whether `who` includes this user; "" is nobody in particular."""
    match who:
        case "all":
            return True
        case "subscribers":
            return subscribed
        case "users":
            return bool(user)
        case "none":
            return False


@attrs.define(eq=False)
class Rights:
    """Decides by the settings of the moment. `tokens_count`: there are keys to verify tokens with."""

    settings: Settings
    hooks: Hooks
    tokens_count: bool = False
    _book: RuleBook = attrs.field(init=False)
    _book_version: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._book = RuleBook(self.settings.config)
        self._book_version = self.settings.version

    # rules

    @property
    def book(self) -> RuleBook:
        """The rules of all topics, by the settings of now."""
        if self._book_version != self.settings.version:
            self._book = RuleBook(self.settings.config)
            self._book_version = self.settings.version
        return self._book

    def rules_of(self, name: str) -> TopicRules:
        """The rules of a checked name. Raises `Refused` (102) where its namespace is not known."""
        return self.book.of(name)

    # names

    def check_topic(self, topic: str) -> None:
        """Raise `Refused` (107) for what cannot be published to."""
        check_publishable(topic, self.settings.config.max_topic_bytes)

    def check_direct(self) -> None:
        """Raise `Refused` (108) where connections have no topics of their own."""
        if not self.settings.config.direct_topics:
            text = "direct_topics is off: connections have no topics of their own"
            raise Refused(ErrorCode.NOT_AVAILABLE, text)

    def check_listenable(self, name: str) -> None:
        """Raise `Refused` for a name that nobody may subscribe to: 107 for what is neither topic nor
        pattern, 103 for fds and users, 102 for an unknown namespace."""
        if name.startswith(DIRECT):
            raise Refused(DENIED, "only an fd itself gets what is sent to it")
        if name.startswith(PERSONAL):
            raise Refused(DENIED, "only a user gets what is sent to it")
        check_name(name, self.settings.config.max_topic_bytes)
        self.rules_of(name)

    # subscribing

    @property
    def hook_decides(self) -> bool:
        """Whether the app, or its backend, is asked about each subscription."""
        return self.hooks.subscribe is not None

    @property
    def hook_decides_patterns(self) -> bool:
        """Whether its yes to a pattern is a yes to every topic that the pattern covers."""
        return self.settings.config.hook_decides_patterns

    def grant(self, session: Session, name: str, token: SubscriptionToken | None = None) -> Grant:
        """The right of a client to subscribe to a listenable name, as far as no hook has to say.

        A verified `token` is above the rules. Ask once more after every await. Raises `Refused`.
        """
        user = session.user
        if token is not None:
            if token.topic != name or token.user != user:
                raise Refused(DENIED)
            return Grant(name, Decider.TOKEN, user, token.info, token.data, token.expires_at)
        if self.tokens_count and may_cover_private(name):
            raise Refused(DENIED)
        if is_private(name) and not self.hook_decides:
            raise Refused(DENIED)
        if not allows(self.rules_of(name).may_subscribe, user):
            raise Refused(DENIED)
        if not admits_user(name, user):
            raise Refused(DENIED, mistaken_for_pattern(name) or NOT_AMONG)
        if not self.hook_decides:
            return Grant(name, Decider.RULES, user)
        if is_pattern(name) and not self.hook_decides_patterns:
            text = "a hook decides about each topic, and a pattern covers others"
            raise Refused(DENIED, f"{text}: see hook_decides_patterns")
        return Grant(name, Decider.HOOK, user)

    def keeps(self, session: Session, subscription: Subscription) -> bool:
        """Whether a subscription of this session outlives a change of its user."""
        name, grant = subscription.name, subscription.grant
        if not admits_user(name, session.user):
            return False
        if grant.by is Decider.TOKEN:
            return grant.user == session.user
        if grant.by is Decider.RULES:
            rules = self.book.find(name)
            return rules is not None and allows(rules.may_subscribe, session.user)
        return True

    def receiver(self, rules: TopicRules, topic: str) -> Callable[[Subscription], bool] | None:
        """The test of who gets a publication on `topic` through a pattern; None if all do."""
        if self.hook_decides or rules.may_subscribe != "all" or guards_itself(topic):
            return self._receiver(rules, topic)
        return None

    def receives(self, rules: TopicRules, topic: str, subscription: Subscription) -> bool:
        """Whether a subscriber to a pattern gets what is published to `topic`."""
        return self._receiver(rules, topic)(subscription)

    def _receiver(self, rules: TopicRules, topic: str) -> Callable[[Subscription], bool]:
        # It may be asked of ten thousand subscribers, and a name may list a hundred users.
        private, users = is_private(topic), users_of(topic)
        few = None if users is None else frozenset(users)
        hook_decides = self.hook_decides and not self.hook_decides_patterns

        def receives(subscription: Subscription) -> bool:
            by = subscription.grant.by
            if by is Decider.PROGRAM:
                return True
            if private or (hook_decides and by in (Decider.RULES, Decider.HOOK)):
                return False
            user = subscription.subscriber.user
            among = few is None or (bool(user) and user in few)
            return among and allows(rules.may_subscribe, user)

        return receives

    # publishing

    def check_publish(self, session: Session, topic: str) -> bool:
        """Raise `Refused` unless this session may publish to a topic, or send to a connection.

        Returns whether everybody may, so that it need not be asked again under these settings.
        """
        config = self.settings.config
        if is_connection_name(topic):
            if direct_fd(topic) == session.fd:
                raise Refused(ErrorCode.BAD_REQUEST, f"{topic} is this connection itself")
            if not allows(config.may_send, session.user):
                raise Refused(DENIED)
            return config.may_send == "all"
        check_name(topic, config.max_topic_bytes)
        if self.book.is_open(topic):
            return True
        rules = self.rules_of(topic)
        self._check_access(session.user, topic in session.subscriptions, rules.may_publish, topic)
        return False

    def check_will(self, user: str, topic: str) -> None:
        """Raise `Refused` unless a client of this user, that has died with its node, may still have a will
        published. Its subscriptions died with it: they count as they did when the will was put."""
        config = self.settings.config
        if is_connection_name(topic):
            if not allows(config.may_send, user):
                raise Refused(DENIED)
            return
        check_name(topic, config.max_topic_bytes)
        self._check_access(user, True, self.rules_of(topic).may_publish, topic)

    # reading

    def check_read(self, session: Session, topic: str, what: Reading) -> TopicRules:
        """Raise `Refused` unless this session may read a topic's history or presence; return its
        rules. 108 where there is none: no topic, or rules that keep it off."""
        check_name(topic, self.settings.config.max_topic_bytes)
        if is_pattern(topic) or is_connection_name(topic):
            kind = "a pattern" if is_pattern(topic) else "an fd or a user"
            raise Refused(ErrorCode.NOT_AVAILABLE, f"{kind} has no {what}: ask for one topic")
        rules = self.rules_of(topic)
        if what == "history":
            there, who, hook = rules.history_size > 0, rules.may_read_history, self.hooks.history
        else:
            there, who, hook = rules.presence, rules.may_read_presence, self.hooks.presence
        if not there:
            raise Refused(ErrorCode.NOT_AVAILABLE, f"the rules of this topic keep no {what}")
        subscribed = topic in session.subscriptions
        self._check_access(session.user, subscribed, who, topic)
        if not subscribed:
            if not allows(rules.may_subscribe, session.user):
                raise Refused(DENIED)
            # A hook for just this is asked next; else the one for subscriptions has not been.
            if self.hook_decides and hook is None:
                raise Refused(DENIED, "only subscribers may read this topic")
        return rules

    def _check_access(self, user: str, subscribed: bool, who: Askers, topic: str) -> None:
        """Raise `Refused` unless `who` includes this user, of a topic that guards itself too."""
        if is_private(topic) and not subscribed:
            raise Refused(DENIED)
        # A subscriber was let in, perhaps by a token that knows better than the name.
        among = subscribed or admits_user(topic, user)
        if not (allows(who, user, subscribed=subscribed) and among):
            raise Refused(DENIED)
