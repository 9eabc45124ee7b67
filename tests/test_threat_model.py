"""The table of what is open by default says what the settings say, and leaves out none that opens a door."""

import re
from math import inf
from pathlib import Path
from typing import Final

import attrs

from broker.config.described import TABLES
from broker.config.settings import Config

ROOT: Final = Path(__file__).parent.parent
PAGE: Final = (ROOT / "docs" / "security" / "threat-model.md").read_text("utf-8")
DOORS: Final = re.compile(
    r"host|hosts|tls_cert|demo_page|fallbacks|direct_topics|allowed_origins|trusted_proxies|proxy_protocol|api_listen"
    r"|(api|metrics|admin|admin_view)_key|(.*\.)?may_.*|hook_decides.*|personal_.*|max_connections.*|max_memory_bytes"
    r"|(user_)?(message|byte)_rate|tokens\.(allow_.*|audience|issuer)|webhooks\.(url|secret)"
)
"""Settings by which somebody gets in, learns or does something, or uses something up."""


def in_words(value: object) -> str:
    """A default as the page says it."""
    if value is None or value == "":
        return "unset"
    if value == () or value is False or value == inf:
        return "none" if value == () else "off"
    return "on" if value is True else str(value)


def defaults() -> dict[str, str]:
    config = Config()
    found = {}
    for table, kind in TABLES.items():
        holder: object = getattr(config, table) if table else config
        for field in attrs.fields(kind):
            name = f"{table}.{field.name}" if table else field.name
            if DOORS.fullmatch(name):
                found[name] = in_words(getattr(holder, field.name))
    return found


def test_the_table_names_each_door_with_its_default() -> None:
    rows = re.findall(r"^\| `([a-z_.]+)` \| ([^|]+) \| [^|]+ \|$", PAGE, re.MULTILINE)
    assert len(rows) > 30
    assert {name: said.strip("` ") for name, said in rows} == defaults()


def test_the_supported_versions_name_the_present_one() -> None:
    from broker.version import VERSION

    minor = ".".join(VERSION.split(".")[:2])
    assert f"| {minor} | yes |" in (ROOT / "SECURITY.md").read_text("utf-8")
