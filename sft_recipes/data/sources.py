"""Where rows come from: local files as they are written, all else through `datasets`; and one formatter a source."""

import hashlib
import inspect
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path
from traceback import extract_tb
from typing import Any

import datasets.config
from datasets import ReadInstruction, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError

from sft_recipes.config.options import Source
from sft_recipes.config.schema import Config
from sft_recipes.config.validation import call_validated, import_function, validate_kwargs
from sft_recipes.data.detection import describe_choice, detect_formatter
from sft_recipes.data.digest import hash_file
from sft_recipes.data.formatters import FORMATTERS, USUAL, Conversation
from sft_recipes.data.raw_rows import ArrowRows, FileRows, Record, arrow_row
from sft_recipes.data.reading import KINDS, Row, read_file
from sft_recipes.errors import ConfigError, DataError, did_you_mean, one_line

log = logging.getLogger(__name__)
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # or it tells a server of every source, one's own files too
BUILDERS = KINDS | {".parquet": "parquet"}  # of `datasets`, by a file's ending
LOADING = ("name", "data_files", "data_dir", "revision", "field", "sep")  # what load_dataset is told where it is set


def check_readers(config: Config) -> None:
    """Raises ConfigError for a source without path and files, and for a formatter that does not exist."""
    for name, source in config.sources.items():
        loading_arguments(f"data.{name}", source)
        find_formatter(name, source, config.formatter, None)


def load_rows(where: str, source: Source, split: str) -> FileRows | ArrowRows:
    """The rows of a split, which may be one of datasets' slices; `where` is the source's place in the config.

    Raises ConfigError where they are not to be had, DataError where they cannot be read.
    """
    with explained_errors(where, source):
        files = find_files(where, source)
        if files is None:
            return ArrowRows(load_dataset(**loading_arguments(where, source), split=split))
        split = "+".join(files) if split == "all" else split
        names, rows = dict.fromkeys(part.partition("[")[0].strip() for part in split.split("+")), FileRows()
        counts = {name: rows.extend(read_split(where, source, files, name)) for name in names}
        starts = dict(zip(counts, accumulate(counts.values(), initial=0), strict=False))
        parts = ReadInstruction.from_spec(split).to_absolute(counts)
        rows = rows.select([starts[part.splitname] + place for part in parts for place in range(part.from_, part.to)])
    if not len(rows):
        raise DataError(f"{where}: {source.data_files or source.path} has no rows.")
    return rows


def stream_rows(where: str, source: Source, split: str) -> Iterator[Record]:
    """The rows of a whole split one after another, while they are read; errors as in `load_rows`."""
    number = None
    with explained_errors(where, source):
        files = find_files(where, source)
        if files is None:
            dataset = load_dataset(**loading_arguments(where, source), split=split, streaming=True)
            records = ((arrow_row(row), "", 0) for row in dataset)
        else:
            names = files if split == "all" else map(str.strip, split.split("+"))
            records = (record for name in names for record in read_split(where, source, files, name))
        for number, (row, path, line) in enumerate(records):
            yield number, row, f"{path}, line {line}" if path else ""
    if number is None:
        raise DataError(f"{where}: {source.data_files or source.path} has no rows.")


@contextmanager
def explained_errors(where: str, source: Source) -> Iterator[None]:
    """What goes wrong while a source is read becomes one line."""
    asked = source.data_files or source.path
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except DatasetGenerationError as error:
        raise DataError(f"{where}: {asked} cannot be read: {one_line(error.__cause__ or error)[:300]}.") from error
    except OSError as error:
        of_system = error.errno and not isinstance(error, ConnectionError)  # of the cache that `datasets` keeps
        if of_system or not isinstance(error, FileNotFoundError | ConnectionError):
            place = " HF_HOME names the folder for downloads and caches." if of_system else ""
            raise ConfigError(f"{where}: {one_line(error).rstrip('.')}.{place}") from error
        if source.path in (None, *BUILDERS.values()) and "://" not in str(asked):
            which = "" if isinstance(asked, str) else f" {one_line(error)[:160]}."
            raise ConfigError(f"{where}.data_files={asked}: there is no such file.{which}") from error
        own = "give your own rows: data=file data.file.data_files=rows.jsonl"
        raise ConfigError(
            f"{where}: {source.path or asked} is not here and could not be downloaded. "
            f"Offline, {own if where.startswith('data.') else 'name a file'}. ({one_line(error)[:160]})"
        ) from error
    except ConfigError:  # a ValueError, too, and one line already
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {one_line(error)[:300]}") from error
    except TypeError as error:
        if not (found := re.search(r"unexpected keyword argument '(\w+)'", str(error))):
            raise
        raise ConfigError(f"{where}.{found[1]} is no option for such files. Leave it out.") from error


