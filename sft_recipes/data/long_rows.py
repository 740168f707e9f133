"""Rows beyond trainer.max_length: dropped, refused, or cut, raw text into pieces of which none is lost."""

from typing import Any

import numpy as np
from datasets import Dataset

from sft_recipes.data.token_rows import (
    ORIGIN,
    audit_entry,
    flat_values,
    row_arrays,
    row_lengths,
    supervised_lengths,
    take_rows,
    to_dataset,
)
from sft_recipes.errors import DataError


def apply_max_length_policy(
    name: str, rows: Dataset, max_length: int | None, policy: str
) -> tuple[Dataset, dict[str, Any]]:
    """The rows within `max_length`, and the audit's entries for those that were longer.

    Raw text is cut into pieces, of which none is lost. A cut answer has lost its stop token: `auto` drops such rows
    while they are at most 1 % and raises otherwise; `drop` and `raise` do so always; `keep` cuts them, and drops those
    of which no supervised token is left.
    """
    if not max_length or not (row_lengths(rows) > max_length).any():
        return rows, {}
    rows, found, total = *cut_raw_text(rows, max_length), len(rows)
    lengths, numbers = row_lengths(rows), flat_values(rows, "row")
    long = lengths > max_length
    count, share = int(long.sum()), long.sum() / total
    if not count:
        return rows, found
    if policy == "raise" or (policy == "auto" and share > 0.01):
        enough = int(np.quantile(lengths, 0.99, method="higher"))
        raise DataError(
            f"data.{name}: {count} of {total} rows ({share:.1%}) {'is' if count == 1 else 'are'} longer than "
            f"trainer.max_length={max_length}; {enough} keeps 99 %. Raise it, or write data.max_length_policy=drop (or "
            "keep, which cuts answers off)."
        )
    if policy != "keep":
        found["truncated"] = audit_entry(numbers[long], "drop", tokens=int(lengths[long].sum()))
        return take_rows(rows, np.flatnonzero(~long)), found
    found["truncated"] = audit_entry(numbers[long], "keep", tokens=int((lengths[long] - max_length).sum()))
    lists = {key: [row[:max_length] for row in row_arrays(rows, key)] for key in ("input_ids", "labels")}
    rows = to_dataset(lists, {key: flat_values(rows, key) for key in ORIGIN})
    left = supervised_lengths(rows) > 0
    if not left.all():
        found["fully_truncated"] = audit_entry(numbers[~left], "drop", tokens=int(row_lengths(rows)[~left].sum()))
    return take_rows(rows, np.flatnonzero(left)), found


def cut_raw_text(rows: Dataset, max_length: int) -> tuple[Dataset, dict[str, Any]]:
    """The rows with those of raw text in pieces of `max_length` tokens, one after another, and the entry for them.

    A piece has at least two tokens, since the first of a row is predicted by nothing.
    """
    lengths, origin = row_lengths(rows), {key: flat_values(rows, key) for key in ORIGIN}
    long = (origin["piece"] >= 0) & (lengths > max_length)
    if not long.any():
        return rows, {}
    sizes = [
        [length] if not cut else piece_sizes(length, max_length)
        for length, cut in zip(lengths.tolist(), long, strict=True)
    ]
    counts = np.array([len(each) for each in sizes])
    ends = np.cumsum(np.concatenate(sizes))[:-1]
    lists = {key: np.split(flat_values(rows, key), ends) for key in ("input_ids", "labels")}
    places = np.concatenate([np.arange(count) for count in counts])
    pieces = np.repeat(origin["piece"], counts) + places
    entry = audit_entry(origin["row"][long], "keep", pieces=int(counts[long].sum()))
    origin = {key: np.repeat(values, counts) for key, values in origin.items()} | {"piece": pieces}
    return to_dataset(lists, origin), {"cut_into_pieces": entry}


def piece_sizes(length: int, most: int) -> list[int]:
    """The lengths of a text's pieces.

    >>> piece_sizes(10, 4), piece_sizes(9, 4)
    ([4, 4, 2], [4, 3, 2])
    """
    sizes = [most] * (length // most) + [length % most] * (length % most > 0)
    return [*sizes[:-2], most - 1, 2] if sizes[-1] == 1 < most else sizes
