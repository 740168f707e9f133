"""A job's processes by Ray Train: the loss of one process, also when a worker dies on the way."""

import sys

import pytest

from support.commands import SHORT_ROWS_RUN, read_metrics
from support.sweeps import spawn_sweep

TWO_WORKERS = ["+where=ray", "hydra.launcher.scaling.num_workers=2", "hydra.launcher.scaling.use_gpu=false",
               "trainer.use_cpu=true", "trainer.max_steps=4", "trainer.save_strategy=steps", "trainer.save_steps=1"]  # fmt: skip
DIES_ONCE = """
import os, signal
from pathlib import Path
from transformers import TrainerCallback

class Callback(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        with Path(args.output_dir, f"steps_{os.environ.get('RANK', 0)}.txt").open("a") as file:
            file.write(f"{state.global_step} ")
        died = Path(args.output_dir, "died")
        if os.environ.get("RANK") == "1" and state.global_step == 2 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_without_ray_it_says_what_to_install(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, said = command("-m", *SHORT_ROWS_RUN, "+where=ray", "hydra.sweep.dir=sweep")
    assert code == 2 and "+where=ray needs Ray Train. Try pip install 'sft-recipes[ray]'." in said


def test_a_worker_that_dies_is_started_again_and_the_loss_is_that_of_one_process(tmp_path):
    pytest.importorskip("ray.train")
    quiet = {"RAY_USAGE_STATS_ENABLED": "0"}
    typed = ["trainer.per_device_train_batch_size=2", "trainer.effective_batch_size=4", "seed=1"]
    done = spawn_sweep(tmp_path, DIES_ONCE, *TWO_WORKERS, *typed, **quiet)
    assert done.returncode == 0 and "1 of 1 job finished." in done.stdout, done.stderr
    swept = tmp_path / "sweep" / "0"
    # the second process died in its third step, whose beginning both had seen
    assert [(swept / f"steps_{rank}.txt").read_text() for rank in "01"] == ["0 1 2 2 3 "] * 2
    assert spawn_sweep(tmp_path, DIES_ONCE, *typed, "trainer.max_steps=4", "hydra.sweep.dir=alone").returncode == 0
    alone = read_metrics(tmp_path / "alone" / "0")["train_loss"]
    assert read_metrics(swept)["train_loss"] == pytest.approx(alone, rel=1e-5)


def test_a_users_mistake_is_not_tried_again(tmp_path):
    pytest.importorskip("ray.train")
    done = spawn_sweep(tmp_path, DIES_ONCE, *TWO_WORKERS[:3], "seed=1", RAY_USAGE_STATS_ENABLED="0")
    said = "torchrun started 2 processes without a GPU. Write trainer.use_cpu=true."
    assert f"job 0 (alone): {said}" in done.stdout and done.returncode == 1
    assert (tmp_path / "sweep/0/sft_recipes.log").read_text().count(said) <= 2  # once by each of the processes
