"""The words about each setting, read from the source: its heading, and the reason of its default."""

import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from broker.config import settings
from broker.config.settings import Config, TokenRules, TopicRules, WebhookRules

TABLES: Final[Mapping[str, "type[attrs.AttrsInstance]"]] = {
    "": Config,
    "topics": TopicRules,
    "tokens": TokenRules,
    "webhooks": WebhookRules,
}
"""The tables of a file, with what they hold; "" for what stands in none."""


@attrs.frozen
class Described:
    """One setting of a table, or a heading, which has no field."""

    words: str
    field: "attrs.Attribute[Any] | None" = None
    default: object = None


def described(table: str) -> Iterator[Described]:
    """The settings of a table, in their order, with headings in between. Tables in it are left out."""
    kind = TABLES[table]
    fields = {field.name: field for field in attrs.fields(kind)}
    plain = kind()
    source = inspect.getsource(settings)
    classes = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    body = next(node for node in classes if node.name == kind.__name__).body
    lines = source.splitlines()
    for node, below in zip(body, [*body[1:], None], strict=True):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        heading = re.fullmatch(r"\s*# (.*)", lines[node.lineno - 2])
        if heading:
            yield Described(heading[1])
        name = node.target.id
        doc = below.value if isinstance(below, ast.Expr) else None
        words = str(doc.value) if isinstance(doc, ast.Constant) else ""
        if name not in (*TABLES, "namespaces", "patterns"):
            yield Described(" ".join(words.split()), fields[name], getattr(plain, name))


def in_toml(value: object) -> str:
    """A value as it stands in a file."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:_}" if value >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:g}" if value % 1 or abs(value) == float("inf") else f"{value:.1f}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(in_toml, value))}]"
    text = str(value) if isinstance(value, Path) else value
    assert isinstance(text, str)
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
