"""All rows at once, best-fit decreasing: each document whole, once, in few rows of `max_length` tokens."""

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow
import torch
from datasets import Dataset
from transformers.trainer_pt_utils import get_length_grouped_indices

from sft_recipes.data.token_rows import CHUNK_ROWS, join_tables, row_arrays, row_lengths, to_table
from sft_recipes.errors import plural

log = logging.getLogger(__name__)


def pack_rows(rows: Dataset, max_length: int, seed: int) -> Dataset:
    """Whole documents side by side in rows of at most `max_length` tokens, with their `seq_lengths`."""
    lengths = row_lengths(rows)
    bins = pack_lengths(lengths, max_length, seed)
    bins = [bins[i] for i in np.random.default_rng(seed).permutation(len(bins))]  # pack gives the fullest first
    columns = {key: row_arrays(rows, key) for key in ("input_ids", "labels")}

    def tables() -> Iterator[pyarrow.Table]:
        for start in range(0, max(1, len(bins)), CHUNK_ROWS):
            some = bins[start : start + CHUNK_ROWS]
            lists = {"seq_lengths": [lengths[documents] for documents in some]}
            for key, arrays in columns.items():
                lists[key] = [np.concatenate([arrays[i] for i in documents]) for documents in some]
            yield to_table(lists, {}, {})

    fill = 100 * (lengths.sum() / len(bins) / max_length)
    log.info("Packed %s into %d of %d tokens, %.1f %% full.", plural(len(rows), "row"), len(bins), max_length, fill)
    return join_tables(tables())


def padding_share(rows: Dataset, batch: int, accumulated: int, grouped: bool, seed: int) -> float:
    """The share of padding in batches of `batch` rows, in an order drawn as the trainer draws its own."""
    lengths = row_lengths(rows)
    generator = torch.Generator().manual_seed(seed)
    if grouped:
        order = get_length_grouped_indices(lengths.tolist(), batch * accumulated, generator=generator)
    else:
        order = torch.randperm(len(lengths), generator=generator).tolist()
    batches = np.split(lengths[order], range(batch, len(lengths), batch))
    return 1 - lengths.sum() / sum(len(some) * some.max() for some in batches)


def pack_lengths(lengths: Sequence[int], max_length: int, seed: int = 0) -> list[np.ndarray]:
    """For every packed row the indices of its documents; each index appears once, no row is longer than `max_length`.

    Best-fit decreasing: the longest document first, each into the fullest row that still has room. Which of the
    documents of one length comes first is drawn with `seed`. Raises ValueError for a document that fits no row.

    >>> [row.tolist() for row in pack_lengths([3, 2, 5], max_length=5)]
    [[2], [0, 1]]
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and (lengths.max() > max_length or lengths.min() < 1):
        raise ValueError(f"lengths must be from 1 to {max_length}, found {lengths.min()} to {lengths.max()}")
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    row_of = assign_rows(np.bincount(lengths, minlength=max_length + 1), max_length)
    by_row = np.argsort(row_of, kind="stable")
    return np.split(order[by_row], np.flatnonzero(np.diff(row_of[by_row])) + 1) if len(order) else []


def assign_rows(counts: np.ndarray, max_length: int) -> np.ndarray:
    """The row of every document, longest first, when `counts[n]` of them have length n.

    Documents of one length and rows of equal room are handled together, so the work grows with the number of distinct
    lengths and rooms rather than with the documents. `rooms` is a bit set of the rooms that some row has, so that the
    tightest fit is its lowest bit at or above the length.
    """
    open_rows: list[list[np.ndarray]] = [[] for _ in range(max_length + 1)]
    rooms, rows, placed = 0, 0, []
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                ids = np.concatenate(open_rows[room]) if len(open_rows[room]) > 1 else open_rows[room][0]
                open_rows[room], rooms = [], rooms & ~(1 << room)
            else:  # as many new rows as the rest of this length fills
                room = max_length
                ids = np.arange(rows, rows + -(-left // (max_length // length)))
                rows += len(ids)
            each = room // length
            full, rest = divmod(min(left, each * len(ids)), each)
            partly = full + (rest > 0)
            for some, times in ((ids[:full], each), (ids[full:partly], rest), (ids[partly:], 0)):
                if len(some):
                    placed.append(np.repeat(some, times))
                    if space := room - times * length:
                        open_rows[space].append(some)
                        rooms |= 1 << space
            left -= full * each + rest
    return np.concatenate(placed) if placed else np.zeros(0, dtype=np.int64)


def split_by_fill(rows: list[list[tuple]], max_length: int) -> tuple[list[list[tuple]], list[tuple]]:
    """The packed rows that are at least 98 % full, or the fuller half of all, and the documents of the others.

    A row is a list of documents, and a document a tuple that begins with its ids.
    """
    fill = np.array([sum(len(ids) for ids, *_ in row) for row in rows])
    order = np.argsort(-fill, kind="stable")
    ready = max(int((fill >= 0.98 * max_length).sum()), -(-len(rows) // 2))
    return [rows[i] for i in order[:ready]], [document for i in order[ready:] for document in rows[i]]
