"""Where settings are read from: defaults, a TOML file, the environment, the command line.

`load` lays these four layers over each other; the later wins. The lowest is the defaults, or an
embedded broker's own `Config`; a variable is named like `BROKER_PORT` or
`BROKER_TOPICS_HISTORY_SIZE`.

Rule: a wrong value raises where it was given, in one line that names the source, the field, the
value and what would be right.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, get_args, get_origin, get_type_hints

import attrs

from broker.config.doubts import doubts_about
from broker.config.settings import (
    Config,
    TokenRules,
    TopicPattern,
    TopicRules,
    WebhookRules,
)
from broker.config.types import typed
from broker.config.validators import namespace_names, topic_match
from broker.config.variables import ENV_PREFIX, UnknownVariable, is_injected, unknown_variables
from broker.errors import ConfigError

COMMAND_LINE: Final = "command line"
"""The source of settings that were given as options."""


@attrs.frozen
class Loaded:
    """A config, and where its values were given, by the dotted name of the setting: the path of a file, a
    variable, `COMMAND_LINE`. A setting that is not in it has the program's own value or the default; see
    `config.effective`."""

    config: Config
    sources: Mapping[str, str]
    unknown: tuple[UnknownVariable, ...]
    """Variables that begin as ours do and name no setting."""
    doubts: tuple[str, ...] = ()
    """Lines about settings that are right and may not do what was meant."""


def load(
    path: Path | None,
    overrides: Mapping[str, object],
    *,
    base: Config | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """The config of `load_with_sources`."""
    return load_with_sources(path, overrides, base=base, environ=environ).config


def load_with_sources(
    path: Path | None,
    overrides: Mapping[str, object],
    *,
    base: Config | None = None,
    environ: Mapping[str, str] | None = None,
) -> Loaded:
    """Read a TOML file, then `BROKER_*` variables, then `overrides`; the later wins.

    All three are laid over `base` (the defaults if None). `overrides` is nested as the file is:
    `{"port": 9000, "topics": {"history_size": 10}}`. A variable that is empty counts as unset;
    one that names no field is left alone, but for one that looks like a secret.

    Raises `ConfigError`, whose one line names the source, the key and what is expected there.
    """
    values: dict[tuple[str, ...], Any] = {}
    sources: dict[str, str] = {}

    def lay(layer: Mapping[tuple[str, ...], Any], source: Callable[[tuple[str, ...]], str]) -> None:
        # A Unix socket is instead of a port: the one that is said later counts.
        if ("unix",) not in layer and not layer.keys().isdisjoint({("host",), ("port",)}):
            values[("unix",)] = None
            sources.pop("unix", None)
        for key, value in layer.items():
            place = source(key)
            prefix = "" if place == COMMAND_LINE else f"{place}: "
            values[key] = _structure(prefix, key, value)
            sources.update(dict.fromkeys(_names_in(key, values[key]), place))

    if path is not None:
        lay(dict(_flat(_read(path))), lambda _: str(path))
    environ = os.environ if environ is None else environ
    lay(dict(_from_environ(environ)), _variable)
    lay(dict(_flat(overrides)), lambda _: COMMAND_LINE)
    secrets = [_variable(key) for key, field in _KEYS.items() if not field.repr]
    unknown = unknown_variables(environ, [*map(_variable, _KEYS)], secrets)

    base = base or Config()
    fields = {key[0]: value for key, value in values.items() if len(key) == 1}
    for table in _TABLES:
        inner = {key[1]: value for key, value in values.items() if key[0] == table}
        with _named(table, sources):
            if table == "topics":
                fields |= _all_rules(base, inner)
            else:
                fields[table] = attrs.evolve(getattr(base, table), **inner)
    with _named("", sources):
        config = attrs.evolve(base, **fields)
        return Loaded(config, sources, unknown, doubts_about(config, sources))


@contextmanager
def _named(table: str, sources: Mapping[str, str]) -> Iterator[None]:
    """Values that do not go together raise `ConfigError`, which names the table and all places where one
    of them was given."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        if table:
            text = f"{table}.{text}"
        elif text.startswith(_NESTED):
            text = f"topics.{text}"
        words = {*re.findall(r"\w+", text)}
        given = [
            source
            for name, source in sources.items()
            if words & {name.rpartition(".")[2], name.split("[")[0].rpartition(".")[2]}
            and source != COMMAND_LINE
            and (not table or name.startswith(f"{table}."))
        ]
        places = " and ".join(dict.fromkeys(given))
        raise ConfigError(f"{places}: {text}" if places else text) from error


