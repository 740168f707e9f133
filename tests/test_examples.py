"""The scripts of examples/, as a user runs them."""

import os
import socket
import subprocess
import sys

import pytest
import yaml
from make_dirty_rows import make_rows

from sft_recipes.curate import curate
from support.commands import SHORT_ROWS_RUN, read_metrics
from support.configs import composed
from support.paths import ROOT
from support.processes import Command
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


def test_skypilot_takes_the_task_and_runs_it_on_spot_machines(tmp_path, monkeypatch):
    sky = pytest.importorskip("sky")
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    values = yaml.safe_load((ROOT / "examples" / "sky.yaml").read_text())
    task = sky.Task.from_yaml_config(values, env_overrides=[("RUN", "lima")])
    (resources,) = task.resources
    assert resources.use_spot and resources.job_recovery["strategy"] == "EAGER_NEXT_REGION"


def test_the_command_of_the_sky_task_needs_a_config_alone_and_runs_in_several_processes(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "Name one.", "output": "It is one."}] * 4)
    composed_here = Command(tmp_path, *SHORT_ROWS_RUN, "trainer.use_cpu=true", "--cfg", "job").wait().stdout
    (tmp_path / "lima" / ".hydra").mkdir(parents=True)
    (tmp_path / "lima" / ".hydra" / "config.yaml").write_text(composed_here)
    command = yaml.safe_load((ROOT / "examples" / "sky.yaml").read_text())["run"].replace("/runs/", f"{tmp_path}/")
    command = command.replace("torchrun", f"{sys.executable} -m torch.distributed.run")
    with socket.create_server(("127.0.0.1", 0)) as server:  # a port that no other process of this machine has
        command = command.replace("29500", str(server.getsockname()[1]))
    given = {"NUM_NODES": "1", "NODE_RANK": "0", "NUM_GPUS_PER_NODE": "2", "NODE_IPS": "127.0.0.1\n"}
    environment = os.environ | {f"SKYPILOT_{name}": value for name, value in given.items()} | {"RUN": "lima"}
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = read_metrics(tmp_path / "lima")
    assert metrics["steps"] == 1 and metrics["environment"]["processes"] == 2
