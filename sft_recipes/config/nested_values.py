"""Values in nested mappings, by dotted path; what others may have written there is anything."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from sft_recipes.errors import ConfigError, one_line

MOST_BYTES, MOST_VALUES = 1 << 20, 100_000  # of a YAML file; ours have some thousand


def iterate_leaves(value: Any, path: str = "", into_lists: bool = False) -> Iterator[tuple[str, Any]]:
    """Every value in nested mappings with its dotted path, and in lists if asked.

    >>> list(iterate_leaves({"a": {"b": [1]}}, "x")), list(iterate_leaves({"a": {"b": [1]}}, "x", into_lists=True))
    ([('x.a.b', [1])], [('x.a.b[0]', 1)])
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from iterate_leaves(item, f"{path}.{key}" if path else str(key), into_lists)
    elif into_lists and isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from iterate_leaves(item, f"{path}[{place}]", into_lists)
    else:
        yield path, value


def load_yaml(path: Path) -> Any:
    """What a YAML file holds, read as Hydra does: 1e-5 is a number, and no key stands twice.

    Raises ConfigError also for a file that aliases of aliases expand to billions of values.
    """
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise ValueError(f"it has {size:,} bytes, and a config has a few thousand")
        waiting = [value := yaml.safe_load(path.read_text(encoding="utf-8"))]
        for _ in range(MOST_VALUES):
            if not waiting:  # else OmegaConf would not come to an end
                return OmegaConf.to_container(OmegaConf.load(path)) if isinstance(value, dict | list) else value
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
