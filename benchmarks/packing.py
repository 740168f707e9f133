"""How full packed rows are and what they cost, ours beside TRL's: `python benchmarks/packing.py --million`."""

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
from datasets import Dataset
from prepare import DATA, FILES, MAX_LENGTH, machine, neox, real_rows
from trl import data_utils, pack_dataset

from sft_recipes.data.formatters import Conversation
from sft_recipes.data.long_rows import apply_max_length_policy
from sft_recipes.data.packing import pack_lengths, pack_rows
from sft_recipes.data.token_rows import row_lengths, to_dataset
from sft_recipes.encoding.encoder import Encoder

ROWS = 52_000
STRATEGIES = ("bfd", "bfd_split", "wrapped")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the rows and the tokenizer")
    parser.add_argument("--million", action="store_true", help="also a million lengths, drawn around the real ones")
    options = parser.parse_args()
    datasets.disable_caching()
    datasets.disable_progress_bars()
    rows, _ = apply_max_length_policy("benchmark", repeated_rows(options.data), MAX_LENGTH, "auto")
    print(f"{machine()}\n")
    compare("real rows, repeated with a suffix a copy", rows, row_lengths(rows))
    if options.million:
        lengths = around(row_lengths(rows), 1_000_000)
        compare("lengths within 10 % of the real ones, one column of one byte a token", one_column(lengths), lengths)


def repeated_rows(folder: Path) -> Dataset:
    """The real rows as token ids and labels, again and again, each copy's questions with a suffix of their own."""
    tokenizer, template = neox(folder)
    rows = [FILES[name](row) for name, source in real_rows(folder).items() for row in source]
    copies = (with_suffix(row, f" (copy {copy})") for copy in itertools.count(1) for row in rows)
    encoded = Encoder(tokenizer, template).encode(list(itertools.islice(copies, ROWS)))
    return to_dataset({key: encoded[key] for key in ("input_ids", "labels")})


def with_suffix(conversation: Conversation, suffix: str) -> Conversation:
    """The conversation with the suffix behind its first message."""
    first, *rest = conversation["messages"]
    return conversation | {"messages": [first | {"content": first["content"] + suffix}, *rest]}


def around(lengths: np.ndarray, wanted: int) -> np.ndarray:
    """So many lengths, each within 10 % of a real one."""
    jitter = np.random.default_rng(0).uniform(0.9, 1.1, wanted)
    return np.clip(np.rint(np.resize(lengths, wanted) * jitter), 1, MAX_LENGTH).astype(np.int64)


def one_column(lengths: np.ndarray) -> Dataset:
    """Rows of these lengths that take as little memory as TRL's packing allows."""
    ends = pyarrow.array(np.concatenate([[0], lengths.cumsum()]))
    values = pyarrow.array(np.zeros(lengths.sum(), dtype=np.int8))
    return Dataset(pyarrow.table({"input_ids": pyarrow.LargeListArray.from_arrays(ends, values)}))


def compare(what: str, rows: Dataset, lengths: np.ndarray) -> None:
    """Prints rows, fill and seconds of every way to pack; those of TRL's functions alone are without `Dataset.map`."""
    print(f"{len(lengths):,} {what}: {lengths.sum():,} tokens, the longest {lengths.max()}, max_length {MAX_LENGTH}")
    print(f"{'':44}  {'rows':>7}  {'full':>6}  {'seconds':>7}")
    show("ours: pack, lengths alone", lengths, lambda: pack_lengths(lengths, MAX_LENGTH))
    if "labels" in rows.column_names:
        show("ours: packed, ids and labels", lengths, lambda: pack_rows(rows, MAX_LENGTH, seed=0))
    for strategy in STRATEGIES:
        show(f"TRL: pack_dataset {strategy}", lengths, lambda name=strategy: pack_dataset(rows, MAX_LENGTH, name))
    alone = one_column(lengths).data.table
    show("TRL: _pack_bfd alone, 1,000 rows at a time", lengths, lambda: pack_alone(alone, 1000))
    show("TRL: _pack_bfd alone, all rows at once", lengths, lambda: pack_alone(alone, len(alone)))
    print()


def pack_alone(rows: pyarrow.Table, batch: int) -> list[Any]:
    """What `pack_dataset` maps over batches of rows; its packed rows."""
    batches = (rows.slice(start, batch) for start in range(0, len(rows), batch))
    return [row for each in batches for row in data_utils._pack_bfd(each, MAX_LENGTH)["seq_lengths"]]


def show(name: str, lengths: np.ndarray, way: Callable[[], Any]) -> None:
    """Prints one line: how many rows come out, how full they are on average, the best seconds of two."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        rows = len(way())
        seconds.append(time.perf_counter() - start)
    print(f"{name:44}  {rows:7,}  {lengths.sum() / rows / MAX_LENGTH:6.2%}  {min(seconds):7.3f}", flush=True)


if __name__ == "__main__":
    main()
