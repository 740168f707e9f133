"""One job a GPU: processes of their own, each with its device and its share of the threads."""

import time

import pytest

from sft_recipes.errors import RunInterrupted
from sft_recipes.sweeps.local_gpus import LocalGpus, job_environments
from support.sweeps import spawn_sweep

WATCHED = """
import os, signal
from pathlib import Path
from transformers import TrainerCallback

class Callback(TrainerCallback):
    def on_train_begin(self, args, state, control, **_):
        seen = f"{os.environ['CUDA_VISIBLE_DEVICES']} {os.environ['OMP_NUM_THREADS']} {os.getpid()}"
        Path(args.output_dir, "seen.txt").write_text(seen)
        if args.seed == 3:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_each_job_has_a_process_and_a_gpu_and_a_killed_one_fails_alone(tmp_path):
    typed = ["hydra/launcher=local_gpus", "seed=2,3"]
    # no GPU has such a name, so the jobs train on the CPU
    done = spawn_sweep(tmp_path, WATCHED, *typed, CUDA_VISIBLE_DEVICES="GPU-a,GPU-b")
    assert done.returncode == 1, done.stderr
    assert "1 of 2 jobs finished." in done.stdout
    assert "job 1 (seed 3): its process ended with code -9, killed." in done.stdout
    seen = [(tmp_path / "sweep" / job / "seen.txt").read_text().split() for job in "01"]
    assert {device for device, _, _ in seen} == {"GPU-a", "GPU-b"} and len({process for _, _, process in seen}) == 2


def test_a_job_that_a_mistake_stopped_ends_the_command_as_without_the_launcher(tmp_path):
    callback = "from transformers import TrainerCallback as Callback"
    done = spawn_sweep(tmp_path, callback, "hydra/launcher=local_gpus", "data_checks.duplicate=raise")
    assert done.returncode == 2 and "0 of 1 job finished." in done.stdout
    assert "job 0 (alone): data.file: 3 of 4 rows have duplicate" in done.stdout
    assert "Traceback" not in done.stderr and "ended with code" not in done.stderr


def test_no_job_starts_after_one_was_stopped(monkeypatch):
    started = []

    def stop(self, environment, number, overrides):
        started.append(number)
        time.sleep(0.1)  # the second is queued by now
        raise RunInterrupted("A job was stopped.", 143)

    monkeypatch.setattr(LocalGpus, "run_process", stop)
    with pytest.raises(RunInterrupted):
        LocalGpus(n_jobs=1).launch([["seed=1"], ["seed=2"]], 0)
    assert started == [0]


def test_jobs_share_the_gpus_that_are_visible_and_the_threads(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,7")
    assert job_environments(None) == [{"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": "8"} for gpu in "27"]
    assert [job["CUDA_VISIBLE_DEVICES"] for job in job_environments(3)] == ["2", "7", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert job_environments(None) == [{"OMP_NUM_THREADS": "8"}] * 2
    assert job_environments(4) == [{"OMP_NUM_THREADS": "4"}] * 4
