"""The rules that each topic has: the first pattern that matches the whole name, else those of its
namespace, else the default ones."""

from collections.abc import Callable
from functools import lru_cache

from broker.config.settings import Config, TopicRules
from broker.core.names import guards_itself, namespace_of
from broker.core.topics import CACHED, PatternIndex, is_pattern
from broker.errors import ErrorCode, Refused


class RuleBook:
    """The rules of every topic of one `Config`.

    `find` has the rules of a name, or None for a topic of an unknown namespace. `is_open` tells
    whether everybody may publish to a name. Give them only names that were checked: they remember them.
    """

    def __init__(self, config: Config) -> None:
        self.only: TopicRules | None = (
            None if config.namespaces or config.patterns else config.topics
        )
        """The rules of all topics, where none has others: saves a tenth of a run's cost."""
        rules = [config.topics, *config.namespaces.values(), *(p.rules for p in config.patterns)]
        self.all_keep: bool = all(each.history_size > 0 for each in rules)
        """Whether every topic keeps a history, whatever its name."""
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
        self.is_open: Callable[[str], bool] = lru_cache(CACHED)(self._is_open)

    def of(self, name: str) -> TopicRules:
        """The rules of a name. Raises `Refused` with 102 if its namespace is not known."""
        rules = self.find(name)
        if rules is None:
            raise Refused(ErrorCode.UNKNOWN_CHANNEL)
        return rules

    def _is_open(self, name: str) -> bool:
        rules = self.find(name)
        return rules is not None and rules.may_publish == "all" and not guards_itself(name)

    def _find(self, name: str) -> TopicRules | None:
        # By their numbers, as the first in the file wins; no two have the same.
        found = self._patterns.match(name) if len(self._patterns) else []
        if name in self._topics:
            found = [*found, self._topics[name]]
        if found:
            return min(found, key=lambda numbered: numbered[0])[1]
        namespace = namespace_of(name)
        # Without any namespace a colon is a letter like others.
        if namespace is None or not self._namespaces:
            return self._default
        return self._namespaces.get(namespace)
