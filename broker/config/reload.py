"""What of a new config can be gone by while the broker serves, and what needs a restart.

Rule: a setting is fixed if it is listed here, and live if not. Live settings apply to those who are
connected from their next request on; a few, such as `max_message_bytes`, are handed over when a
connection is made and apply to those who come.
"""

from typing import Final

import attrs

from broker.config.settings import Config

FIXED: Final = (
    *("host", "port", "unix", "tls_cert", "tls_key", "backlog", "websocket_paths"),
    *("history_bytes", "tokens", "webhooks"),
)
"""The listeners are open, the pages know their paths, the engine has its room, the keys are read,
the events are numbered."""


@attrs.frozen
class Change:
    """`config` is what to go by from now on. `made` and `refused` name settings."""

    config: Config
    made: tuple[str, ...]
    refused: tuple[str, ...]


def merge(old: Config, new: Config) -> Change:
    """Lay over `old` what may change of `new`."""
    changed = [
        field.name
        for field in attrs.fields(Config)
        if getattr(old, field.name) != getattr(new, field.name)
    ]
    kept = {name: getattr(old, name) for name in FIXED}
    return Change(
        attrs.evolve(new, **kept),
        tuple(name for name in changed if name not in FIXED),
        tuple(name for name in changed if name in FIXED),
    )
