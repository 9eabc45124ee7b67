"""The rooms of the package, and the one import rule that holds between them, read from the source.

A module imports its own room and the rooms to the left of its compartment. An import counts wherever
it stands: in a function and under `TYPE_CHECKING` too, since knowing a name is knowing it. It
reads each module's own source, not what its imports import in turn.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs
import pytest

PACKAGE = Path(__file__).parent.parent / "broker"

COMPARTMENTS = (
    ("errors", "process", "version"),
    ("core",),
    ("config", "hooks", "client"),
    ("transport", "engines", "logs"),
    ("protocols", "access", "events"),
    ("routing", "webhooks"),
    ("session",),
    ("node",),
    ("http", "admin"),
    ("app",),
    ("cli", "testing", "__init__"),
    ("__main__",),
)
"""Left to right. Rooms in one compartment do not import each other."""

ROOT = {"__init__", "__main__", "app", "errors", "hooks", "node", "version"}
"""The modules that are a room by themselves; `logs` and `testing` have grown into rooms of several."""

NARROWER = {"client": {"core", "errors", "version"}}
"""Rooms that import less than all to their left: a client knows nothing of a broker's inside."""

# The world beyond the values that were given: the system, the clock, chance, tasks, logs.
OUTSIDE_WORLD = {
    *("asyncio", "concurrent", "datetime", "http", "importlib", "io", "logging"),
    *("multiprocessing", "os", "pathlib", "queue", "random", "sched", "secrets", "select"),
    *("selectors", "signal", "socket", "socketserver", "sqlite3", "ssl", "subprocess", "sys"),
    *("tempfile", "threading", "time", "urllib", "uuid", "warnings", "zoneinfo"),
}

FOREIGN = {"core": {"attrs", "msgspec"}, "version": set[str](), "errors": set[str]()}
"""Rooms that use only these packages of others, and nothing of the outside world."""

PLACE = {room: place for place, rooms in enumerate(COMPARTMENTS) for room in rooms}


@attrs.frozen
class Import:
    """One imported name: where, and in full."""

    line: int
    name: str


def room_of(module: str) -> str:
    """`core` of `broker.core.hub`, `app` of `broker.app`, `__init__` of `broker` itself."""
    _, _, rest = module.partition(".")
    return rest.partition(".")[0] or "__init__"


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = ["broker", *path.relative_to(package).with_suffix("").parts]
        if parts[-1] == "__init__":
            parts.pop()
        found[".".join(parts)] = path
    return found


def imports(source: str, module: str, *, is_package: bool = False) -> Iterator[Import]:
    """All that is imported; `from a import b` imports `a.b`."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                yield Import(node.lineno, f"{base}.{alias.name}")


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """One line for each import that breaks the rule for this module."""
    room = room_of(module)
    found = []
    for each in imports(source, module, is_package=is_package):
        top = each.name.partition(".")[0]
        if top == "broker":
            allowed = _may_import(room, room_of(each.name))
        elif top in sys.stdlib_module_names:
            allowed = room not in FOREIGN or top not in OUTSIDE_WORLD
        else:
            allowed = room not in FOREIGN or top in FOREIGN[room]
        if not allowed:
            found.append(f"{module}:{each.line} must not import {each.name}")
    return found


def _may_import(room: str, other: str) -> bool:
    if other not in PLACE:  # `from broker import Broker` is the package itself
        other = "__init__"
    if other == room:
        return True
    if room in NARROWER:
        return other in NARROWER[room]
    return PLACE[other] < PLACE[room]


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The circles of imports, each once, as far as a walk from every module finds them."""
    found: dict[frozenset[str], list[str]] = {}

    def walk(module: str, way: list[str]) -> None:
        if module in way:
            circle = way[way.index(module) :]
            found.setdefault(frozenset(circle), circle)
            return
        for other in sorted(graph.get(module, ())):
            walk(other, [*way, module])

    for module in graph:
        walk(module, [])
    return list(found.values())


