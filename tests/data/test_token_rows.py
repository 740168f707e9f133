"""Rows as Datasets: small ones in memory, many in files without a name, mapped; the contents are the same."""

from pathlib import Path

import numpy as np
import pytest
import scale

from sft_recipes.data import token_rows
from sft_recipes.data.packing import pack_rows
from sft_recipes.data.token_rows import row_arrays, supervised_lengths, take_rows, to_dataset

LENGTHS = [n % 7 + 2 for n in range(3000)]
IDS = [np.full(length, n) for n, length in enumerate(LENGTHS)]
LABELS = [np.where(np.arange(length) < 1, -100, ids) for length, ids in zip(LENGTHS, IDS, strict=True)]


@pytest.mark.parametrize("kept_in", ["memory", "files", "memory, as the disk is full"])
def test_rows_are_the_same_wherever_they_lie(monkeypatch, caplog, tmp_path, kept_in):
    monkeypatch.setattr(token_rows, "HF_DATASETS_CACHE", str(tmp_path))
    if kept_in != "memory":
        monkeypatch.setattr(token_rows, "MEMORY_BYTES", 0)
    if "full" in kept_in:
        monkeypatch.setattr(token_rows, "HF_DATASETS_CACHE", "/dev/null/none")
    rows = to_dataset({"input_ids": IDS, "labels": LABELS}, {"row": np.arange(3000)})
    mapped = Path("/proc/self/maps").read_text().count(f"{tmp_path}/")
    assert (mapped > 0) == (kept_in == "files") and not list(tmp_path.iterdir())
    assert caplog.text.count("stay in memory") == ("full" in kept_in)
    assert [row.tolist() for row in row_arrays(rows, "labels")] == [row.tolist() for row in LABELS]
    assert supervised_lengths(rows).tolist() == [length - 1 for length in LENGTHS]
    places = np.array([2999, 0, 1500, 0])
    taken = take_rows(rows, places)
    assert taken["row"] == [2999, 0, 1500, 0] and taken["input_ids"] == [IDS[place].tolist() for place in places]
    packed = pack_rows(rows, 64, 0)
    assert sorted(np.concatenate(row_arrays(packed, "input_ids"))) == sorted(np.concatenate(IDS))


def test_the_benchmark_of_scale_finds_the_tokens_that_it_encoded(tmp_path, monkeypatch):
    monkeypatch.setenv("SFT_RECIPES_CACHE", str(tmp_path / "cache"))
    scale.write_rows(tmp_path / "rows.jsonl", 300)
    found = [scale.measure(side, str(tmp_path / "rows.jsonl"))["tokens"] for side in ("encoded", "found", "streamed")]
    assert found[0] == found[1] > 20_000 and found[2] == pytest.approx(found[0], rel=0.1)
