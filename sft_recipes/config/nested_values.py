"""Values in nested mappings, by dotted path; what others may have written there is anything."""

import math
from collections.abc import Iterator, Mapping
from typing import Any


def iterate_leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in nested mappings with its dotted path.

    >>> list(iterate_leaves({"a": {"b": 1}}, "x"))
    [('x.a.b', 1)]
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from iterate_leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def as_mapping(value: Any) -> dict[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def get_path(values: Any, path: str) -> Any:
    """The value at a dotted path, or None.

    >>> get_path({"a": {"b": 1}}, "a.b"), get_path({"a": 1}, "a.b")
    (1, None)
    """
    for key in path.split("."):
        values = as_mapping(values).get(key)
    return values


def get_number(values: Any, path: str) -> float | None:
    """The number at a dotted path, or None where there is none or it is not finite."""
    return finite_number(get_path(values, path))


def finite_number(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None
