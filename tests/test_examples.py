"""The scripts of examples/, as a user runs them."""

import os
import subprocess
import sys

import pytest
from make_dirty_rows import make_rows

from sft_recipes.curate import curate
from support.configs import composed
from support.paths import ROOT
from support.rows import write_jsonl


def test_ray_finds_what_mode_curate_finds(tmp_path):
    pytest.importorskip("ray")
    from pyarrow import parquet

    path = write_jsonl(tmp_path / "dirty.jsonl", make_rows())
    config = composed(
        "model=tiny", "data=file", f"data.file.data_files={path}", "curation=report", "curation.output=parquet"
    )
    record = curate(config, tmp_path / "all")
    command = [
        sys.executable,
        ROOT / "examples" / "curate_ray.py",
        tmp_path / "all" / "curated.parquet",
        tmp_path / "out",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kept, removed = (parquet.read_table(tmp_path / "out" / name).to_pylist() for name in ("curated", "removed"))
    counts = {
        name: sum(any(why.startswith(f"{name}:") for why in row["reasons"]) for row in removed)
        for name in record["findings"]
    }
    assert len(kept) + len(removed) == 412
    assert {name: number for name, number in counts.items() if number} == {
        "near_empty_answer": 2, "template_tokens": 1, "repetition": 2, "abrupt_end": 3, "refusal": 3, "boilerplate": 1,
    }  # fmt: skip
    assert all(record["findings"][name]["rows"] == number for name, number in counts.items() if number)
