"""Datasets of token ids: too long ones, mixtures, packed rows."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow
import torch
from datasets import Dataset
from transformers.trainer_pt_utils import get_length_grouped_indices

from sft_recipes.binding import ConfigError
from sft_recipes.encoding import IGNORED
from sft_recipes.formatters import DataError
from sft_recipes.packing import pack

log = logging.getLogger(__name__)


def shorten(name: str, rows: Dataset, max_length: int | None, policy: str) -> tuple[Dataset, dict[str, Any]]:
    """The rows within `max_length`, and the ledger's entry for those that were longer.

    A cut answer has lost its stop token. `auto` drops such rows while they are at most 1 % and raises otherwise; `drop`
    and `raise` do so always; `keep` cuts them, and drops those of which no supervised token is left.
    """
    lengths = lengths_of(rows)
    long = lengths > (max_length or np.inf)
    if not long.any():
        return rows, {}
    count, share = int(long.sum()), long.mean()
    if policy == "raise" or (policy == "auto" and share > 0.01):
        enough = int(np.quantile(lengths, 0.99, method="higher"))
        raise DataError(
            f"data.{name}: {count} of {len(rows)} rows ({share:.1%}) are longer than trainer.max_length={max_length}; "
            f"{enough} keeps 99 %. Raise it, or write data.max_length_policy=drop (or keep, which cuts answers off)."
        )
    numbers = flat_values(rows, "row")
    entry = {"rows": count, "policy": "keep" if policy == "keep" else "drop", "first": numbers[long][:20].tolist()}
    if policy != "keep":
        return rows.select(np.flatnonzero(~long)), {"answer_cut": entry}
    origin = {key: flat_values(rows, key) for key in ("source", "row", "problems")}
    lists = {key: [row[:max_length] for row in arrays(rows, key)] for key in ("input_ids", "labels")}
    left = np.array([bool((row != IGNORED).any()) for row in lists["labels"]])
    gone = {"rows": int((~left).sum()), "policy": "drop", "first": numbers[~left][:20].tolist()}
    found = {"answer_cut": entry} | ({"wholly_cut": gone} if gone["rows"] else {})
    return table(lists, origin).select(np.flatnonzero(left)), found


def mix(parts: Mapping[str, Dataset], shares: Mapping[str, float | None], seed: int) -> dict[str, Dataset]:
    """Of every source's rows as many as its `share` of the mixture asks for.

    Sources without a share give all their rows, and the others are drawn so that `share` of the whole is theirs. Where
    all have one, the scarcest source gives all it has. Rows are never repeated: a share that the source cannot fill is
    a ConfigError.
    """
    asked = {name: share for name, share in shares.items() if share is not None}
    free = 1 - sum(asked.values())
    others = [rows for name, rows in parts.items() if name not in asked]
    if any(not 0 < share <= 1 for share in asked.values()) or (free < 1e-9 if others else abs(free) > 1e-9):
        listed = ", ".join(f"{name} {share}" for name, share in asked.items())
        raise ConfigError(
            f"data: shares ({listed}) should be above 0 and sum to 1, or to less where a source has none."
        )
    total = sum(map(len, others)) / free if others else min(len(parts[name]) / share for name, share in asked.items())
    mixed = {}
    for name, rows in parts.items():
        wanted = round(total * asked[name]) if name in asked else len(rows)
        if wanted > len(rows):
            raise ConfigError(
                f"data.{name}.share={asked[name]} of this mixture is {wanted} rows, {name} has {len(rows)}. "
                f"Write at most {len(rows) / (total * free + len(rows)):.2g}."
            )
        draw = np.random.default_rng(seed).permutation(len(rows))[:wanted]
        mixed[name] = rows if wanted == len(rows) else rows.select(np.sort(draw))
    return mixed


def packed(rows: Dataset, max_length: int, seed: int) -> Dataset:
    """Whole documents side by side in rows of at most `max_length` tokens, with their `seq_lengths`."""
    lengths = lengths_of(rows)
    bins = pack(lengths, max_length, seed)
    bins = [bins[i] for i in np.random.default_rng(seed).permutation(len(bins))]  # pack gives the fullest first
    columns = {"seq_lengths": [lengths[documents] for documents in bins]}
    for key in ("input_ids", "labels"):
        documents = arrays(rows, key)
        columns[key] = [np.concatenate([documents[i] for i in chosen]) for chosen in bins]
    fill = lengths.sum() / len(bins) / max_length
    log.info("Packed %d rows into %d of %d tokens, %.1f %% full.", len(rows), len(bins), max_length, 100 * fill)
    return table(columns)


def shuffled(rows: Dataset, seed: int) -> Dataset:
    """The rows in another order, as one block of memory: `Dataset.shuffle` leaves them to be gathered one by one."""
    order = np.random.default_rng(seed).permutation(len(rows))
    return Dataset(rows.with_format("arrow")[:].take(order).combine_chunks())


def with_lengths(rows: Dataset) -> Dataset:
    """The rows with their `length`, by which the trainer batches rows that need little padding."""
    return rows.add_column("length", lengths_of(rows))


def padding_share(rows: Dataset, batch: int, accumulated: int, grouped: bool, seed: int) -> float:
    """The share of padding in batches of `batch` rows, in an order drawn as the trainer draws its own."""
    lengths = lengths_of(rows)
    generator = torch.Generator().manual_seed(seed)
    if grouped:
        order = get_length_grouped_indices(lengths.tolist(), batch * accumulated, generator=generator)
    else:
        order = torch.randperm(len(lengths), generator=generator).tolist()
    batches = np.split(lengths[order], range(batch, len(lengths), batch))
    return 1 - lengths.sum() / sum(len(some) * some.max() for some in batches)


def table(lists: Mapping[str, list[np.ndarray]], numbers: Mapping[str, np.ndarray] | None = None) -> Dataset:
    """Columns of int32 arrays, and of plain numbers, as a Dataset, without a detour through Python's integers."""
    columns = {key: pyarrow.array(np.asarray(values, dtype=np.int64)) for key, values in (numbers or {}).items()}
    for key, rows in lists.items():
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        values = np.concatenate(rows).astype(np.int32, copy=False) if rows else np.zeros(0, dtype=np.int32)
        columns[key] = pyarrow.LargeListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(values))
    return Dataset(pyarrow.table(columns))


def lengths_of(rows: Dataset, column: str = "input_ids") -> np.ndarray:
    """The number of entries that every row has in a column, its tokens unless another one is named."""
    return rows.with_format("arrow")[:][column].combine_chunks().value_lengths().to_numpy().astype(np.int64)


def flat_values(rows: Dataset, column: str) -> np.ndarray:
    """A column's values, all rows one after another."""
    values = rows.with_format("arrow")[:][column].combine_chunks()
    return (values.flatten() if hasattr(values, "value_lengths") else values).to_numpy()


def arrays(rows: Dataset, column: str) -> list[np.ndarray]:
    """A column of lists as one array a row."""
    return np.split(flat_values(rows, column), np.cumsum(lengths_of(rows, column))[:-1]) if len(rows) else []


def token_counts(rows: Dataset) -> dict[str, int]:
    """How many tokens the rows have, and how many of them carry loss."""
    labels = flat_values(rows, "labels") if len(rows) else np.zeros(0)
    return {"tokens": len(labels), "supervised_tokens": int((labels != IGNORED).sum())}
