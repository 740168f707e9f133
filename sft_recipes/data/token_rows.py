"""Rows of token ids as Datasets, and what a run is given of them."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import pyarrow
from datasets import Dataset
from datasets.config import HF_DATASETS_CACHE
from datasets.fingerprint import generate_random_fingerprint

from sft_recipes.data.formatters import Conversation
from sft_recipes.encoding.encoder import IGNORE_INDEX

log = logging.getLogger(__name__)
CHUNK_ROWS = 1000  # rows that stand together in memory or in a file
MEMORY_BYTES = 1 << 24  # of a table's newest rows, beyond which they go into a file that ends with the process
warn_once = cache(log.warning)
ORIGIN = ("source", "row", "piece", "problems")  # columns of numbers beside the tokens, see prepare.encode_rows


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on and is asked: columns `input_ids`, `labels`, and those of `encode_rows`."""

    train: Dataset
    held_out: Dataset
    questions: list[Conversation]  # the held-out conversations
    audit: dict[str, dict]  # by source: rows, held_out, kept, tokens, supervised_tokens, problems, mix
    left_out: Dataset | None = None  # rows that were read and then left out for an issue or their length
    curation: dict[str, Any] | None = None  # what curation counted, as mode=curate records it
    examples: Sequence[Conversation] = ()  # some of the rows to train on, as conversations
    packed: Dataset | None = None  # the rows to train on, packed
    digest: dict[str, Any] | None = None  # of the rows that the trainer gets


def to_dataset(
    lists: Mapping[str, Sequence[np.ndarray]],
    numbers: Mapping[str, np.ndarray] | None = None,
    texts: Mapping[str, list[str]] | None = None,
) -> Dataset:
    """Columns of int32 arrays, plain numbers and texts as a Dataset, without a detour through Python's integers."""
    columns = dict(lists) | dict(numbers or {}) | dict(texts or {})
    parts = range(0, max(1, len(next(iter(columns.values())))), CHUNK_ROWS)

    def cut(values: Mapping[str, Sequence] | None, start: int) -> dict[str, Sequence]:
        return {key: column[start : start + CHUNK_ROWS] for key, column in (values or {}).items()}

    return join_tables(to_table(*(cut(values, start) for values in (lists, numbers, texts))) for start in parts)


def to_table(
    lists: Mapping[str, Sequence[np.ndarray]], numbers: Mapping[str, Sequence], texts: Mapping[str, Sequence[str]]
) -> pyarrow.Table:
    """The columns of `to_dataset` as one table, in memory."""
    columns = {key: pyarrow.array(np.asarray(values, dtype=np.int64)) for key, values in numbers.items()}
    columns |= {key: pyarrow.array(values, pyarrow.string()) for key, values in texts.items()}
    for key, rows in lists.items():
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        values = np.concatenate(rows).astype(np.int32, copy=False) if len(rows) else np.zeros(0, dtype=np.int32)
        columns[key] = pyarrow.LargeListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(values))
    return pyarrow.table(columns)


def join_tables(tables: Iterable[pyarrow.Table]) -> Dataset:
    """The rows of all tables, of which there is one at least; many lie in files without a name, mapped into memory."""
    done: list[pyarrow.Table] = []
    waiting: list[pyarrow.Table] = []
    size = 0
    for table in tables:
        waiting.append(table)
        size += table.nbytes
        if size > MEMORY_BYTES:
            done, waiting, size = [*done, move_to_disk(waiting)], [], 0
    # its own fingerprint would be a hash of all that is in the tables
    return Dataset(pyarrow.concat_tables([*done, *waiting]), fingerprint=generate_random_fingerprint())


def move_to_disk(tables: Sequence[pyarrow.Table]) -> pyarrow.Table:
    """The tables one after another, mapped from a file that ends with the process; in memory where the disk is full."""
    try:
        Path(HF_DATASETS_CACHE).mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=HF_DATASETS_CACHE) as file:
            write_tables(file.name, tables)
            return pyarrow.ipc.open_stream(pyarrow.memory_map(file.name)).read_all()
    except OSError as error:
        warn_once("Rows stay in memory, since %s takes no file of them: %s.", HF_DATASETS_CACHE, error.strerror)
        return pyarrow.concat_tables(tables)


def write_tables(path: str | Path, tables: Sequence[pyarrow.Table]) -> None:
    """Writes an Arrow file as `Dataset.from_file` reads it."""
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)


def take_rows(rows: Dataset, places: np.ndarray) -> Dataset:
    """The rows at these places, one after another: `Dataset.select` leaves them to be gathered one by one."""
    lists = [key for key in rows.column_names if key in ("input_ids", "labels")]
    arrays = {key: row_arrays(rows, key) for key in lists}
    numbers = {key: flat_values(rows, key)[places] for key in rows.column_names if key not in lists}
    return to_dataset({key: [array[place] for place in places] for key, array in arrays.items()}, numbers)


def arrow_column(rows: Dataset, column: str) -> pyarrow.ChunkedArray:
    """A column in its pieces, as they lie in memory or in a file; `with_format` copies all that describes a dataset."""
    return (rows.data.table if rows._indices is None else rows.with_format("arrow")[:])[column]


def row_lengths(rows: Dataset, column: str = "input_ids") -> np.ndarray:
    """The number of entries that every row has in a column, its tokens unless another one is named."""
    lengths = [chunk.value_lengths().to_numpy() for chunk in arrow_column(rows, column).chunks]
    return np.concatenate([np.zeros(0, dtype=np.int64), *lengths])


def flat_values(rows: Dataset, column: str) -> np.ndarray:
    """A column's values, all rows one after another."""
    values = arrow_column(rows, column).combine_chunks()
    return (values.flatten() if hasattr(values, "value_lengths") else values).to_numpy()


def row_arrays(rows: Dataset, column: str) -> list[np.ndarray]:
    """A column of lists as one array a row, none of them a copy."""
    found = []
    for chunk in arrow_column(rows, column).chunks:
        values, ends = chunk.flatten().to_numpy(), np.cumsum(chunk.value_lengths().to_numpy()).tolist()
        found += [values[start:end] for start, end in pairwise([0, *ends])]
    return found


def supervised_lengths(rows: Dataset) -> np.ndarray:
    """The number of tokens with loss that every row has."""
    counts = [np.zeros(0, dtype=np.int64)]
    for chunk in arrow_column(rows, "labels").chunks:
        before = np.append(0, np.cumsum(chunk.flatten().to_numpy() != IGNORE_INDEX))  # each token
        counts.append(np.diff(before[np.append(0, np.cumsum(chunk.value_lengths().to_numpy()))]))
    return np.concatenate(counts)


def count_tokens(rows: Dataset) -> dict[str, int]:
    """How many tokens the rows have, and how many of them carry loss."""
    return {"tokens": int(row_lengths(rows).sum()), "supervised_tokens": int(supervised_lengths(rows).sum())}


def audit_entry(numbers: Sequence[int], policy: str, **more: int) -> dict[str, Any]:
    """The audit's entry for an issue: how many rows have it, what is done with them, and the first twenty numbers."""
    return {"rows": len(numbers), "policy": policy, "first": list(map(int, numbers[:20]))} | more