def find_files(where: str, source: Source) -> dict[str, list[str]] | None:
    """By split the local files that are read here; None for what `datasets` reads."""
    arguments = loading_arguments(where, source)
    if arguments["path"] not in KINDS.values() and not Path(arguments["path"]).is_dir():
        return None
    builder = load_dataset_builder(**arguments)  # reads nothing, but knows patterns, folders and splits
    files = {str(split): list(map(str, paths)) for split, paths in builder.config.data_files.items()}
    ours = builder.name in KINDS.values() and all(Path(path).is_file() for paths in files.values() for path in paths)
    return files if ours else None


def read_split(where: str, source: Source, files: Mapping[str, list[str]], name: str) -> Iterator[tuple[Row, str, int]]:
    """What the files of one split hold: rows and faults, each with its file and line."""
    if name not in files:
        raise ConfigError(f"{where}: there is no split {name!r} in its files.{did_you_mean(name, files)}")
    for path in files[name]:
        kind = source.path if source.path in KINDS.values() else KINDS.get(find_ending(path))
        if kind is None:
            raise ConfigError(f"{where}: {path} should end with {', '.join(KINDS)}, as its other files.")
        sep = source.sep and source.sep.replace("\\t", "\t")
        for row, line in read_file(path, kind, source.field, sep, source.encoding):
            yield row, path, line


def loading_arguments(where: str, source: Source) -> dict[str, Any]:
    """What `load_dataset` is told; raises ConfigError where neither path nor files tell how the source is read."""
    asked = {key: value for key in LOADING if (value := getattr(source, key)) is not None}
    asked |= {"encoding": source.encoding} if source.encoding != "utf-8" else {}
    if source.path is not None:
        return {"path": source.path} | asked
    first = source.data_files
    while isinstance(first, list | dict):
        first = next(iter(first.values() if isinstance(first, dict) else first), None)
    if not first:
        raise ConfigError(f"{where} names neither path nor data_files. Write {where}.data_files=rows.jsonl.")
    if find_ending(first) not in BUILDERS:
        if Path(first).is_dir():
            ending = min(BUILDERS.keys() & map(find_ending, Path(first).iterdir()), default=".jsonl")
            raise ConfigError(f"{where}.data_files={first} is a folder. Write {where}.data_files='{first}/*{ending}'.")
        raise ConfigError(f"{where}.data_files={first} should end with {', '.join(BUILDERS)}; or give {where}.path.")
    return {"path": BUILDERS[find_ending(first)]} | asked


def asked_source(where: str, asked: str | Mapping[str, Any]) -> Source:
    """The source that a mapping with its keys describes, or a text: a file, or the name of a dataset or folder."""
    if isinstance(asked, str):
        asked = {"data_files" if find_ending(asked) in BUILDERS else "path": asked}
    return call_validated(Source, asked, where)


def find_ending(path: str) -> str:
    """The ending that tells how a file is read, below that of a packed one.

    >>> find_ending("rows.jsonl.gz")
    '.jsonl'
    """
    return Path(str(path).removesuffix(".gz").removesuffix(".zst")).suffix


