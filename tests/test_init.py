"""`import broker`: every public name is there, and nothing is loaded before it is asked for."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import broker

SOURCE = Path(broker.__file__)


def imported() -> set[str]:
    """The names that the source imports, for type checkers or at run time."""
    tree = ast.parse(SOURCE.read_text("utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {
        alias.asname or alias.name
        for node in imports
        if (node.module or "").startswith("broker.")
        for alias in node.names
    }


def test_type_checkers_see_the_names_that_are_public_and_no_others() -> None:
    assert imported() == set(broker.__all__)


@pytest.mark.parametrize("name", sorted(imported()))
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(broker, name) is getattr(broker, name)
    assert name in dir(broker)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'broker' has no attribute 'Brokr'"):
        _ = broker.Brokr  # type: ignore[attr-defined]
    assert not hasattr(broker, "__path_hooks__")


def test_the_import_alone_loads_nothing_and_a_light_name_not_the_whole() -> None:
    code = (
        "import sys, broker\n"
        "assert 'trio' not in sys.modules\n"
        "broker.ConfigError\n"
        "assert 'broker.app' not in sys.modules\n"
        "from broker import *\n"
        "Broker\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=SOURCE.parents[1])