# `Any`: its type is that of the setting, which only the key tells.
def _names_in(key: tuple[str, ...], value: Any) -> list[str]:
    """The dotted names of all settings that were given under a key."""
    if key == ("topics", "namespaces"):
        return [f"topics.namespaces.{name}.{rule}" for name, own in value.items() for rule in own]
    if key == ("topics", "patterns"):
        return [
            f"topics.patterns[{number}].{rule}"
            for number, (_, own) in enumerate(value)
            for rule in ("match", *own)
        ]
    return [".".join(key)]


def _all_rules(base: Config, topics: dict[str, Any]) -> dict[str, Any]:
    """The rules of all topics; rules that a namespace or pattern leaves out are as in `[topics]`."""
    named = topics.pop("namespaces", {})
    matched = topics.pop("patterns", None)
    default = attrs.evolve(base.topics, **topics)
    namespaces = {
        name: attrs.evolve(base.namespaces.get(name, default), **own) for name, own in named.items()
    }
    patterns = base.patterns
    if matched is not None:
        patterns = tuple(
            TopicPattern(match, attrs.evolve(default, **own)) for match, own in matched
        )
    return {
        "topics": default,
        "namespaces": {**base.namespaces, **namespaces},
        "patterns": patterns,
    }


_NESTED: Final = ("namespaces", "patterns")
"""The fields of `Config` that in a file stand under `[topics]`."""

# Every key that a source may give, with its field: ("port",), ("topics", "history_size"), …
_TABLES: Final[dict[str, Any]] = {
    "topics": TopicRules,
    "tokens": TokenRules,
    "webhooks": WebhookRules,
}
_KEYS: Final[dict[tuple[str, ...], "attrs.Attribute[Any]"]] = {
    **{
        (field.name,): field
        for field in attrs.fields(Config)
        if field.name not in (*_TABLES, *_NESTED)
    },
    **{
        (name, field.name): field
        for name, table in _TABLES.items()
        for field in attrs.fields(table)
    },
}
_TYPES: Final[dict[tuple[str, ...], Any]] = {
    **{(name,): hint for name, hint in get_type_hints(Config).items()},
    **{
        (name, inner): hint
        for name, table in _TABLES.items()
        for inner, hint in get_type_hints(table).items()
    },
}