def find_formatter(
    name: str, source: Source, root: Mapping[str, Any], columns: Collection[str] | None, level: int = logging.INFO
) -> Callable[[Mapping[str, Any]], Conversation] | None:
    """The source's formatter, else the root choice, its columns bound; `auto` goes by the columns, logged at `level`.

    Before the columns are known, and where no row has any, this checks the choice and returns None.
    """
    where, chosen = (f"data.{name}.formatter", source.formatter) if source.formatter else ("formatter", root)
    chosen = {"name": chosen} if isinstance(chosen, str) else dict(chosen)
    label = chosen.pop("name", "auto")
    if label == "auto" and columns:
        try:
            chosen = detect_formatter(columns) | chosen
        except DataError as error:
            raise DataError(f"data.{name}: {error}") from error
        log.log(level, "data.%s: formatter %s, by its columns %s", name, describe_choice(chosen), ", ".join(columns))
        label = chosen.pop("name")
    own = "." in label
    function = import_function(where, label) if own else FORMATTERS.get(label)
    if function is None and label != "auto":
        raise ConfigError(f"{where}={label} is no formatter.{did_you_mean(label, [*FORMATTERS, 'auto'])}")
    if function:
        row = {next(iter(inspect.signature(function).parameters), "row"): {}} if own else {}
        validate_kwargs(function, row | chosen, where)
    if not columns:
        return None
    beside = {"messages": "messages"} if label == "chatml" and "text" in columns else {}  # raw text only beside these
    later = USUAL if source.streaming else ()  # what rows may lack, and rows of a stream that are not read yet may have
    missing = [column for key, column in (beside | chosen).items() if column not in columns and key not in later]
    if missing and not own:
        raise DataError(f"data.{name}: formatter {label} needs {missing[0]!r}, the rows have {', '.join(columns)}.")
    formatter = SourceFormatter(function, **chosen)
    formatter.label, formatter.nulls = label, dict.fromkeys(columns if own else chosen.values())
    formatter.own = partial(function, **chosen) if own else None  # for RowFields, to see what it reads
    return formatter


class SourceFormatter(partial):
    """A formatter with the names of its columns; of a row that lacks one of them, it is null.

    What a user's own `module.function` returns is checked as if it were a row of messages or text. Whatever goes wrong
    with a row becomes a DataError.
    """

    def __call__(self, row: Mapping[str, Any]) -> Conversation:
        try:
            conversation = super().__call__(type(row)(self.nulls | row) if self.nulls else row)
            if not self.own:
                return conversation
            if not isinstance(conversation, Mapping) or not {"messages", "text"} & set(conversation):
                raise DataError(f"{self.label} should return messages or text, not {conversation!r:.80}.")
            return FORMATTERS["chatml" if "messages" in conversation else "text"](conversation)
        except DataError:
            raise
        except Exception as error:  # of a row that nobody thought of, or of a user's own code
            place = extract_tb(error.__traceback__)[-1]
            fault = f"{type(error).__name__}: {one_line(error)} ({Path(place.filename).name}, line {place.lineno})"
            raise DataError(f"{self.label} cannot read it: {fault}.") from error


def source_fingerprint(where: str, source: Source, rows: FileRows | ArrowRows | None) -> str:
    """What tells two versions of a source apart: its local files' SHA-256, else the fingerprint of `datasets`.

    A stream of no local files (`rows` is None) has none: there it is what was asked for.
    """
    files = find_files(where, source)
    if files is None:
        return rows.dataset._fingerprint if rows else f"{source.path}@{source.revision or 'main'}"
    digests = [hash_file(path) for path in sum(files.values(), [])]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def source_version(where: str, source: Source) -> list[Any]:
    """What tells two versions of a source apart before it is read: its local files by split with their SHA-256, else
    where `datasets` keeps what it makes of it, named by commit, ETag or time of change. Errors as in `load_rows`.
    """
    with explained_errors(where, source):
        if files := find_files(where, source):
            return [files, source_fingerprint(where, source, None)]
        return [load_dataset_builder(**loading_arguments(where, source)).cache_dir, source.revision]
