"""Which tokens a run was trained on, as one number that is the same on every machine."""

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
from datasets import Dataset

from sft_recipes.rows import arrays

STACK = ("torch", "transformers", "trl", "peft", "datasets", "tokenizers", "sft-recipes")


def digest(rows: Dataset, chunk: int = 1000) -> dict[str, Any]:
    """SHA-256 over every row's ids, labels and document lengths, in order, and the same up to every `chunk` rows.

    Lengths and values go in as little-endian int32, so the digest is the same on every machine.
    """
    total, steps = hashlib.sha256(), []
    columns = [column for column in ("input_ids", "labels", "seq_lengths") if column in rows.column_names]
    listed = zip(*(arrays(rows, column) for column in columns), strict=True)
    for index, row in enumerate(listed, start=1):
        for values in row:
            total.update(np.array([len(values)], dtype="<i4").tobytes() + values.astype("<i4").tobytes())
        if index % chunk == 0:
            steps.append(total.hexdigest()[:16])
    return {"sha256": total.hexdigest(), "rows": len(rows), "chunk": chunk, "chunks": steps}


def versions() -> dict[str, str]:
    """The versions of the stack that encoded the rows."""
    return {package: version(package) for package in STACK}


def record(data_ledger: Mapping[str, Any], rows: Dataset, config: Mapping[str, Any]) -> dict[str, Any]:
    """supervision.json: the ledger, the digest of what the trainer gets, and what it depends on."""
    return {"digest": digest(rows), "sources": data_ledger, "versions": versions(), "config": config}
