"""Rows that are too long, the shares of a mixture, the order of training."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset

from sft_recipes.data.token_rows import flat_values, row_arrays, row_lengths, to_dataset
from sft_recipes.encoding.encoder import IGNORE_INDEX
from sft_recipes.errors import ConfigError, DataError


def apply_max_length_policy(
    name: str, rows: Dataset, max_length: int | None, policy: str
) -> tuple[Dataset, dict[str, Any]]:
    """The rows within `max_length`, and the ledger's entry for those that were longer.

    A cut answer has lost its stop token. `auto` drops such rows while they are at most 1 % and raises otherwise; `drop`
    and `raise` do so always; `keep` cuts them, and drops those of which no supervised token is left.
    """
    lengths = row_lengths(rows)
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
        return rows.select(np.flatnonzero(~long)), {"truncated": entry}
    origin = {key: flat_values(rows, key) for key in ("source", "row", "problems")}
    lists = {key: [row[:max_length] for row in row_arrays(rows, key)] for key in ("input_ids", "labels")}
    left = np.array([bool((row != IGNORE_INDEX).any()) for row in lists["labels"]])
    gone = {"rows": int((~left).sum()), "policy": "drop", "first": numbers[~left][:20].tolist()}
    found = {"truncated": entry} | ({"fully_truncated": gone} if gone["rows"] else {})
    return to_dataset(lists, origin).select(np.flatnonzero(left)), found


def sample_mixture(parts: Mapping[str, Dataset], shares: Mapping[str, float | None], seed: int) -> dict[str, Dataset]:
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


def shuffle_rows(rows: Dataset, seed: int) -> Dataset:
    """The rows in another order, as one block of memory: `Dataset.shuffle` leaves them to be gathered one by one."""
    order = np.random.default_rng(seed).permutation(len(rows))
    return Dataset(rows.with_format("arrow")[:].take(order).combine_chunks())
