"""Values in nested mappings, by dotted path; what others may have written there is anything."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from sft_recipes.errors import ConfigError, one_line

MOST_BYTES, MOST_VALUES = 1 << 20, 100_000  # of a YAML file; ours have some thousand


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


def load_yaml(path: Path) -> Any:
    """What a YAML file holds; raises ConfigError also for one that aliases of aliases expand to billions of values."""
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise ValueError(f"it has {size:,} bytes, and a config has a few thousand")
        waiting = [value := yaml.safe_load(path.read_text(encoding="utf-8"))]
        for _ in range(MOST_VALUES):
            if not waiting:
                return value
            part = waiting.pop()
            waiting += part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
        raise ValueError(f"it expands to more than {MOST_VALUES:,} values")
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{path.absolute()}, line {error.problem_mark.line + 1}: {error.problem}.") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {one_line(error)}.") from error


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
    return value if is_number and abs(value) <= sys.float_info.max else None  # a whole number may be larger