def _read(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read it: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not TOML: not UTF-8 at byte {error.start}") from error
    except tomllib.TOMLDecodeError as error:  # its text ends in "(at line 3, column 7)"
        raise ConfigError(f"{path}: not TOML: {error}") from error


def _flat(layer: Mapping[str, object]) -> Iterator[tuple[tuple[str, ...], object]]:
    for name, value in layer.items():
        if name in _TABLES and isinstance(value, Mapping):
            for inner, inner_value in value.items():
                yield (name, inner), inner_value
        else:
            yield (name,), value


def _from_environ(environ: Mapping[str, str]) -> Iterator[tuple[tuple[str, ...], object]]:
    for key in _KEYS:
        name = _variable(key)
        text = environ.get(name, "")
        if text and is_injected(name, text):
            raise ConfigError(
                f"{name}: {'.'.join(key)} is {text!r}: expected a whole number. Kubernetes sets it for a"
                " service called broker: give that another name, or set enableServiceLinks: false"
            )
        if text:
            yield key, _parse(text, _TYPES[key])


def _variable(key: tuple[str, ...]) -> str:
    return ENV_PREFIX + "_".join(key).upper()


def _parse(text: str, hint: object) -> object:
    """Turn a variable's text into what a TOML file would hold there, if it can be read so."""
    if get_origin(hint) is tuple:
        return [item.strip() for item in text.split(",") if item.strip()]
    if hint is bool or bool in get_args(hint):
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    for kind in (int, float):
        if kind is hint or kind in get_args(hint):
            try:
                return kind(text)
            except ValueError:
                return text
    return text


def _structure(
    source: str, key: tuple[str, ...], value: object, above: tuple[str, ...] | None = None
) -> Any:
    """Check one value from one source; `source` is how an error begins.

    `above` are the tables that the key stands in, where that is not what the key itself says.
    """
    above = key[:-1] if above is None else above
    name = ".".join([*above, key[-1]])
    if name in _TABLES:
        raise ConfigError(f"{source}{name} is {value!r}: expected a table, as in [{name}]")
    if key == ("topics", "namespaces"):
        return _structure_namespaces(source, value)
    if key == ("topics", "patterns"):
        return _structure_patterns(source, value)
    if key not in _KEYS:
        raise ConfigError(f"{source}unknown key {name!r}{_nearest(name, above)}")
    field = _KEYS[key]
    try:
        made = typed(name, _TYPES[key], value, is_secret=not field.repr)
    except ValueError as error:
        raise ConfigError(f"{source}{error}") from error
    if field.validator is not None:
        try:
            field.validator(None, field, made)
        except ValueError as error:
            raise ConfigError(f"{source}{'.'.join([*above, str(error)])}") from error
    return made


def _structure_namespaces(source: str, value: object) -> dict[str, dict[str, Any]]:
    if not isinstance(value, Mapping) or not all(isinstance(v, Mapping) for v in value.values()):
        raise ConfigError(
            f"{source}topics.namespaces is {value!r}: expected tables, as in "
            "[topics.namespaces.chat]"
        )
    try:
        namespace_names(None, attrs.fields(Config).namespaces, value)
    except ValueError as error:
        raise ConfigError(f"{source}topics.{error}") from error
    return {
        name: _structure_rules(source, ("topics", "namespaces", name), table)
        for name, table in value.items()
    }


def _structure_patterns(source: str, value: object) -> list[tuple[str, dict[str, Any]]]:
    if not isinstance(value, list | tuple) or not all(isinstance(v, Mapping) for v in value):
        raise ConfigError(
            f"{source}topics.patterns is {value!r}: expected tables, as in [[topics.patterns]]"
        )
    patterns = []
    for number, table in enumerate(value):
        above = ("topics", f"patterns[{number}]")
        rules = dict(table)
        match = rules.pop("match", None)
        if not isinstance(match, str):
            raise ConfigError(
                f'{source}{".".join(above)}.match is {match!r}: expected a string, as in "news.>"'
            )
        try:
            topic_match(None, attrs.fields(TopicPattern).match, match)
        except ValueError as error:
            raise ConfigError(f"{source}{'.'.join([*above, str(error)])}") from error
        patterns.append((match, _structure_rules(source, above, rules)))
    return patterns


def _structure_rules(
    source: str, above: tuple[str, ...], table: Mapping[str, object]
) -> dict[str, Any]:
    return {key: _structure(source, ("topics", key), value, above) for key, value in table.items()}


_FEW_NAMES: Final = 30
"""Names that an error tells; more are for a page of their own."""


def _nearest(name: str, above: tuple[str, ...]) -> str:
    known = [".".join(key) for key in _KEYS] + [*_TABLES, "topics.namespaces", "topics.patterns"]
    if above[:1] == ("topics",) and len(above) > 1:  # the rules of a namespace or pattern
        known = [".".join([*above, key[-1]]) for key in _KEYS if key[:-1] == ("topics",)]
    table, _, own_name = name.rpartition(".")
    inside = [key for key in known if key.rpartition(".")[0] == table]
    # A key of a table that stands outside it is as near as can be.
    exact = [key for key in known if key.rpartition(".")[2] == name]
    for names in (exact, inside, known):
        by_own_name = {key.rpartition(".")[2]: key for key in reversed(names)}
        # 0.65: `tls_certificate` means `tls_cert`, and `nonsense` is not `pong_seconds`.
        near = difflib.get_close_matches(own_name, sorted(by_own_name), n=1, cutoff=0.65)
        if near:
            return f": did you mean {by_own_name[near[0]]!r}?"
    names = inside or known
    if len(names) > _FEW_NAMES:
        return f", nor is it near one of {len(names)} that are; `python -m broker config show --all` lists them"
    return f": known are {', '.join(names)}"
