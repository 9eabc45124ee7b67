"""Environment variables that begin as ours do, and are no setting: a slip of the pen, mostly.

Rule: one that Kubernetes sets for a service is nobody's slip. One that looks like a secret is an error,
because a secret that does not count leaves the broker open.
"""

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Final

import attrs

from broker.errors import ConfigError

ENV_PREFIX: Final = "BROKER_"

OF_COMMANDS: Final = frozenset({"BROKER_URL", "BROKER_TOKEN", "BROKER_CA"})
"""Variables of commands that are clients; `BROKER_API_KEY` is a setting as well."""

_INJECTED: Final = re.compile(
    r"BROKER(_[A-Z0-9_]+)?_"
    r"(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_INJECTED_PORT: Final = re.compile(r"(tcp|udp|sctp)://")
_SECRET: Final = re.compile(r"SECRET|PASSW|PASSPHRASE|CREDENTIAL|TOKEN|(^|_)(API_?)?KEYS?($|_)")


@attrs.frozen
class UnknownVariable:
    """A variable that names no setting. `nearest` is the one that was meant, perhaps; else empty."""

    name: str
    nearest: str = ""

    def __str__(self) -> str:
        if self.name == f"{ENV_PREFIX}CONFIG":
            return f"{self.name}: there is no such setting; the option --config names the file"
        hint = f"did you mean {self.nearest}?" if self.nearest else "the settings page lists them"
        return f"{self.name}: there is no such setting; {hint}"


def unknown_variables(
    environ: Mapping[str, str], known: Collection[str], secrets: Collection[str]
) -> tuple[UnknownVariable, ...]:
    """The variables that name no setting, sorted; empty ones count as unset. `known` are those of all
    settings, `secrets` those of them that hold a secret. Raises `ConfigError` for one that looks like a
    secret."""
    found = []
    for name in sorted(environ):
        is_ours = name.startswith(ENV_PREFIX) and environ[name]
        if not is_ours or name in known or name in OF_COMMANDS or is_injected(name, environ[name]):
            continue
        looks_secret = _SECRET.search(name.removeprefix(ENV_PREFIX)) is not None
        # Somebody who gives a secret does not mean a port.
        unknown = UnknownVariable(name, _nearest(name, secrets if looks_secret else known))
        if looks_secret or unknown.nearest in secrets:
            end = "" if unknown.nearest else "."
            raise ConfigError(
                f"{unknown}{end} A secret that does not count would leave the broker open"
            )
        found.append(unknown)
    return tuple(found)


def is_injected(name: str, value: str) -> bool:
    """Whether Kubernetes sets this variable, for a service called `broker`."""
    if _INJECTED.fullmatch(name):
        return True
    return name.endswith("_PORT") and _INJECTED_PORT.match(value) is not None


def _nearest(name: str, known: Collection[str]) -> str:
    # Without its table, BROKER_HMAC_SECRET, it is as near as can be.
    inner = [each for each in known if each.endswith(name.removeprefix(ENV_PREFIX[:-1]))]
    near = inner or difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.75)
    return near[0] if near else ""
