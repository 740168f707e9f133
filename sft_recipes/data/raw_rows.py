"""The rows of a source as they were read, by number: local files as they are written, all else as Arrow has it."""

import pickle
from array import array
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

from datasets import Dataset
from datasets.config import HF_DATASETS_CACHE

from sft_recipes.data.messages import ArrowRow
from sft_recipes.data.reading import MOST_COLUMNS, ROW_CHARACTERS, Fault, Row
from sft_recipes.encoding.rendering import list_strings

MEMORY_BYTES = 1 << 22  # of one source's rows, beyond which they lie in a file that ends with the process
BATCH_ROWS = 1000  # that are taken out of Arrow at once
Record = tuple[int, Row, str]  # the row's number, the row or its fault, and its file and line


class FileRows:
    """The rows of local files in a random order that costs no memory; a number is a row's place in its split."""

    def __init__(self) -> None:
        Path(HF_DATASETS_CACHE).mkdir(parents=True, exist_ok=True)
        self.file = SpooledTemporaryFile(MEMORY_BYTES, dir=HF_DATASETS_CACHE)  # noqa: SIM115 - it lives as long as the rows
        self.starts, self.columns, self.places = array("Q"), {}, range(0)

    def extend(self, read: Iterable[tuple[Row, str, int]]) -> int:
        """Takes in rows or faults with their files and lines, and returns how many there were."""
        before = len(self.starts)
        for row, path, line in read:
            self.starts.append(self.file.tell())
            pickle.dump((row, path, line), self.file)
            if isinstance(row, dict) and not row.keys() <= self.columns.keys():
                self.columns |= dict.fromkeys(row)
        self.places = range(len(self.starts))
        return len(self.starts) - before

    def __len__(self) -> int:
        return len(self.places)

    def select(self, places: Iterable[int]) -> "FileRows":
        """The rows at these places, which are numbered anew; the file is shared."""
        chosen = object.__new__(FileRows)
        chosen.__dict__ |= self.__dict__ | {"places": [self.places[place] for place in places]}
        return chosen

    def records(self, numbers: Iterable[int]) -> Iterator[Record]:
        """The rows of these numbers, one after another."""
        for number in map(int, numbers):
            self.file.seek(self.starts[self.places[number]])
            row, path, line = pickle.load(self.file)
            yield number, row, f"{path}, line {line}"


class ArrowRows:
    """The rows of a Dataset."""

    def __init__(self, dataset: Dataset):
        self.dataset, self.columns = dataset, dataset.column_names

    def __len__(self) -> int:
        return len(self.dataset)

    def records(self, numbers: Iterable[int]) -> Iterator[Record]:
        """The rows of these numbers, one after another."""
        numbers = map(int, numbers)
        while batch := list(islice(numbers, BATCH_ROWS)):
            columns = self.dataset.select(batch)[:]
            for number, values in zip(batch, zip(*columns.values(), strict=True), strict=True):
                yield number, arrow_row(dict(zip(columns, values, strict=True))), ""


def arrow_row(values: Mapping[str, Any]) -> Row:
    """A row of `datasets`; a fault where it is larger than that of a file may be."""
    if len(values) > MOST_COLUMNS:
        return Fault(f"{len(values):,} fields are more than the {MOST_COLUMNS:,} of a row")
    if (size := sum(map(len, list_strings(values)))) > ROW_CHARACTERS:
        return Fault(f"{size:,} characters are more than the {ROW_CHARACTERS:,} of a row")
    return ArrowRow(values)
