"""Doubts about settings: each is right, and yet does nothing, or less than was meant.

Rule: a doubt stops nobody. Settings that have one meaning are told of here; those that contradict each other
raise, in `settings`.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

from broker.config.variables import ENV_PREFIX

if TYPE_CHECKING:
    from broker.config.settings import Config, TokenRules

HMAC_BYTES: Final = 32
"""RFC 7518 section 3.2: a key for HS256 has at least the 256 bits of its hash. One token is enough to try
guesses at a shorter one, far from the broker."""

KEY_CHARACTERS: Final = 16
"""Of 62 letters and digits, drawn at random: 95 bits. A word that somebody thought of has fewer."""


def doubts_about(config: "Config", sources: Mapping[str, str]) -> tuple[str, ...]:
    """One line for each setting that is doubtful; `sources` are those of `Loaded`. Secrets are not shown."""
    return (*_without_effect(config, sources), *_easily_guessed(config))


def _without_effect(config: "Config", sources: Mapping[str, str]) -> Iterator[str]:
    for name in ("host", "port"):
        if config.unix is not None and _in_one_place(sources, "unix", name):
            yield (
                f"{_place(sources, name)}{name} counts for nothing beside unix: the broker listens on "
                "the socket alone"
            )
    for name in ("unix_mode", "unix_group"):
        if config.unix is None and getattr(config, name) is not None:
            yield f"{_place(sources, name)}{name} counts for nothing without unix"
    hooks = config.webhooks
    if hooks.secret and not hooks.most_requests:
        name = "webhooks.secret"
        yield f"{_place(sources, name)}{name} signs nothing: no URL is set under [webhooks]"
    if config.api_listen and not (config.api_key or config.metrics_key):
        name = "api_listen"
        yield (
            f"{_place(sources, name)}{name} serves nothing but the health: neither api_key nor "
            "metrics_key is set"
        )


def _easily_guessed(config: "Config") -> Iterator[str]:
    name, secret = _hmac_secret(config.tokens)
    if 0 < len(secret) < HMAC_BYTES:
        yield (
            f"tokens.{name} has {len(secret)} bytes: who gets one token may find it out, and "
            f"be anybody then; take {HMAC_BYTES} random bytes, as of `openssl rand -hex 32`"
        )
    for name in ("api_key", "metrics_key", "admin_key", "admin_view_key"):
        key: str | None = getattr(config, name)
        if key is not None and len(key) < KEY_CHARACTERS:
            yield (
                f"{name} has {len(key)} characters and can be guessed; take {KEY_CHARACTERS} random ones or "
                "more, as of `openssl rand -hex 16`"
            )


def _hmac_secret(rules: "TokenRules") -> tuple[str, bytes]:
    """The setting that says it, and what it says; nothing where its file cannot be read, as who loads the keys
    raises then."""
    if rules.hmac_secret_file is None:
        return "hmac_secret", rules.hmac_secret.encode()
    try:
        return "hmac_secret_file", rules.hmac_secret_file.read_bytes().rstrip(b"\r\n")
    except OSError:
        return "hmac_secret_file", b""


def _in_one_place(sources: Mapping[str, str], one: str, other: str) -> bool:
    """Whether two settings were given in the same layer, so that neither was to override the other."""
    first, second = sources.get(one), sources.get(other)
    if first is None or second is None:
        return False
    return first == second or (first.startswith(ENV_PREFIX) and second.startswith(ENV_PREFIX))


def _place(sources: Mapping[str, str], name: str) -> str:
    return f"{sources[name]}: " if name in sources else ""
