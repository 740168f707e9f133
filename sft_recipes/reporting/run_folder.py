"""What a finished run left in its folder, read without torch."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sft_recipes.errors import ConfigError


@dataclass(frozen=True)
class RunFiles:
    """One run's files; what a run has not written is empty."""

    folder: Path
    metrics: dict[str, Any]
    supervision: dict[str, Any]
    config: dict[str, Any]  # resolved where the run says so
    config_text: str
    overrides: list[str]
    answers: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The config's name and the folder's, which is a date."""
        folder = self.folder.resolve()
        return f"{self.metrics.get('name') or self.config.get('name') or folder.parent.name} · {folder.name}"


def read_run(folder: Path) -> RunFiles:
    """The run in this folder; raises ConfigError where none has finished there."""
    if not (folder / "metrics.json").is_file():
        if (folder / "error.txt").is_file():
            reason = (folder / "error.txt").read_text(encoding="utf-8", errors="replace").strip()
            raise ConfigError(f"{folder} is not the folder of a finished run: it failed. {reason}")
        why = "the run has not finished" if (folder / ".hydra").is_dir() else "it has no metrics.json"
        raise ConfigError(f"{folder} is not the folder of a finished run: {why}.")
    supervision = read_json(folder / "supervision.json")
    text = (folder / ".hydra" / "config.yaml").read_text("utf-8") if (folder / ".hydra/config.yaml").is_file() else ""
    return RunFiles(
        folder=folder,
        metrics=read_json(folder / "metrics.json"),
        supervision=supervision,
        config=(read_yaml(folder / ".hydra" / "config.yaml") or {}) | as_mapping(supervision.get("config")),
        config_text=text,
        overrides=[str(override) for override in read_yaml(folder / ".hydra" / "overrides.yaml") or []],
        answers=read_jsonl(folder / "answers.jsonl"),
        samples=read_jsonl(folder / "samples.jsonl"),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's mapping, empty where there is no file; raises ConfigError for what is none."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} should hold a mapping, not {type(values).__name__}.")
    return values


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file, none where there is no file; raises ConfigError for a line that is none."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n") if path.is_file() else [], start=1):
        if line.strip():
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{path}, line {number}, cannot be read as a row: {error}.") from error
    return rows


def read_yaml(path: Path) -> Any:
    """A YAML file's value, None where there is no file; raises ConfigError for what is no YAML."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} cannot be read as YAML.") from error


def as_mapping(value: Any) -> dict[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def get_path(values: Any, path: str) -> Any:
    """What stands under a dotted path, or None.

    >>> get_path({"a": {"b": 1}}, "a.b"), get_path({"a": 1}, "a.b")
    (1, None)
    """
    for key in path.split("."):
        values = as_mapping(values).get(key)
    return values


def get_number(values: Any, path: str) -> float | None:
    """The number under a dotted path, or None where there is none or it is not finite."""
    return finite_number(get_path(values, path))


def finite_number(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return value if real and math.isfinite(value) else None


def iterate_leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in a nest of mappings with its dotted path.

    >>> list(iterate_leaves({"a": {"b": 1}}, "x"))
    [('x.a.b', 1)]
    """
    if isinstance(value, dict):
        for key, item in value.items():
            yield from iterate_leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes metrics.json or supervision.json, from which every table and plot can be made again."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_jsonl(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Writes a .jsonl file."""
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
