"""The names of scopes, for whoever looks at the nursery tree as it is: those of docs/design/lifetimes.md.

Rule: a name is a label and nothing more. Whoever opens a scope that is there once in a broker names it
in the same step; what each connection opens is told by the tasks in it, as a name for each would cost
every handshake.
"""

from typing import TypeVar
from weakref import WeakKeyDictionary

_names: WeakKeyDictionary[object, str] = WeakKeyDictionary()

T = TypeVar("T")


def name_scope(scope: T, name: str) -> T:
    """Name a scope, and return it. Forgotten with the scope."""
    _names[scope] = name
    return scope


def name_of_scope(scope: object) -> str:
    """The name that a scope was given; "" for none."""
    return _names.get(scope, "")
