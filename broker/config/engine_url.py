"""How a setting names an engine: `memory`, `sqlite:PATH`, `sqlite:PATH?sync=process`."""

from pathlib import Path
from typing import Literal, TypeAlias, get_args

import attrs

Sync: TypeAlias = Literal["power", "process"]
"""What an acknowledged publication survives: the loss of power, or the death of the process."""


@attrs.frozen
class EngineUrl:
    """An engine as a setting names it; `path` is None for the memory engine."""

    path: Path | None = None
    sync: Sync = "power"


def parse_engine_url(text: str) -> EngineUrl:
    """Read what names an engine. Raises `ValueError` that says what would be right."""
    if text == "memory":
        return EngineUrl()
    kind, _, rest = text.partition(":")
    path, asked, query = rest.partition("?")
    if kind != "sqlite" or not path or "\0" in path:
        raise ValueError('must be "memory" or like "sqlite:/var/lib/broker/broker.db"')
    syncs = {f"sync={sync}": sync for sync in get_args(Sync)}
    if asked and query not in syncs:
        raise ValueError(f"after the ? stands {' or '.join(syncs)}")
    return EngineUrl(Path(path), syncs.get(query, "power"))
