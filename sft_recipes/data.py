"""Sources become what the trainer gets, token ids and labels: load, hold out, format, encode, mix, pack."""

import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError
from tqdm.auto import tqdm

from sft_recipes.binding import ConfigError, call, check, did_you_mean, one_line
from sft_recipes.config import Config
from sft_recipes.encoding import Encoder
from sft_recipes.formatters import FORMATTERS, Conversation, DataError, auto
from sft_recipes.rows import flat_values, mix, shorten, shuffled, table, token_counts
from sft_recipes.supervision import Policy, check_parity, enforce, mark_repeats, problems_of

log = logging.getLogger(__name__)
BATCH = 1000  # rows that are formatted and encoded at once
PARITY_ROWS = 50  # rows a source whose prompts are compared with what serving would show
SMOKE_ROWS = 200  # rows a source gives under +debug=smoke
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class Source:
    """One entry of `data`: what `datasets.load_dataset` is asked for, and what becomes of the rows."""

    path: str | None = None  # hub id, folder or builder; found from data_files' ending where it is not given
    name: str | None = None
    data_files: str | list | dict | None = None
    data_dir: str | None = None
    revision: str | None = None
    split: str = "train"
    held_out_split: str | None = None  # held out are the rows of this split, rather than some of `split`
    formatter: str | dict | None = None  # a name, or {name: alpaca, output: response}; None takes the root choice
    share: float | None = None  # of the mixture's rows; a source without one gives all it has
    supervise: Literal["assistant", "last", "all"] = "assistant"


@dataclass(frozen=True)
class Options:
    """The entries of `data` that hold for all sources."""

    held_out: float = 0.02  # a share below 1, or a number of rows, of each source
    max_length_policy: Literal["auto", "drop", "keep", "raise"] = "auto"


@dataclass(frozen=True)
class Data:
    """What a run trains on and is asked: columns `input_ids`, `labels`, `source` (its index) and `row` (its number)."""

    train: Dataset
    held_out: Dataset
    questions: list[Conversation]  # the held-out conversations
    ledger: dict[str, dict]  # by source: rows, held_out, kept, tokens, supervised_tokens, problems


def load(config: Config, encoder: Encoder, max_length: int | None) -> Data:
    """The rows to train on, in an order drawn with the run's seed, those that are held out, and the ledger of both.

    Raises DataError, naming source, row and field, for a row that cannot be trained on, and ConfigError where the saved
    tokenizer would serve another prompt than the one trained on.
    """
    found = sources(config)
    options = call(Options, {key: value for key, value in config.data.items() if key not in found}, "data")
    policy = call(Policy, config.supervision, "supervision")
    cutting = "keep" if config.smoke else options.max_length_policy
    parts = {name: read(name, options, config, encoder) for name in found}
    held_out = concatenate_datasets([part.held_out for part in parts.values()])
    train = mark_repeats(concatenate_datasets([part.train for part in parts.values()]), held_out)
    kept, ledger = {}, {}
    for index, (name, part) in enumerate(parts.items()):
        mine = train.select(np.flatnonzero(flat_values(train, "source") == index))
        mine, problems = enforce(name, mine, policy)
        kept[name], cut = shorten(name, mine, max_length, cutting)
        ledger[name] = {"rows": len(part.train), "held_out": len(part.held_out), "problems": problems | cut}
    kept = mix(kept, {name: source.share for name, source in found.items()}, config.seed)
    for name, rows in kept.items():
        ledger[name] |= {"kept": len(rows)} | token_counts(rows)
    train = shuffled(concatenate_datasets(list(kept.values())), config.seed)
    if not len(train):
        raise DataError("data: no row is left to train on.")
    questions = [question for part in parts.values() for question in part.questions]
    return Data(
        train, shorten("held_out", held_out, max_length, "keep" if cutting == "keep" else "drop")[0], questions, ledger
    )


def sources(config: Config) -> dict[str, Source]:
    """The config's sources by name, checked, together with the root formatter."""
    found = {
        name: call(Source, value, f"data.{name}") for name, value in config.data.items() if isinstance(value, dict)
    }
    if not found:
        raise ConfigError("data names no source. Write data=NAME, or data=file data.file.data_files=rows.jsonl.")
    label = config.formatter.get("name", "auto")
    if config.formatter != {"name": "auto"} and all(source.formatter for source in found.values()):
        raise ConfigError(f"formatter={label} is used by no source: {', '.join(found)} have their own.")
    for name, source in found.items():
        if source.path is None:
            builder(name, source.data_files)
        find_formatter(name, source, config.formatter, None)
    return found


