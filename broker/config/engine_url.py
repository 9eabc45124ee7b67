"""How a setting names an engine.

`memory`, `sqlite:PATH`, `sqlite:PATH?sync=process`, and for a Redis:

========================================================  ==========================================
`redis://[user:password@]host[:port][/db]`                a server; `rediss://` for TLS
`redis://host:port,host:port`                             a cluster: any of its nodes
`redis+unix:///path/to/redis.sock`                        the same over a Unix socket
`redis+sentinel://host:port,host:port/service[/db]`       the primary that Sentinels name
========================================================  ==========================================

Each may end in `?prefix=NAME`, `?db=N`, `?ca=PATH`, joined by `&`.
"""

from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args
from urllib.parse import parse_qsl, unquote, urlsplit

import attrs

Sync: TypeAlias = Literal["power", "process"]
"""The fault that an acknowledged publication survives: the loss of power, or the death of the process."""

REDIS_SCHEMES: Final = ("redis", "rediss", "redis+unix", "redis+sentinel")

REDIS_PORT: Final = 6379
SENTINEL_PORT: Final = 26379

_EXAMPLES: Final = (
    'must be "memory" or like "sqlite:/var/lib/broker/broker.db" or "redis://127.0.0.1:6379"'
)


@attrs.frozen
class RedisUrl:
    """A Redis as a setting names it. `hosts` are those of Sentinels where there is a `service`, else of
    nodes of a cluster where there are several, and none where there is a `socket`."""

    hosts: tuple[tuple[str, int], ...] = ()
    socket: str = ""
    service: str = ""
    user: str | None = None
    password: str | None = attrs.field(default=None, repr=False)
    db: int = 0
    tls: bool = False
    ca: Path | None = None
    prefix: str = "broker"
    """In the names of all keys: brokers with the same are one."""

    @property
    def key(self) -> str:
        """The beginning of all keys' names; in braces, so that a cluster keeps them together."""
        return f"{{{self.prefix}}}"

    @property
    def where(self) -> str:
        """The same for a log: without a password."""
        if self.socket:
            return self.socket
        hosts = ",".join(f"{host}:{port}" for host, port in self.hosts)
        return f"{hosts}/{self.service}" if self.service else hosts


@attrs.frozen
class EngineUrl:
    """An engine as a setting names it; the memory engine where it has neither `path` nor `redis`."""

    path: Path | None = None
    sync: Sync = "power"
    redis: RedisUrl | None = None


def parse_engine_url(text: str) -> EngineUrl:
    """Read what names an engine. Raises `ValueError` that says what would be right."""
    if text == "memory":
        return EngineUrl()
    kind, _, rest = text.partition(":")
    if kind in REDIS_SCHEMES:
        return EngineUrl(redis=_redis_url(kind, text))
    path, asked, query = rest.partition("?")
    if kind != "sqlite" or not path or "\0" in path:
        raise ValueError(_EXAMPLES)
    syncs = {f"sync={sync}": sync for sync in get_args(Sync)}
    if asked and query not in syncs:
        raise ValueError(f"after the ? stands {' or '.join(syncs)}")
    return EngineUrl(Path(path), syncs.get(query, "power"))


def _redis_url(kind: str, text: str) -> RedisUrl:
    try:
        parts = urlsplit(text)
    except ValueError:
        raise ValueError(_EXAMPLES) from None
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    prefix, ca = options.pop("prefix", "broker"), options.pop("ca", None)
    db = _number(options.pop("db", "0"), "db")
    if options:
        raise ValueError(f"after the ? stand prefix, db and ca, and not {next(iter(options))}")
    if not prefix or not prefix.isprintable() or any(each in prefix for each in "{} "):
        raise ValueError("prefix is a name without spaces and braces")
    netloc, steps = parts.netloc, [step for step in parts.path.split("/") if step]
    login, _, names = netloc.rpartition("@")
    user, colon, password = login.partition(":")
    url = RedisUrl(
        user=unquote(user) or None,
        password=unquote(password) if colon else None,
        db=db,
        tls=kind == "rediss",
        ca=None if ca is None else Path(ca),
        prefix=prefix,
    )
    if kind == "redis+unix":
        if names or not steps:
            raise ValueError('a Unix socket is like "redis+unix:///run/redis/redis.sock"')
        return attrs.evolve(url, socket=unquote(parts.path))
    service = ""
    if kind == "redis+sentinel":
        if not steps:
            raise ValueError('Sentinels are like "redis+sentinel://a:26379,b:26379/service"')
        service, *steps = steps
    hosts = _hosts(names, SENTINEL_PORT if service else REDIS_PORT)
    if not hosts or len(steps) > 1:
        raise ValueError(_EXAMPLES)
    if steps:
        url = attrs.evolve(url, db=_number(steps[0], "the database"))
    return attrs.evolve(url, hosts=hosts, service=unquote(service))


def _hosts(names: str, port: int) -> tuple[tuple[str, int], ...]:
    found = []
    for name in filter(None, names.split(",")):
        try:
            split = urlsplit(f"//{name}")
            found.append((split.hostname or "", split.port or port))
        except ValueError:  # a port that is none, half an IPv6 address
            raise ValueError(_EXAMPLES) from None
    if not all(host for host, _ in found):
        raise ValueError(_EXAMPLES)
    return tuple(found)


def _number(text: str, what: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 6):
        raise ValueError(f"{what} is a number from 0 on")
    return int(text)
