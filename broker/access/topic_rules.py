"""Which rules a topic has, and what they let a client do.

The kinds of names, by how they begin and end::

    news.eu        a topic: rules by pattern, else the default ones
    chat:room      a topic of the namespace `chat`: rules by pattern, else those of `chat`
    $plans         a private topic: a subscription token or a hook lets one in, no rule does;
    $chat:plans    also a private one, of the namespace `chat`
    room#1,42      a topic for the users 1 and 42 alone
    #42            the personal topic of user 42
    fd:7  user:42  no topics: one connection, and all connections of one user

Rules:

1. The first pattern that matches the whole name, else the namespace, else the default.
2. What a name says about itself (private, these users only) holds whatever the rules say.
3. Nobody gets through a pattern what he may not subscribe to by name; `reaches` is asked for it.
4. Whoever may not subscribe to a topic that guards itself may not publish to it or read it either.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Final

from broker.config.settings import Askers, Config, TopicRules
from broker.core.topics import PatternIndex, check_topic, is_pattern
from broker.errors import ErrorCode, Refused

CACHED: Final = 4096
"""Names whose rules are remembered, 255 bytes each: 1 MiB. Only busy ones matter."""

PRIVATE: Final = "$"
LIMITED: Final = "#"


class RuleBook:
    """The rules of every topic of one `Config`.

    `find` has the rules of a name, or None for a topic of an unknown namespace. Give it only names
    whose length was checked: it remembers them.
    """

    def __init__(self, config: Config) -> None:
        self.only = None if config.namespaces or config.patterns else config.topics
        """The rules of all topics, where none has others: saves a tenth of a run's cost."""
        self._default = config.topics
        self._namespaces = config.namespaces
        self._topics: dict[str, tuple[int, TopicRules]] = {}
        self._patterns: PatternIndex[tuple[int, TopicRules]] = PatternIndex()
        for number, pattern in enumerate(config.patterns):
            if is_pattern(pattern.match):
                self._patterns.insert(pattern.match, (number, pattern.rules))
            else:
                self._topics[pattern.match] = (number, pattern.rules)
        self.find: Callable[[str], TopicRules | None] = lru_cache(CACHED)(self._find)

    def of(self, name: str) -> TopicRules:
        """The rules of a name. Raises `Refused` with 102 if its namespace is not known."""
        rules = self.find(name)
        if rules is None:
            raise Refused(ErrorCode.UNKNOWN_CHANNEL)
        return rules

    def _find(self, name: str) -> TopicRules | None:
        # By their numbers, as the first in the file wins; no two have the same.
        found = self._patterns.match(name) if len(self._patterns) else []
        if name in self._topics:
            found.append(self._topics[name])
        if found:
            return min(found, key=lambda numbered: numbered[0])[1]
        # A user's name may have a colon of its own.
        own, _, _ = name.removeprefix(PRIVATE).partition(LIMITED)
        namespace, colon, _ = own.partition(":")
        # Without any namespace a colon is a letter like others.
        if not colon or not self._namespaces:
            return self._default
        return self._namespaces.get(namespace)


def users_of(name: str) -> list[str] | None:
    """The users that a name limits itself to; None where it does not."""
    _, sign, users = name.rpartition(LIMITED)
    return users.split(",") if sign else None


def personal_topic(user: str, max_bytes: int) -> str | None:
    """The topic of one user alone; None for nobody, and for a name that no topic can hold."""
    name = f"{LIMITED}{user}"
    try:
        check_topic(name, max_bytes)
    except ValueError:
        return None
    return name if users_of(name) == [user] and user else None


def guards_itself(name: str) -> bool:
    """Whether a name says who may in: private, or for some users alone."""
    return LIMITED in name or name.startswith(PRIVATE)


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


def check_subscribe(rules: TopicRules, name: str, user: str, *, asked: bool) -> None:
    """Raise `Refused` with 103 unless this user may subscribe to `name`.

    `asked`: a hook will decide, or has decided, which a private topic needs. Who shows a
    subscription token for the name has no need of this check.
    """
    if name.startswith(PRIVATE) and not asked:
        raise Refused(ErrorCode.PERMISSION_DENIED)
    if not (allows(rules.may_subscribe, user) and _is_among(name, user)):
        raise Refused(ErrorCode.PERMISSION_DENIED)


def check_access(who: Askers, name: str, user: str, *, subscribed: bool) -> None:
    """Raise `Refused` with 103 unless this user may publish to `name` or read it, as `who` says."""
    if name.startswith(PRIVATE) and not subscribed:
        raise Refused(ErrorCode.PERMISSION_DENIED)
    # Whoever is subscribed was let in, perhaps by a token that knows better than the name.
    if not (allows(who, user, subscribed=subscribed) and (subscribed or _is_among(name, user))):
        raise Refused(ErrorCode.PERMISSION_DENIED)


def reaches(rules: TopicRules, topic: str, user: str) -> bool:
    """Whether a publication on `topic` reaches this user through a pattern."""
    return (
        not topic.startswith(PRIVATE)
        and allows(rules.may_subscribe, user)
        and _is_among(topic, user)
    )


def _is_among(name: str, user: str) -> bool:
    users = users_of(name)
    return users is None or (bool(user) and user in users)
