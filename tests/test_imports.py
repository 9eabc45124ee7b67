"""Who may import whom, read from the source, so that the layers stay layers.

``core ← protocols ← connection ← app ← cli``; `transport` knows no topics, `core` knows no bytes,
engines know neither sessions nor sockets.

An import counts wherever it stands: in a function and under `TYPE_CHECKING` too, since knowing a
name is knowing it. What is read is each module's own source, not what its imports import in turn.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

ROOT = Path(__file__).parent.parent


@attrs.frozen
class Rule:
    """What a module or package may import. A name stands for itself and all below it.

    `broker` is the list of what it may import of this package, `foreign` of what others wrote;
    None: anything. `never` comes before both.
    """

    broker: tuple[str, ...] | None = None
    foreign: tuple[str, ...] | None = None
    never: tuple[str, ...] = ()


# What reaches beyond the values it was given: the system, the clock, chance, tasks, logs.
OUTSIDE_WORLD = (
    *("asyncio", "concurrent", "datetime", "http", "importlib", "io", "logging"),
    *("multiprocessing", "os", "pathlib", "queue", "random", "sched", "secrets", "select"),
    *("selectors", "signal", "socket", "socketserver", "sqlite3", "ssl", "subprocess", "sys"),
    *("tempfile", "threading", "time", "urllib", "uuid", "warnings", "zoneinfo"),
)

# `from broker import Broker` is the app by another way.
SHELL = ("broker.connection", "broker.app", "broker.cli", "broker.Broker")

RULES = {
    "broker.core": Rule(
        broker=("broker.core", "broker.errors"), foreign=("attrs", "msgspec"), never=OUTSIDE_WORLD
    ),
    "broker.transport": Rule(
        never=(
            *("broker.core.hub", "broker.core.topics", "broker.core.session"),
            *("broker.protocols", *SHELL),
        )
    ),
    "broker.protocols": Rule(
        broker=("broker.core", "broker.errors", "broker.protocols", "broker.transport.frames")
    ),
    "broker.engines": Rule(
        never=("broker.core.session", "broker.transport", "broker.protocols", "socket", *SHELL)
    ),
    "broker.connection": Rule(never=("broker.app", "broker.cli", "broker.Broker")),
    "broker.app": Rule(never=("broker.cli",)),
}


def imports(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of all that is imported; `from a import b` imports `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def violations(source: str, module: str, where: str, is_package: bool = False) -> list[str]:
    """One line for each import that breaks the rule for this module."""
    rule = next((rule for name, rule in RULES.items() if is_below(module, (name,))), None)
    if rule is None:
        return []
    package = module if is_package else module.rpartition(".")[0]
    found = []
    for line, name in imports(ast.parse(source), package):
        top = name.partition(".")[0]
        if top == "broker":
            allowed = rule.broker
        elif top in sys.stdlib_module_names:
            allowed = None
        else:
            allowed = rule.foreign
        if is_below(name, rule.never) or (allowed is not None and not is_below(name, allowed)):
            found.append(f"{where}:{line}: {module} must not import {name}")
    return found


def is_below(name: str, names: tuple[str, ...]) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in names)


def modules() -> list[Path]:
    return sorted((ROOT / "broker").rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_keeps_to_its_layer(path: Path) -> None:
    where = path.relative_to(ROOT)
    parts = list(where.with_suffix("").parts)
    is_package = parts[-1] == "__init__"
    if is_package:
        parts.pop()
    found = violations(path.read_text("utf-8"), ".".join(parts), str(where), is_package)
    assert not found, "\n".join(found)


def test_the_modules_were_found() -> None:
    names = {str(path.relative_to(ROOT / "broker")) for path in modules()}
    assert {"errors.py", "core/messages.py", "core/topics.py"} <= names


@pytest.mark.parametrize(
    ("module", "source", "culprit"),
    [
        ("broker.core.hub", "import trio", "trio"),
        ("broker.core.hub", "import socket", "socket"),
        ("broker.core.hub", "from time import monotonic", "time.monotonic"),
        ("broker.core.hub", "def f():\n    import os.path", "os.path"),
        ("broker.core.hub", "if TYPE_CHECKING:\n    from trio import Event", "trio.Event"),
        ("broker.core.hub", "from broker.config import Config", "broker.config.Config"),
        ("broker.core.hub", "from broker import Broker", "broker.Broker"),
        ("broker.core.hub", "from ..transport import outbox", "broker.transport.outbox"),
        ("broker.core.hub", "from .. import app", "broker.app"),
        ("broker.transport.lane", "from broker.core import hub", "broker.core.hub"),
        ("broker.transport.lane", "import broker.core.topics", "broker.core.topics"),
        ("broker.transport.lane", "from ..protocols.plain import X", "broker.protocols.plain.X"),
        ("broker.transport", "from broker.core.session import S", "broker.core.session.S"),
        ("broker.protocols.plain", "from broker.transport import lane", "broker.transport.lane"),
        ("broker.protocols.plain", "import broker.connection", "broker.connection"),
        ("broker.engines.memory", "from broker.core import session", "broker.core.session"),
        ("broker.engines.redis", "import broker.transport", "broker.transport"),
        ("broker.engines.redis", "from socket import socket", "socket.socket"),
        ("broker.connection", "from broker import Broker", "broker.Broker"),
        ("broker.connection", "from . import cli", "broker.cli"),
        ("broker.app", "from broker.cli import main", "broker.cli.main"),
    ],
)
def test_a_violation_is_found_and_named_with_its_line(
    module: str, source: str, culprit: str
) -> None:
    source = f"import attrs\n{source}\n"
    line = len(source.splitlines())
    assert violations(source, module, "x.py") == [
        f"x.py:{line}: {module} must not import {culprit}"
    ]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("broker.core.hub", "import re, attrs, msgspec.json\nfrom collections.abc import Callable"),
        ("broker.core.hub", "from broker.core.messages import Fd\nfrom . import topics"),
        ("broker.core.hub", "from ..errors import Refused"),
        ("broker.transport.lane", "import socket, trio\nfrom broker.core.messages import Frame"),
        ("broker.protocols.plain", "from broker.transport.frames import encode"),
        ("broker.engines.memory", "import trio\nfrom broker.core.history import HistoryStore"),
        ("broker.connection", "import broker.core.hub, broker.transport.lane, broker.protocols"),
        ("broker.app", "from broker.connection import meet"),
        ("broker.cli", "from broker.app import Broker"),
        ("broker.coreutils", "import trio"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert violations(source, module, "x.py") == []
