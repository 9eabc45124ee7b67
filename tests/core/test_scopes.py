import gc

from broker.core.scopes import name_of_scope, name_scope


class Scope:
    pass


def test_a_scope_has_the_name_that_it_was_given() -> None:
    scope, other = Scope(), Scope()
    assert name_scope(scope, "upkeep") is scope
    assert name_of_scope(scope) == "upkeep"
    assert name_of_scope(other) == ""


def test_a_name_keeps_no_scope_alive() -> None:
    from broker.core import scopes

    before = len(scopes._names)
    for number in range(100):
        name_scope(Scope(), f"scope {number}")
    gc.collect()
    assert len(scopes._names) <= before
