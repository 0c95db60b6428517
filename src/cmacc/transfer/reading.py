"""Plain values that JSON gave, made into dataclasses with their types checked: files may come from anyone."""

import dataclasses
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

_Kind = TypeVar("_Kind")


class UnfitError(ValueError):
    """A value that is missing, unknown, or of another type; the message says which, and what it must be."""


def dataclass_of(kind: type[_Kind], plain: object, what: str) -> _Kind:
    """A dataclass of a JSON object that has no other fields, and all that have no default.

    Parameters
    ----------
    kind
        The dataclass; its fields are of str, int, float, bool, None, Literal, and dicts and tuples of them.
    plain
        What JSON gave.
    what
        What the object is, for the message; the fields of nothing in particular where it is empty.

    Raises
    ------
    UnfitError
        A field without a default is missing, there is one more, or a value is of another type, or refused by the
        dataclass.
    """
    if not isinstance(plain, Mapping):
        raise UnfitError(f"{what or kind.__name__} must be an object, got {plain!r:.60}")
    hints = get_type_hints(kind)
    prefix = f"{what}." if what else ""
    for name in plain:
        if name not in hints:
            raise UnfitError(f"unknown setting {prefix}{name} of {kind.__name__}; the settings are {', '.join(hints)}")
    try:
        optional = {
            field.name
            for field in dataclasses.fields(kind)  # type: ignore[arg-type]
            if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        }
        given = {name: hint for name, hint in hints.items() if name in plain or name not in optional}
        return kind(**{name: value_of(hint, plain, name, prefix) for name, hint in given.items()})
    except UnfitError:
        raise
    except (ValueError, OverflowError) as error:
        raise UnfitError(str(error)) from error


def value_of(hint: Any, plain: Mapping[str, Any], name: str, prefix: str = "") -> Any:
    """The value of that name and type.

    Raises
    ------
    UnfitError
        It is missing, or of another type.
    """
    if name not in plain:
        raise UnfitError(f"{prefix}{name} is missing")
    value = plain[name]
    if not _fits(value, hint):
        is_literal = get_origin(hint) is Literal
        wanted = "one of " + ", ".join(get_args(hint)) if is_literal else getattr(hint, "__name__", str(hint))
        if get_args(hint) and not is_literal:
            wanted = str(hint)
        raise UnfitError(f"{prefix}{name} must be {wanted}, got {value!r:.60}")
    if get_origin(hint) is tuple:
        return tuple(value)
    return float(value) if hint is float else value  # JSON writers other than Python's write 16.0 as 16


def _fits(value: object, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in inner
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if origin is tuple:
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value)
    # Not isinstance: to it True is an int.
    return type(value) in ((float, int) if hint is float else (hint,))
