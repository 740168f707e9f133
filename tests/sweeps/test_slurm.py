"""A sweep's jobs on a cluster, with submitit's local executor in Slurm's place."""

import json

import pytest

from support.sweeps import spawn_sweep

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
PREEMPTED_ONCE = """
import os, signal
from pathlib import Path
from transformers import TrainerCallback

class Callback(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        done = Path(args.output_dir, "preempted")
        if state.global_step == 2 and not done.exists():
            done.touch()
            os.kill(os.getpid(), signal.SIGUSR2)
"""


def test_a_preempted_job_saves_is_queued_again_and_goes_on(tmp_path):
    done = spawn_sweep(tmp_path, PREEMPTED_ONCE, "trainer.max_steps=4", "hydra/launcher=submitit_local")
    assert done.returncode == 0, done.stderr
    assert "1 of 1 job finished." in done.stdout
    log = (tmp_path / "sweep/0/sft_recipes.log").read_text()
    assert "Stopped by SIGUSR2 after step 2 of 4, which is saved." in log
    assert json.loads((tmp_path / "sweep/0/metrics.json").read_text())["steps"] == 4
