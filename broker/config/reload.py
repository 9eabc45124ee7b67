"""The config in force, in one cell that everybody reads, and what of a new one can take its place.

Rules:

1. A setting is live unless its field says `needs_restart`, with the reason.
2. Nobody keeps a `Config`, or a value of it, beyond the step in which it was read. A value that is
   costly to derive is kept with the `version` that it was derived from.
3. Live settings apply to those who are connected from their next request on; a few, such as
   `max_message_bytes`, are handed over when a connection is made and apply to those who come.
"""

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Final

import attrs

from broker.config.settings import NEEDS_RESTART, Config, TokenRules

FIXED: Final = tuple(
    field.name for field in attrs.fields(Config) if NEEDS_RESTART in field.metadata
)
"""The settings that stay as they are until a restart, in the order of `Config`."""


@attrs.frozen
class Change:
    """`config` is the one to go by from now on. `made` and `refused` name settings."""

    config: Config
    made: tuple[str, ...]
    refused: tuple[str, ...]


def merge(old: Config, new: Config, *, with_tokens: bool = False) -> Change:
    """Lay over `old` what may change of `new`; `with_tokens`: the rules of tokens as well, whose keys
    somebody has read."""
    fixed = [name for name in FIXED if not (with_tokens and name == "tokens")]
    changed = [
        field.name
        for field in attrs.fields(Config)
        if getattr(old, field.name) != getattr(new, field.name)
    ]
    kept = {name: getattr(old, name) for name in fixed}
    return Change(
        attrs.evolve(new, **kept),
        tuple(name for name in changed if name not in fixed),
        tuple(name for name in changed if name in fixed),
    )


def renews(old: TokenRules, new: TokenRules) -> bool:
    """Whether keys by `new` may take the place of those by `old` while tokens are verified: not where
    another issuer would have to be asked, nor where tokens begin to count, or no longer do."""

    def fixed(rules: TokenRules) -> object:
        return rules.configured, rules.jwks_url, rules.jwks_seconds, rules.jwks_retry_seconds

    return fixed(old) == fixed(new)


NO_SOURCES: Final[Mapping[str, str]] = MappingProxyType({})


def _is_of(name: str, settings: Collection[str]) -> bool:
    """Whether a value, by its dotted name, is one of these settings or in one of them."""
    return name.partition(".")[0] in settings


@attrs.define(eq=False)
class Settings:
    """The config in force. `version` grows with each change of it."""

    config: Config
    sources: Mapping[str, str] = attrs.field(factory=dict)
    """Where values of it were given, by setting; see `config.effective`."""
    version: int = 0
    _watchers: list[Callable[[], None]] = attrs.field(init=False, factory=list)

    def watch(self, on_change: Callable[[], None]) -> None:
        """Have `on_change` called right after each change: for what must act on it at once."""
        self._watchers.append(on_change)

    def replace(
        self,
        new: Config,
        sources: Mapping[str, str] = NO_SOURCES,
        *,
        with_tokens: bool = False,
    ) -> Change:
        """Go by another config, as far as that needs no restart; atomic, and never waits."""
        change = merge(self.config, new, with_tokens=with_tokens)
        self.config = change.config
        kept = {
            name: source for name, source in self.sources.items() if _is_of(name, change.refused)
        }
        come = {
            name: source for name, source in sources.items() if not _is_of(name, change.refused)
        }
        self.sources = {**come, **kept}
        self.version += 1
        for on_change in self._watchers:
            on_change()
        return change