def graph_of(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """Which modules of its own room each module imports."""
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        is_package = path.name == "__init__.py"
        graph[module] = set()
        for each in imports(path.read_text("utf-8"), module, is_package=is_package):
            target = each.name if each.name in files else each.name.rpartition(".")[0]
            if target in files and target != module and room_of(target) == room_of(module):
                graph[module].add(target)
    return graph


def test_every_module_stands_in_a_room() -> None:
    for module, path in modules().items():
        room = room_of(module)
        assert room in PLACE, f"{module} stands in no room: name it in COMPARTMENTS"
        if path.parent == PACKAGE and path.name != "__init__.py":
            assert room in ROOT, f"{module} is a module of the root: put it into a room"


def test_the_root_has_seven_modules_at_most_besides_init_and_main() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == ROOT
    assert len(ROOT - {"__init__", "__main__"}) <= 7


@pytest.mark.parametrize("module", modules())
def test_every_module_keeps_to_its_room(module: str) -> None:
    path = modules()[module]
    source = path.read_text("utf-8")
    found = violations(source, module, is_package=path.name == "__init__.py")
    assert not found, "\n".join(found)


def test_no_room_has_a_circle() -> None:
    assert circles(graph_of(modules())) == []


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


def longest(room: str) -> Iterator[tuple[str, int, int]]:
    """Each function of a room with its lines, and each class with its methods."""
    for path in (PACKAGE / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                yield f"{path.name} {node.name}", node.end_lineno - node.lineno + 1, 0
            elif isinstance(node, ast.ClassDef):
                methods = [
                    each
                    for each in node.body
                    if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
                ]
                yield f"{path.name} {node.name}", 0, len(methods)


@pytest.mark.parametrize("room", ["routing", "session"])
def test_the_middle_has_no_long_function_and_no_wide_class(room: str) -> None:
    for name, lines, methods in longest(room):
        assert lines <= 60, f"{name} has {lines} lines"
        assert methods <= 25, f"{name} has {methods} methods"


def test_runs_end_in_the_router_alone() -> None:
    """Order holds because everything that goes to an outbox goes through one door."""
    for module, path in modules().items():
        if room_of(module) in ("transport", "logs", "client", "cli"):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) != "logs.flush":
                assert node.attr != "flush", f"{module}:{node.lineno} flushes by hand"
                if node.attr in ("offer", "offer_reply"):
                    assert module == "broker.routing.router", f"{module}:{node.lineno}"


@pytest.mark.parametrize(
    ("module", "source", "culprit"),
    [
        ("broker.core.hub", "import trio", "trio"),
        ("broker.core.hub", "import socket", "socket"),
        ("broker.core.hub", "from time import monotonic", "time.monotonic"),
        ("broker.core.hub", "def f():\n    import os.path", "os.path"),
        ("broker.core.hub", "if TYPE_CHECKING:\n    from trio import Event", "trio.Event"),
        ("broker.core.hub", "from broker.config import settings", "broker.config.settings"),
        ("broker.core.hub", "from broker import Broker", "broker.Broker"),
        ("broker.core.hub", "from ..transport import outbox", "broker.transport.outbox"),
        ("broker.core.hub", "from .. import app", "broker.app"),
        ("broker.transport.lane", "from ..protocols.plain import X", "broker.protocols.plain.X"),
        ("broker.transport.lane", "import broker.engines.memory", "broker.engines.memory"),
        ("broker.protocols.plain", "import broker.session", "broker.session"),
        ("broker.protocols.plain", "import broker.access.tokens", "broker.access.tokens"),
        ("broker.engines.memory", "import broker.transport", "broker.transport"),
        ("broker.hooks", "from broker.session.connection import C", "broker.session.connection.C"),
        ("broker.routing.router", "import broker.webhooks.sender", "broker.webhooks.sender"),
        ("broker.session.connection", "from broker import Broker", "broker.Broker"),
        ("broker.node", "from .app import Broker", "broker.app.Broker"),
        ("broker.http.api", "from broker.app import Broker", "broker.app.Broker"),
        ("broker.app", "from broker.cli.main import main", "broker.cli.main.main"),
        ("broker.client.link", "from broker.config.settings import C", "broker.config.settings.C"),
        ("broker.client.link", "from broker.transport import frames", "broker.transport.frames"),
    ],
)
def test_a_violation_is_found_and_named_with_its_line(
    module: str, source: str, culprit: str
) -> None:
    source = f"import attrs\n{source}\n"
    line = len(source.splitlines())
    assert violations(source, module) == [f"{module}:{line} must not import {culprit}"]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("broker.core.hub", "import re, attrs, msgspec.json\nfrom collections.abc import Callable"),
        ("broker.core.hub", "from broker.core.messages import Fd\nfrom . import topics"),
        ("broker.core.hub", "from ..errors import Refused"),
        ("broker.transport.lane", "import socket, trio\nfrom broker.core.messages import Frame"),
        ("broker.protocols.plain", "from broker.transport.frames import encode"),
        ("broker.engines.memory", "import trio\nfrom broker.core.history import HistoryStore"),
        ("broker.session.accept", "import broker.core.hub, broker.routing.router, broker.hooks"),
        ("broker.app", "from broker.http.asgi import http_app"),
        ("broker.cli.serve", "from broker.app import Broker"),
        ("broker.client.link", "import trio_websocket\nfrom broker.errors import ClientError"),
    ],
)
def test_an_allowed_import_passes(module: str, source: str) -> None:
    assert violations(source, module) == []
