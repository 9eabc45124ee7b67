"""The names of scopes, for those who look at the nursery tree as it is: those of docs/design/lifetimes.md.

Rule: a name is a label and nothing more. A scope that is there once in a broker is named in the same step in
which it is opened. The scopes of a connection have no names, which would cost every handshake: the tasks in
them tell what they are.
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
