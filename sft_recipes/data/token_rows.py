"""Rows of token ids as Datasets, and what a run is given of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow
from datasets import Dataset

from sft_recipes.data.formatters import Conversation
from sft_recipes.encoding.encoder import IGNORE_INDEX

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


def to_dataset(
    lists: Mapping[str, list[np.ndarray]],
    numbers: Mapping[str, np.ndarray] | None = None,
    texts: Mapping[str, list[str]] | None = None,
) -> Dataset:
    """Columns of int32 arrays, plain numbers and texts as a Dataset, without a detour through Python's integers."""
    columns = {key: pyarrow.array(np.asarray(values, dtype=np.int64)) for key, values in (numbers or {}).items()}
    columns |= {key: pyarrow.array(values, pyarrow.string()) for key, values in (texts or {}).items()}
    for key, rows in lists.items():
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        values = np.concatenate(rows).astype(np.int32, copy=False) if rows else np.zeros(0, dtype=np.int32)
        columns[key] = pyarrow.LargeListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(values))
    return Dataset(pyarrow.table(columns))


def take_rows(rows: Dataset, places: np.ndarray) -> Dataset:
    """The rows at these places as one block of memory: `Dataset.select` leaves them to be gathered one by one."""
    return Dataset(rows.with_format("arrow")[:].take(places).combine_chunks())


def row_lengths(rows: Dataset, column: str = "input_ids") -> np.ndarray:
    """The number of entries that every row has in a column, its tokens unless another one is named."""
    return rows.with_format("arrow")[:][column].combine_chunks().value_lengths().to_numpy().astype(np.int64)


def flat_values(rows: Dataset, column: str) -> np.ndarray:
    """A column's values, all rows one after another."""
    values = rows.with_format("arrow")[:][column].combine_chunks()
    return (values.flatten() if hasattr(values, "value_lengths") else values).to_numpy()


def row_arrays(rows: Dataset, column: str) -> list[np.ndarray]:
    """A column of lists as one array a row."""
    return np.split(flat_values(rows, column), np.cumsum(row_lengths(rows, column))[:-1]) if len(rows) else []


def supervised_lengths(rows: Dataset) -> np.ndarray:
    """The number of tokens with loss that every row has."""
    lengths = row_lengths(rows)
    sums = np.append(0, np.cumsum(flat_values(rows, "labels") != IGNORE_INDEX))
    return sums[np.cumsum(lengths)] - sums[np.cumsum(lengths) - lengths]


def count_tokens(rows: Dataset) -> dict[str, int]:
    """How many tokens the rows have, and how many of them carry loss."""
    labels = flat_values(rows, "labels") if len(rows) else np.zeros(0)
    return {"tokens": len(labels), "supervised_tokens": int((labels != IGNORE_INDEX).sum())}


def audit_entry(numbers: Sequence[int], policy: str, **more: int) -> dict[str, Any]:
    """The audit's entry for an issue: how many rows have it, what is done with them, and the first twenty numbers."""
    return {"rows": len(numbers), "policy": policy, "first": list(map(int, numbers[:20]))} | more
