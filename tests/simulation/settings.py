"""The settings of the brokers in a simulation: small bounds, so that they are met, and topics of every kind."""

from typing import Final

import attrs

from broker import Config, TopicPattern, TopicRules

RULES: Final = {
    "news": TopicRules(history_size=10, history_ttl=30.0, retain=True),
    "chat": TopicRules(history_size=8, history_ttl=30.0, slow_consumer="drop_oldest"),
    "tick": TopicRules(history_size=20, history_ttl=30.0, slow_consumer="latest"),
    "live": TopicRules(history_size=0, slow_consumer="drop_oldest"),
    "vip": TopicRules(history_size=6, history_ttl=30.0, may_subscribe="users", may_publish="users"),
    "work": TopicRules(history_size=5, history_ttl=30.0),
}
TOPICS: Final = tuple(RULES)

CLOSED: Final = attrs.evolve(RULES["vip"], may_subscribe="none", may_publish="none")
"""The rules of `vip` while it is closed to everybody."""

API_KEY: Final = "the key of this simulation"

CONFIG: Final = Config(
    hook_decides_patterns=True,
    patterns=tuple(TopicPattern(name, rules) for name, rules in RULES.items()),
    outbox_messages=40,
    outbox_bytes=16 * 2**10,
    history_reply_bytes=6 * 2**10,
    history_max_limit=12,
    api_key=API_KEY,
    log_level="error",
)


def config_of(is_open: bool, outbox_messages: int) -> Config:
    """The settings of now: `vip` is open to users or to nobody."""
    rules = RULES if is_open else {**RULES, "vip": CLOSED}
    patterns = tuple(TopicPattern(name, each) for name, each in rules.items())
    return attrs.evolve(CONFIG, patterns=patterns, outbox_messages=outbox_messages)