def read(name: str, options: Options, config: Config, encoder: Encoder) -> Data:
    """One source from its files to token ids, its held-out rows set apart before anything else touches them."""
    source = sources(config)[name]
    rows = load_rows(name, source, source.split)
    if config.smoke:
        rows = rows.select(range(min(len(rows), SMOKE_ROWS)))
    formatter = find_formatter(name, source, config.formatter, rows.column_names)
    out = [] if source.held_out_split else held_out_rows(len(rows), options.held_out, config.seed)
    out_rows = load_rows(name, source, source.held_out_split) if source.held_out_split else rows
    numbers = range(len(out_rows)) if source.held_out_split else out
    train, trained = encode(name, config, formatter, encoder, rows, np.setdiff1d(np.arange(len(rows)), out))
    held_out, questions = encode(name, config, formatter, encoder, out_rows, numbers)
    check_parity(encoder, trained[:: max(1, len(trained) // PARITY_ROWS)])
    return Data(train, held_out, [question for question in questions if "messages" in question], {})


def load_rows(name: str, source: Source, split: str) -> Dataset:
    """One split of a source; raises ConfigError in one line where it is not to be had."""
    path, files = source.path, source.data_files
    if path is None:
        path = builder(name, files)
    arguments = {"name": source.name, "data_files": files, "data_dir": source.data_dir, "revision": source.revision}
    try:
        return load_dataset(path, split=split, **{key: value for key, value in arguments.items() if value is not None})
    except DatasetGenerationError as error:
        why = broken_line(files) or one_line(error.__cause__ or error)[:300]
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


def broken_line(files: Any) -> str:
    """Which line of a .jsonl file is not JSON, or ''."""
    if isinstance(files, str) and files.endswith(".jsonl") and Path(files).is_file():
        with open(files, encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    json.loads(line or "0") if line.strip() else None
                except ValueError as error:
                    return f"line {number} is not JSON ({error})"
    return ""


def builder(name: str, files: str | list | dict | None) -> str:
    """The `datasets` builder for files by their ending."""
    first = files
    while isinstance(first, list | dict):
        first = next(iter(first.values() if isinstance(first, dict) else first), None)
    if first is None:
        raise ConfigError(f"data.{name} names neither path nor data_files. Write data.{name}.data_files=rows.jsonl.")
    ending = Path(str(first).removesuffix(".gz")).suffix
    if ending not in BUILDERS:
        raise ConfigError(
            f"data.{name}.data_files={first} should end with {', '.join(BUILDERS)}; or give data.{name}.path."
        )
    return BUILDERS[ending]


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
            label = auto(columns)
        except DataError as error:
            raise DataError(f"data.{name}: {error}") from error
        log.info("data.%s: formatter %s, by its columns %s", name, label, ", ".join(columns))
    if "." in label:
        return own_formatter(where, label, chosen)
    if label not in FORMATTERS:
        raise ConfigError(f"{where}={label} is no formatter.{did_you_mean(label, [*FORMATTERS, 'auto'])}")
    check(FORMATTERS[label], chosen, where)
    return partial(FORMATTERS[label], **chosen)


def own_formatter(where: str, label: str, columns: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Conversation]:
    """A user's `module.function`; what it returns is checked as if it were a row of messages or text."""
    module, _, function = label.rpartition(".")
    try:
        own = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}={label} could not be imported: {one_line(error)}.") from error
    if not callable(own):
        raise ConfigError(f"{where}={label} is not a function.")
    check(own, {next(iter(inspect.signature(own).parameters), "row"): {}, **columns}, where)

    def formatter(row: Mapping[str, Any]) -> Conversation:
        conversation = own(row, **columns)
        if not isinstance(conversation, Mapping) or not {"messages", "text"} & set(conversation):
            raise DataError(f"{label} should return messages or text, not {conversation!r:.80}.")
        return FORMATTERS["chatml" if "messages" in conversation else "text"](conversation)

    return formatter


def held_out_rows(rows: int, wanted: float, seed: int) -> np.ndarray:
    """The indices, in order, of the rows that are held out: `wanted` is a number of rows, or a share below 1."""
    number = round(rows * wanted) if wanted < 1 else int(wanted)
    if wanted > 1 and number != wanted:
        raise ConfigError(f"data.held_out should be a share below 1 or a whole number of rows, not {wanted}.")
    if not 0 <= number < max(rows, 1):
        raise ConfigError(f"data.held_out={wanted} leaves none of {rows} rows to train on.")
    return np.sort(np.random.default_rng(seed).permutation(rows)[:number])


def encode(
    name: str, config: Config, formatter: Callable, encoder: Encoder, rows: Dataset, numbers: Sequence[int]
) -> tuple[Dataset, list[Conversation]]:
    """The rows of these numbers as token ids and labels, and as conversations."""
    source, index = sources(config)[name], list(sources(config)).index(name)
    ids, labels, problems, kept = [], [], [], []
    bar = tqdm(total=len(numbers), desc=f"Encoding {name}", unit=" rows", disable=len(numbers) < 5 * BATCH)
    for start in range(0, len(numbers), BATCH):
        some = numbers[start : start + BATCH]
        columns = rows.select(some)[:]
        conversations = []
        for number, values in zip(some, zip(*columns.values(), strict=True), strict=True):
            try:
                conversations.append(formatter(dict(zip(columns, values, strict=True))))
            except DataError as error:
                raise DataError(f"{place(name, source, number)}: {error}") from error
        try:
            encoded = encoder.encode(conversations, source.supervise)
        except DataError as error:
            raise DataError(f"{place(name, source, some[error.row])}: {error}") from error
        ids += encoded["input_ids"]
        labels += encoded["labels"]
        problems.append(problems_of(encoder, conversations, encoded, source.supervise))
        kept += conversations
        bar.update(len(some))
    bar.close()
    origin = {"source": np.full(len(ids), index), "row": np.asarray(numbers, dtype=np.int64)}
    found = {"problems": np.concatenate(problems) if problems else np.zeros(0, dtype=np.int64)}
    return table({"input_ids": ids, "labels": labels}, origin | found), kept


def place(name: str, source: Source, number: int) -> str:
    """Where a row stands, for an error: its index, and in a .jsonl file its line."""
    files = source.data_files
    if isinstance(files, str) and files.endswith(".jsonl") and Path(files).is_file():
        with open(files, encoding="utf-8") as lines:
            filled = (line for line, text in enumerate(lines, start=1) if text.strip())
            line = next((line for row, line in enumerate(filled) if row == number), None)
        return f"data.{name} row {number} ({files}, line {line})"
    return f"data.{name} row {number}"
