"""Which tokens a run was trained on, as one number that is the same on every machine."""

import hashlib
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from sft_recipes.data.token_rows import row_arrays

STACK_PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "tokenizers", "sft-recipes")
DIGEST_COLUMNS = ("input_ids", "labels", "seq_lengths")
CHUNK_ROWS = 1000  # rows between two intermediate digests, by which two runs are told where they part


class TokenDigest:
    """SHA-256 over every row's ids, labels and document lengths, in order, and the same up to every CHUNK rows.

    Lengths and values go in as little-endian int32, so the digest is the same on every machine.
    """

    def __init__(self):
        self.total, self.rows, self.chunks = hashlib.sha256(), 0, []

    def add(self, row: Iterable[np.ndarray]) -> None:
        """Takes in one row's columns."""
        for values in row:
            self.total.update(np.array([len(values)], dtype="<i4").tobytes() + values.astype("<i4").tobytes())
        self.rows += 1
        if self.rows % CHUNK_ROWS == 0:
            self.chunks.append(self.total.hexdigest()[:16])

    def record(self) -> dict[str, Any]:
        """What supervision.json holds of it."""
        return {"sha256": self.total.hexdigest(), "rows": self.rows, "chunk": CHUNK_ROWS, "chunks": self.chunks}


def digest_rows(rows: Dataset) -> dict[str, Any]:
    """The digest of all rows of a dataset."""
    found = TokenDigest()
    columns = [row_arrays(rows, column) for column in DIGEST_COLUMNS if column in rows.column_names]
    for row in zip(*columns, strict=True):
        found.add(row)
    return found.record()


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stack_versions() -> dict[str, str]:
    """The versions of the stack that encoded the rows."""
    return {package: version(package) for package in STACK_PACKAGES}


def audit_record(
    data_ledger: Mapping[str, Any], digest: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """supervision.json: the ledger, the digest of what the trainer gets, and what it depends on."""
    return {"digest": digest, "sources": data_ledger, "versions": stack_versions(), "config": config}
