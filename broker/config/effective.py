"""The settings that are in force, one by one: each with its value, and where that was given.

Rule: no secret is told, only whether there is one.
"""

from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any, Final

import attrs

from broker.config.reload import NO_SOURCES
from broker.config.settings import NEEDS_RESTART, Config, TopicRules

DEFAULT: Final = "default"
PROGRAM: Final = "program"
"""The source of what the program has set by itself."""

SECRET: Final = "(secret)"


@attrs.frozen
class EffectiveSetting:
    """One setting. `name` is as in a file, with its tables: `topics.history_size`,
    `topics.namespaces.chat.retain`, `topics.patterns[0].match`.

    `value` is as in a file, too: text for a path, `inf` for no limit, None where it is unset, `SECRET`
    for what nobody may see. `source` is a file, a variable, `command line`, `program`, or `default`.
    `needs_restart` says why a reload does not change it; empty where it does.
    """

    name: str
    value: object
    source: str
    needs_restart: str = ""


def effective(config: Config, sources: Mapping[str, str] = NO_SOURCES) -> list[EffectiveSetting]:
    """All settings, in the order of `Config`. `sources` are those of `config.loading`."""
    plain = Config()
    found: list[EffectiveSetting] = []
    for field in attrs.fields(Config):
        value, usual = getattr(config, field.name), getattr(plain, field.name)
        reason = field.metadata.get(NEEDS_RESTART, "")
        if attrs.has(type(value)):
            found += _of_table(f"{field.name}.", value, usual, sources, reason)
        elif field.name == "namespaces":
            for name, rules in value.items():
                found += _of_table(f"topics.namespaces.{name}.", rules, config.topics, sources, "")
        elif field.name == "patterns":
            for number, pattern in enumerate(value):
                prefix = f"topics.patterns[{number}]."
                source = sources.get(f"{prefix}match", PROGRAM)
                found.append(EffectiveSetting(f"{prefix}match", pattern.match, source))
                found += _of_table(prefix, pattern.rules, config.topics, sources, "")
        else:
            source = _source(field.name, value, usual, sources)
            found.append(EffectiveSetting(field.name, _shown(field, value), source, reason))
    return found


def _of_table(
    prefix: str, table: attrs.AttrsInstance, usual: object, sources: Mapping[str, str], reason: str
) -> Iterator[EffectiveSetting]:
    for field in attrs.fields(type(table)):
        name, value = f"{prefix}{field.name}", getattr(table, field.name)
        source = _source(name, value, getattr(usual, field.name), sources)
        if isinstance(table, TopicRules) and source == DEFAULT:
            # A rule that a namespace or a pattern leaves out is as in [topics].
            source = sources.get(f"topics.{field.name}", DEFAULT)
        yield EffectiveSetting(name, _shown(field, value), source, reason)


def _source(name: str, value: object, usual: object, sources: Mapping[str, str]) -> str:
    return sources.get(name) or (DEFAULT if value == usual else PROGRAM)


def _shown(field: "attrs.Attribute[Any]", value: object) -> object:
    if not field.repr:
        return SECRET if value else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not isfinite(value):
        return "inf"  # which JSON has no number for
    if isinstance(value, tuple):
        return list(value)
    return value if value != "" else None
