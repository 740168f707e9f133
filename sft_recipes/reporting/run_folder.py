"""The files of a finished run, read without torch."""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft_recipes.config.nested_values import as_mapping, load_yaml
from sft_recipes.errors import ConfigError, mask_secrets, one_line

MOST_BYTES = 1 << 28  # of metrics.json, answers.jsonl and the like


@dataclass(frozen=True)
class RunFiles:
    """One run's files; what the run did not write is empty."""

    folder: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    supervision: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)  # resolved, where the run has supervision.json
    config_text: str = ""
    overrides: list[str] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The config's name and that of the folder, which is a date."""
        folder = self.folder.resolve()
        return f"{self.metrics.get('name') or self.config.get('name') or folder.parent.name} · {folder.name}"


def read_run(folder: Path) -> RunFiles:
    """The run in this folder; raises ConfigError where none has finished."""
    if not (folder / "metrics.json").is_file():
        why = "the run has not finished" if (folder / ".hydra").is_dir() else "it has no metrics.json"
        if (folder / "error.txt").is_file():
            why = f"it failed: {(folder / 'error.txt').read_text(encoding='utf-8', errors='replace').strip()}"
        raise ConfigError(f"{folder} is not the folder of a finished run: {why.removesuffix('.')}.")
    supervision, config = read_json(folder / "supervision.json"), folder / ".hydra" / "config.yaml"
    return RunFiles(
        folder=folder,
        metrics=read_json(folder / "metrics.json"),
        supervision=supervision,
        config=(read_yaml(config) or {}) | as_mapping(supervision.get("config")),
        config_text=config.read_text(encoding="utf-8") if config.is_file() else "",
        overrides=[str(override) for override in read_yaml(folder / ".hydra" / "overrides.yaml") or []],
        answers=read_jsonl(folder / "answers.jsonl"),
        samples=read_jsonl(folder / "samples.jsonl"),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object, empty where there is no file; raises ConfigError for anything else."""
    values = parse_file(path, json.loads, "JSON")
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"{path} should hold an object, not {type(values).__name__}.")
    return values or {}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file, none where there is no file; raises ConfigError for a line that is no object."""
    rows = parse_file(path, lambda text: [json.loads(line) for line in text.split("\n") if line.strip()], "JSON lines")
    if not all(isinstance(row, dict) for row in rows or []):
        raise ConfigError(f"{path} should hold an object a line.")
    return rows or []


def read_yaml(path: Path) -> Any:
    """A YAML file's value, None where there is no file; raises ConfigError where it is no YAML."""
    return load_yaml(path) if path.is_file() else None


def parse_file(path: Path, parse: Callable[[str], Any], kind: str) -> Any:
    """The parsed file, None where there is no file; raises ConfigError where it cannot be parsed."""
    try:
        if path.is_file() and (size := path.stat().st_size) > MOST_BYTES:
            raise ValueError(f"it has {size:,} bytes, more than a run writes")
        return parse(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as {kind}: {one_line(error)}.") from error


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes metrics.json or supervision.json, from which every table and figure can be made again, without secrets."""
    replace_file(path, mask_secrets(json.dumps(values, indent=2, ensure_ascii=False)) + "\n")


def write_jsonl(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Writes a .jsonl file."""
    replace_file(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes the file whole or not at all, and in the place of a link, never through it."""
    # A folder from elsewhere can hold metrics.json as a link to a file of the user's, through which open() would write;
    # and a report that is cut off half way should not take the last whole one with it
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("xb") as file:  # x opens nothing that is there
            file.write(content.encode() if isinstance(content, str) else content)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
