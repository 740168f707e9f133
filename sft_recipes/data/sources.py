"""Where rows come from: `datasets.load_dataset`, one formatter a source, and a line for what is wrong with them."""

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from sft_recipes.config.options import Source
from sft_recipes.config.schema import Config
from sft_recipes.config.validation import import_function, validate_kwargs
from sft_recipes.data.detection import describe_choice, detect_formatter
from sft_recipes.data.formatters import FORMATTERS, Conversation
from sft_recipes.errors import ConfigError, DataError, did_you_mean, one_line

log = logging.getLogger(__name__)
FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}


def check_readers(config: Config) -> None:
    """Raises ConfigError for a source without path and files, and for a formatter that does not exist."""
    for name, source in config.sources.items():
        if source.path is None:
            find_builder(name, source.data_files)
        find_formatter(name, source, config.formatter, None)


def load_rows(name: str, source: Source, split: str) -> Dataset | IterableDataset:
    """One split of a source, a stream where it is streamed; raises ConfigError where it is not to be had."""
    path, files = source.path, source.data_files
    if path is None:
        path = find_builder(name, files)
    arguments = {"name": source.name, "data_files": files, "data_dir": source.data_dir, "revision": source.revision}
    arguments |= {"streaming": True} if source.streaming else {}
    try:
        return load_dataset(path, split=split, **{key: value for key, value in arguments.items() if value is not None})
    except DatasetGenerationError as error:
        why = find_broken_line(files) or one_line(error.__cause__ or error)[:300]
        raise DataError(f"data.{name}: {files or path} cannot be read: {why}.") from error
    except StopIteration as error:
        raise DataError(f"data.{name}: {files or path} has no rows.") from error
    except (FileNotFoundError, ConnectionError) as error:
        raise ConfigError(
            f"data.{name}: {files or path} is not here and could not be downloaded. Offline, give your own rows: "
            f"data=file data.file.data_files=rows.jsonl. ({one_line(error)[:160]})"
        ) from error
    except ValueError as error:
        raise ConfigError(f"data.{name}: {one_line(error)[:300]}") from error


def find_broken_line(files: Any) -> str:
    """Which line of a .jsonl file is not JSON, or ''."""
    if isinstance(files, str) and files.endswith(".jsonl") and Path(files).is_file():
        with open(files, encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    json.loads(line) if line.strip() else None
                except ValueError as error:
                    return f"line {number} is not JSON ({error})"
    return ""


def find_builder(name: str, files: str | list | dict | None) -> str:
    """The `datasets` builder for files by their ending."""
    first = files
    while isinstance(first, list | dict):
        first = next(iter(first.values() if isinstance(first, dict) else first), None)
    if first is None:
        raise ConfigError(f"data.{name} names neither path nor data_files. Write data.{name}.data_files=rows.jsonl.")
    ending = Path(str(first).removesuffix(".gz")).suffix
    if ending not in FILE_BUILDERS:
        raise ConfigError(
            f"data.{name}.data_files={first} should end with {', '.join(FILE_BUILDERS)}; or give data.{name}.path."
        )
    return FILE_BUILDERS[ending]


def find_formatter(
    name: str, source: Source, root: Mapping[str, Any], columns: Sequence[str] | None
) -> Callable[[Mapping[str, Any]], Conversation] | None:
    """The source's formatter, else the root choice, with its column names bound; `auto` goes by the columns.

    Before the columns are known this checks the choice, and `auto` is None.
    """
    where = f"data.{name}.formatter" if source.formatter else "formatter"
    chosen = source.formatter or root
    chosen = {"name": chosen} if isinstance(chosen, str) else dict(chosen)
    label = chosen.pop("name", "auto")
    if label == "auto" and columns is None:
        return None
    if label == "auto":
        try:
            chosen = detect_formatter(columns) | chosen
        except DataError as error:
            raise DataError(f"data.{name}: {error}") from error
        log.info("data.%s: formatter %s, by its columns %s", name, describe_choice(chosen), ", ".join(columns))
        label = chosen.pop("name")
    if "." in label:
        return wrap_custom_formatter(where, label, chosen)
    if label not in FORMATTERS:
        raise ConfigError(f"{where}={label} is no formatter.{did_you_mean(label, [*FORMATTERS, 'auto'])}")
    validate_kwargs(FORMATTERS[label], chosen, where)
    return partial(FORMATTERS[label], **chosen)


def wrap_custom_formatter(
    where: str, label: str, columns: Mapping[str, Any]
) -> Callable[[Mapping[str, Any]], Conversation]:
    """A user's `module.function`; what it returns is checked as if it were a row of messages or text."""
    own = import_function(where, label)
    validate_kwargs(own, {next(iter(inspect.signature(own).parameters), "row"): {}, **columns}, where)

    def formatter(row: Mapping[str, Any]) -> Conversation:
        conversation = own(row, **columns)
        if not isinstance(conversation, Mapping) or not {"messages", "text"} & set(conversation):
            raise DataError(f"{label} should return messages or text, not {conversation!r:.80}.")
        return FORMATTERS["chatml" if "messages" in conversation else "text"](conversation)

    return formatter


def source_fingerprint(source: Source, rows: Dataset | IterableDataset) -> str:
    """What tells two versions of a source apart: its one local file's SHA-256, else the fingerprint of `datasets`.

    A stream has none: there it is what was asked for.
    """
    files = source.data_files
    if isinstance(files, str) and Path(files).is_file():
        with open(files, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return f"{source.path}@{source.revision or 'main'}" if source.streaming else rows._fingerprint


def locate_row(name: str, source: Source, number: int) -> str:
    """Where a row stands, for an error: its index, and in a .jsonl file its line."""
    files = source.data_files
    if isinstance(files, str) and files.endswith(".jsonl") and Path(files).is_file():
        with open(files, encoding="utf-8") as lines:
            filled = (line for line, text in enumerate(lines, start=1) if text.strip())
            line = next((line for row, line in enumerate(filled) if row == number), None)
        return f"data.{name} row {number} ({files}, line {line})"
    return f"data.{name} row {number}"
