"""Convert plain values from JSON or YAML into dataclasses, with all types checked, because files may come from anyone.

Used to read configs, cards, exports, plans and provenance.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

_Kind = TypeVar("_Kind")
# YAML 1.1 reads 1e-3 as text, because it has no decimal point.
_YAML_EXPONENT = re.compile(r"[+-]?[0-9]+[eE][+-]?[0-9]+")


class UnfitError(ValueError):
    """A value that is missing, unknown, or of the wrong type; the message says which, and what it must be."""


def dataclass_of(kind: type[_Kind], plain: object, what: str, *, with_defaults: bool = False) -> _Kind:
    """A dataclass from a JSON object that has exactly its fields.

    Parameters
    ----------
    kind
        The dataclass; its fields are of str, int, float, bool, None, Literal, Path, dataclasses, and dicts and tuples.
    plain
        The parsed JSON.
    what
        Name of the object, for error messages; may be empty.
    with_defaults
        Whether fields with a default may be missing.

    Raises
    ------
    UnfitError
        A field is missing or unknown, or a value is of the wrong type or refused by the dataclass.
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
        given = {n: hint for n, hint in hints.items() if n in plain or not (with_defaults and n in optional)}
        return kind(**{n: value_of(hint, plain, n, prefix, with_defaults=with_defaults) for n, hint in given.items()})
    except UnfitError:
        raise
    except (ValueError, OverflowError) as error:
        raise UnfitError(str(error)) from error


def value_of(hint: Any, plain: Mapping[str, Any], name: str, prefix: str = "", *, with_defaults: bool = False) -> Any:
    """The value of that name and type; ``with_defaults`` is for dataclasses, see `dataclass_of`.

    Raises
    ------
    UnfitError
        The value is missing or of the wrong type.
    """
    if name not in plain:
        raise UnfitError(f"{prefix}{name} is missing")
    value = plain[name]
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return dataclass_of(hint, value, f"{prefix}{name}", with_defaults=with_defaults)
    if hint is float and isinstance(value, str) and _YAML_EXPONENT.fullmatch(value):
        value = float(value)
    if not _fits(value, hint):
        raise UnfitError(f"{prefix}{name} must be {_named(hint)}, got {value!r:.60}")
    if get_origin(hint) is tuple:
        return tuple(value)
    if hint is Path:
        return Path(value)
    return float(value) if hint is float else value  # other JSON writers than Python's write 16.0 as 16


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
    if hint is Path:
        return isinstance(value, str)
    # Not isinstance, for which True is an int.
    return type(value) in ((float, int) if hint is float else (hint,))


def _named(hint: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (Union, UnionType):
        return " or ".join(_named(one) for one in inner)
    if hint is NoneType:
        return "null"
    return str(hint) if inner else getattr(hint, "__name__", str(hint))
