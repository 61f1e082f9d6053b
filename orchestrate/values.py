"""Text and plain values → the types of a recipe's fields."""

from __future__ import annotations

import contextlib
import json
import math
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin

Scalar = int | float | str | bool


def coerce(value: Any, hint: Any, path: str) -> Any:
    """Text or a plain value → the field's type. ValueError names the path, the value and what would fit."""
    if get_origin(hint) is Literal:
        options = get_args(hint)
        for option in options:
            if value == option or str(value) == str(option):
                return option
        raise ValueError(f"{path}={value!r}: choose one of {', '.join(map(str, options))}.")
    if get_origin(hint) in (Union, types.UnionType):
        return _number(value, path) if set(get_args(hint)) == {int, float} else _first(value, get_args(hint), path)
    if get_origin(hint) is tuple:
        inner = get_args(hint)[0]
        return tuple(coerce(v, inner, path) for v in _items(value, path))
    return _scalar(value, hint, path)


def _scalar(value: Any, hint: Any, path: str) -> Any:
    text = value if isinstance(value, str) else json.dumps(value)
    try:
        if hint is bool:
            return {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}[text.lower()]
        if hint is int:
            with contextlib.suppress(ValueError):
                return int(text)  # all digits of a large seed
            if (number := float(text)) == int(number):
                return int(number)
        if hint is float and math.isfinite(number := float(text)):
            return number
        if hint is str and isinstance(value, Scalar):
            return text
    except (KeyError, ValueError, OverflowError):
        pass
    kind = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(hint, str(hint))
    more = " (one value, not a list)" if "," in text else ""
    raise ValueError(f"{path}={value!r}: {kind} is wanted{more}.")


def _number(value: Any, path: str) -> int | float:
    """A count (int) or a share (float): '30' → 30, '0.02' → 0.02, '1e4' → 10000; '1' is one, '1.0' the whole."""
    number = float(_scalar(value, float, path))
    whole = number == 1 and "." in str(value)
    return int(number) if number == int(number) and not whole else number


def _first(value: Any, hints: Sequence[Any], path: str) -> Any:
    if value in (None, "none") and type(None) in hints:
        return None
    errors = []
    for hint in hints:
        if hint is not type(None):
            try:
                return coerce(value, hint, path)
            except ValueError as error:
                errors.append(str(error))
    raise ValueError(errors[0])


def _items(value: Any, path: str) -> list[Any]:
    if not isinstance(value, str):
        return list(value) if isinstance(value, (list, tuple)) else [value]
    if value.startswith("["):
        try:
            return list(json.loads(value))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path}={value!r} is no JSON list: {error}.") from None
    return [item.strip() for item in value.split(",") if item.strip()] if value != "none" else []
