"""The types of settings: a value of any source becomes one of its field's, or is refused.

Rule: a number in quotes is no number, `true` is not 1, and a text is no list of texts. A whole number is
a number, and a text is a path.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin

import attrs
import cattrs

from broker.config.validators import expected_of


# `Any`: a hint is whatever may stand behind a field's colon, a class or not, and Python has no type for that.
def typed(name: str, hint: Any, value: object, *, is_secret: bool = False) -> Any:
    """The value as its field has it. Raises `ValueError` that names the field, the value, unless it is a
    secret, and what is expected."""
    try:
        return _converter.structure(value, hint)
    except Exception:  # noqa: BLE001 - cattrs raises many kinds
        # A value that is not shown in a repr is a secret, and no less so with the wrong type.
        shown = type(value).__name__ if is_secret else repr(value)
        raise ValueError(f"{name} is {shown}: expected {expected_of(hint)}") from None


def converted(_: type, fields: "list[attrs.Attribute[Any]]") -> "list[attrs.Attribute[Any]]":
    """For `attrs.frozen(field_transformer=…)`: every field takes what `typed` takes for it, so that a
    config which a program makes is checked as one from a file."""
    return [field.evolve(converter=_converter_of(field)) for field in fields]


def _converter_of(field: "attrs.Attribute[Any]") -> Callable[[object], Any]:
    name, hint, is_secret = field.name, field.type, not field.repr
    return lambda value: typed(name, hint, value, is_secret=is_secret)


def _strict(*kinds: type) -> Callable[[object, Any], object]:
    """Take values of these types as they are: "80" is not a number and true is not 1."""

    def hook(value: object, hint: Callable[[object], object]) -> object:
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise TypeError
        return hint(value)

    return hook


def _strings(value: object, _: object) -> tuple[str, ...]:
    # A string is a sequence of strings too, which is never what was meant.
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise TypeError
    return tuple(value)


def _is_number_or_word(hint: object) -> bool:
    return int in get_args(hint) and any(get_origin(each) is Literal for each in get_args(hint))


def _number_or_word(value: object, hint: object) -> object:
    words = [word for each in get_args(hint) for word in get_args(each)]
    if value not in words and (not isinstance(value, int) or isinstance(value, bool)):
        raise TypeError
    return value


def _is_table(hint: object) -> bool:
    return isinstance(hint, type) and attrs.has(hint)


def _table(value: object, hint: type) -> object:
    if not isinstance(value, hint):
        raise TypeError
    return value


def _is_of_tables(hint: object) -> bool:
    return get_origin(hint) in (tuple, Mapping) and any(map(_is_table, get_args(hint)))


def _tables(value: object, hint: object) -> object:
    (kind,) = filter(_is_table, get_args(hint))
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple([_table(each, kind) for each in value])
    if get_origin(hint) is not tuple and isinstance(value, Mapping):
        return {_strict(str)(name, str): _table(each, kind) for name, each in value.items()}
    raise TypeError


_converter: Final = cattrs.Converter()
_converter.register_structure_hook(bool, _strict(bool))
_converter.register_structure_hook(int, _strict(int))
_converter.register_structure_hook(float, _strict(int, float))
_converter.register_structure_hook(str, _strict(str))
_converter.register_structure_hook(Path, _strict(str, Path))
_converter.register_structure_hook_func(lambda hint: hint == tuple[str, ...], _strings)
_converter.register_structure_hook_func(_is_number_or_word, _number_or_word)
_converter.register_structure_hook_func(_is_table, _table)
_converter.register_structure_hook_func(_is_of_tables, _tables)
