"""Runs that get a signal, or a folder that another run is using."""

import os
import shutil
import signal
from contextlib import ExitStack

import pytest

from support.stopped_runs import KILLABLE, NEEDS_ALL_FAULTS, checkpoints, results, resume, start, train

STEP = "sft_recipes.training.callbacks.FiniteLossCheck.on_pre_optimizer_step"
SIGNALS = {signal.SIGHUP: 129, signal.SIGTERM: 143, signal.SIGINT: 130}
POINTS = {  # where a signal comes, and the checkpoints that are there when the run has ended
    f"{STEP}:1:before": {"checkpoint-1"},
    f"{STEP}:6:before": {"checkpoint-4", "checkpoint-6"},  # between two saves
    f"{STEP}:8:before": {"checkpoint-4", "checkpoint-8"},  # in a step that is saved anyway
    f"{STEP}:10:before": {"checkpoint-8", "checkpoint-10"},  # the last of an epoch
    "peft.peft_model.safe_save_file:checkpoint-8/adapter_model.safetensors:before": {"checkpoint-4", "checkpoint-8"},
    "torch.save:checkpoint-8/optimizer.pt:before": {"checkpoint-4", "checkpoint-8"},
    "sft_recipes.training.checkpoints.write_json:checkpoint-8/manifest.json:after": {"checkpoint-4", "checkpoint-8"},
    "Path.rename:checkpoint-8:after": {"checkpoint-4", "checkpoint-8"},
    "os.rmdir:4:before": {"checkpoint-8", "checkpoint-12"},  # while the oldest is removed
    f"{STEP}:30:before": {"checkpoint-28", "checkpoint-30"},  # the last step
}


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_leaves_a_checkpoint_no_model_and_the_line_to_resume(where, whole, number):
    shutil.rmtree(where / "stopped", ignore_errors=True)
    with start(where, "stopped") as run:
        run.wait_for("step 12 of 30")
        os.kill(run.pid, number)
        stopped = run.wait()
    assert stopped.returncode == SIGNALS[number] and not (where / "stopped" / "model").exists()
    assert f"Go on with: python -m sft_recipes resume {where / 'stopped'}" in stopped.stderr
    assert resume(where, "stopped").returncode == 0
    assert results(where / "stopped") == whole


@NEEDS_ALL_FAULTS
@pytest.mark.parametrize("point", POINTS)
def test_a_signal_lets_the_step_in_hand_and_its_save_end(where, whole, point):
    shutil.rmtree(where / "stopped", ignore_errors=True)
    stopped = train(where, "stopped", KILLABLE, STOP_AT=point, STOP_WITH="SIGTERM")
    assert stopped.returncode == 143 and not (where / "stopped" / "model").exists(), stopped.stderr
    assert checkpoints(where / "stopped") == POINTS[point]
    assert resume(where, "stopped").returncode == 0
    assert results(where / "stopped") == whole


@NEEDS_ALL_FAULTS
@pytest.mark.parametrize(
    ("point", "signals"),
    [
        ("torch.save:checkpoint-8/optimizer.pt:before", "SIGTERM,SIGTERM"),
        (f"{STEP}:6:before", "SIGTERM,SIGTERM"),
        ("peft.peft_model.safe_save_file:model/adapter_model.safetensors:before", "SIGTERM"),  # training has ended
    ],
)
def test_a_second_signal_and_one_behind_the_last_checkpoint_stop_at_once(where, whole, point, signals):
    shutil.rmtree(where / "stopped", ignore_errors=True)
    stopped = train(where, "stopped", KILLABLE, STOP_AT=point, STOP_WITH=signals)
    assert stopped.returncode == -signal.SIGTERM, stopped.stderr
    assert resume(where, "stopped").returncode == 0
    assert results(where / "stopped") == whole


@NEEDS_ALL_FAULTS
def test_a_second_run_in_the_folder_stops_and_names_the_first(where, whole):
    with start(where, "shared") as first:
        first.wait_for("step 3 of")
        os.kill(first.pid, signal.SIGSTOP)  # or it would be done before the others have started
        others = [resume(where, "shared"), train(where, "shared", "overwrite=true")]
        os.kill(first.pid, signal.SIGCONT)
        ended = first.wait()
    for other in others:
        assert other.returncode == 2 and "Traceback" not in other.stderr
        assert f"is in use by process {first.pid} on " in other.stderr
    assert ended.returncode == 0 and results(where / "shared") == whole


@NEEDS_ALL_FAULTS
def test_of_two_runs_that_start_at_once_in_one_folder_one_runs(where, whole):
    with ExitStack() as stack:
        runs = [stack.enter_context(start(where, "raced")) for _ in range(2)]
        ended = sorted((run.wait() for run in runs), key=lambda run: run.returncode)
    assert [run.returncode for run in ended] == [0, 2] and "Traceback" not in ended[1].stderr, ended
    assert results(where / "raced") == whole
