"""The table of guards fits the tree: each text is there once, and each test that should see it is there.

To break them, which takes minutes, is `nox -s mutants`. Here two are, to see that the machine does it.
"""

import ast
from collections import Counter
from functools import cache

import pytest

from tests.mutants.mutant import ROOT, Mutant
from tests.mutants.table import MUTANTS
from tests.mutants.trials import try_all
from tests.simulation.planted import PLANTED

LEAST = 60


@cache
def functions_in(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, functions))


@pytest.mark.parametrize("mutant", [*MUTANTS, *PLANTED], ids=lambda mutant: mutant.name)
def test_what_is_to_be_broken_is_there_once(mutant: Mutant) -> None:
    assert mutant.count() == 1
    assert mutant.before != mutant.after


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_tests_that_should_see_it_are_there(mutant: Mutant) -> None:
    assert mutant.tests
    for test in mutant.tests:
        path, _, name = test.partition("::")
        assert name in functions_in(path), f"{test}: name one, as a whole file may take a minute"


def test_there_are_as_many_as_we_say_and_each_has_a_name_of_its_own() -> None:
    assert len(MUTANTS) >= LEAST
    names = Counter(mutant.name for mutant in MUTANTS)
    assert [name for name, count in names.items() if count > 1] == []


def test_a_broken_guard_is_caught_and_a_changed_comment_is_not() -> None:
    guard = next(each for each in MUTANTS if each.name == "a frame without a mask")
    comment = Mutant(
        "another comment",
        guard.path,
        "# not masked\n                break\n            stop",
        "# no mask\n                break\n            stop",
        guard.tests,
    )
    verdicts = {each.mutant.name: each.caught_by for each in try_all([guard, comment], jobs=1)}
    assert verdicts[guard.name].startswith("tests/transport/test_frames.py::")
    assert verdicts[comment.name] == ""
