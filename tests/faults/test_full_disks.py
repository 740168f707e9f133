"""Runs whose disk is full: one line, earlier checkpoints as they were, and the same weights once there is room."""

import subprocess

import pytest

from support.stopped_runs import KILLABLE, NEEDS_ALL_FAULTS, checkpoints, results, resume, train

pytestmark = NEEDS_ALL_FAULTS
POINTS = {  # of a save, and what could not be written
    "peft.peft_model.safe_save_file:checkpoint-12/adapter_model.safetensors": "The checkpoint of step 12",
    "torch.save:checkpoint-12/optimizer.pt": "The checkpoint of step 12",
    "sft_recipes.training.checkpoints.write_json:checkpoint-12/manifest.json": "The checkpoint of step 12",
    "peft.peft_model.safe_save_file:model/adapter_model.safetensors": "The model",
    "sft_recipes.train.write_json:metrics.json": "The results",
}


@pytest.fixture
def small_disk(where):
    """A disk of eight megabytes, which a run and three of its checkpoints fit on."""
    disk = where / "disk"
    disk.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("point", POINTS)
def test_a_disk_that_fills_up_is_one_line_and_the_run_goes_on_once_there_is_room(where, whole, small_disk, point):
    full = train(where, "disk/run", KILLABLE, STOP_AT=f"{point}:fill", FILLER=str(small_disk / "filler"))
    assert full.returncode == 2 and "Traceback" not in full.stderr, full.stderr
    last = full.stderr.strip().splitlines()[-1]
    assert f"{POINTS[point]} could not be written to " in last and "python -m sft_recipes resume" in last
    in_training = POINTS[point].startswith("The checkpoint")
    left = {"checkpoint-4", "checkpoint-8"} if in_training else {"checkpoint-28", "checkpoint-30"}
    assert checkpoints(small_disk / "run") == left
    (small_disk / "filler").unlink()
    resumed = resume(where, "disk/run")
    assert resumed.returncode == 0, resumed.stderr
    assert results(small_disk / "run") == whole
