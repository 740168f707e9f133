"""Runs that are stopped anywhere and resumed: the same weights, losses, curve and answers as of one that was not.

The suite tries a few points, `make test-faults` all of them.
"""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from support.stopped_runs import STEPS, results, resume, train, train_until, write_rows

ALL = bool(os.environ.get("ALL_FAULTS"))
TRAINER = "sft_recipes.training.resumable_trainer"
# Of a run with a checkpoint every fourth of its thirty steps, each of which calls torch.save four times
POINTS = [
    "torch.save:14:before",  # in the fourth save, which has weights and no optimizer yet
    f"{TRAINER}.publish_checkpoint:3:before",  # written, without a manifest
    "torch.save:13:before",
    "torch.save:15:after",
    "torch.save:16:after",
    "os.fsync:30:before",
    "Path.rename:2:before",
    "Path.rename:2:after",
    f"{TRAINER}.rotate_checkpoints:3:before",
    f"{TRAINER}.rotate_checkpoints:3:after",
    "sft_recipes.training.callbacks.FiniteLossCheck.on_pre_optimizer_step:18:before",  # between two saves
    "sft_recipes.training.callbacks.FiniteLossCheck.on_pre_optimizer_step:1:before",  # before the first save: begins anew
    "sft_recipes.train.save_model:1:before",  # trained, not saved
    "sft_recipes.train.save_model:1:after",  # saved, not measured
]
SETTINGS = {
    "full": ["adapter=none"],
    "dropout": ["adapter.lora.lora_dropout=0.3"],
    "qlora": ["adapter=qlora"],
    "packed": ["trainer.packing=true", "trainer.save_steps=2"],
    "accumulated": ["trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=3"],
    "random order": ["trainer.train_sampling_strategy=random"],
    "NEFTune": ["trainer.neftune_noise_alpha=5"],
    "LoRA+": ["adapter.loraplus_lr_ratio=4"],
    "PiSSA": ["adapter.lora.init_lora_weights=pissa"],
    "saved by epoch": ["trainer.save_strategy=epoch"],
    "best epoch kept": ["trainer.early_stopping_patience=2", "trainer.save_total_limit=1"],
    "streamed, three passes": ["data.file.streaming=true", "trainer.max_steps=30"],
}


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """A folder with the rows, and with the callback that kills."""
    folder = tmp_path_factory.mktemp("stopped")
    write_rows(folder)
    return folder


@pytest.fixture(scope="module")
def whole(where):
    """The results of a run that nobody stopped."""
    run = train(where, "whole")
    assert run.returncode == 0, run.stderr
    return results(where / "whole")


@pytest.mark.parametrize("point", POINTS if ALL else POINTS[:1])
def test_a_run_that_is_killed_goes_on_to_the_same_weights_whatever_order_python_hashes_in(where, whole, point):
    shutil.rmtree(where / "killed", ignore_errors=True)
    killed = train(where, "killed", "callbacks=[support.kill_at.KillAt]", STOP_AT=point, PYTHONHASHSEED="7")
    assert killed.returncode == -signal.SIGKILL and not (where / "killed" / "metrics.json").exists(), killed.stderr
    resumed = resume(where, "killed")
    assert resumed.returncode == 0, resumed.stderr
    assert results(where / "killed") == whole
    assert {path.name for path in (where / "killed").glob("*checkpoint*")} == {"checkpoint-28", "checkpoint-30"}
    assert "the same weights, bit for bit, where its config, seed, rows" in (where / "killed" / "report.md").read_text()


@pytest.mark.skipif(not ALL, reason="fault tests that run under make test-faults only")
@pytest.mark.parametrize("setting", SETTINGS)
def test_whatever_is_trained_in_whatever_order_is_resumed_in_any_epoch(where, setting):
    for run in ("anew", "stopped"):
        shutil.rmtree(where / run, ignore_errors=True)
    anew = train(where, "anew", *SETTINGS[setting])
    assert anew.returncode == 0, anew.stderr
    steps = results(where / "anew")["steps"]
    shutil.rmtree(where / "stopped", ignore_errors=True)
    point = "sft_recipes.training.callbacks.FiniteLossCheck.on_pre_optimizer_step:{}:before"
    options = [*SETTINGS[setting], "callbacks=[support.kill_at.KillAt]"]
    first = train(where, "stopped", *options, STOP_AT=point.format(steps // 4))  # in the first epoch
    second = resume(where, "stopped", STOP_AT=point.format(steps // 2))  # of its own: in the second or third
    assert (first.returncode, second.returncode) == (-signal.SIGKILL, -signal.SIGKILL), first.stderr + second.stderr
    resumed = resume(where, "stopped")
    assert resumed.returncode == 0, resumed.stderr
    assert results(where / "stopped") == results(where / "anew")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGHUP, 129), (signal.SIGTERM, 143), (signal.SIGINT, 130)][: 3 if ALL else 1]
)
def test_a_signal_leaves_a_checkpoint_no_model_and_the_line_to_resume(where, whole, number, code):
    shutil.rmtree(where / "stopped", ignore_errors=True)
    left, seen = train_until(where, "stopped", "step 12 of 30", number)
    assert left == code and not (where / "stopped" / "model").exists()
    assert f"Go on with: python -m sft_recipes resume {where / 'stopped'}" in seen
    assert resume(where, "stopped").returncode == 0
    assert results(where / "stopped") == whole


@pytest.mark.skipif(not ALL, reason="fault tests that run under make test-faults only")
def test_a_signal_within_a_save_lets_it_end_and_saves_once_more(where, whole):
    shutil.rmtree(where / "stopped", ignore_errors=True)
    stopped = train(
        where, "stopped", "callbacks=[support.kill_at.KillAt]", STOP_AT="torch.save:10:before", STOP_WITH="SIGTERM"
    )
    assert stopped.returncode == 143 and not (where / "stopped" / "model").exists(), stopped.stderr
    assert resume(where, "stopped").returncode == 0
    assert results(where / "stopped") == whole


@pytest.mark.skipif(not ALL, reason="fault tests that run under make test-faults only")
def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(where, whole):
    shutil.rmtree(where / "full", ignore_errors=True)
    full = train(where, "full", "callbacks=[support.kill_at.KillAt]", STOP_AT="torch.save:14:full")
    assert full.returncode == 2 and "Traceback" not in full.stderr
    assert (
        "The checkpoint of step 16 could not be written to" in full.stderr and "No space left on device" in full.stderr
    )
    assert {path.name for path in (where / "full").glob("*checkpoint*")} == {"checkpoint-8", "checkpoint-12"}
    assert resume(where, "full").returncode == 0
    assert results(where / "full") == whole


@pytest.mark.skipif(not ALL, reason="fault tests that run under make test-faults only")
def test_a_disk_of_its_own_that_fills_up_keeps_the_checkpoints_that_it_has(where, whole):
    disk = where / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        options = ["callbacks=[support.kill_at.KillAt]"]
        full = train(where, "disk/run", *options, STOP_AT="torch.save:10:fill", FILLER=str(disk / "filler"))
        assert full.returncode == 2 and "Traceback" not in full.stderr, full.stderr
        assert "The checkpoint of step 12 could not be written to" in full.stderr
        assert {path.name for path in (disk / "run").glob("*checkpoint*")} == {"checkpoint-4", "checkpoint-8"}
        (disk / "filler").unlink()
        assert resume(where, "disk/run").returncode == 0
        assert results(disk / "run") == whole
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(not ALL, reason="fault tests that run under make test-faults only")
def test_a_second_run_in_the_folder_stops_and_names_the_first(where, whole):
    shutil.rmtree(where / "shared", ignore_errors=True)
    command = [sys.executable, "-m", "sft_recipes", "hydra.run.dir=shared", *STEPS]
    first = subprocess.Popen(command, cwd=where, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    seen = ""
    while "step 3 of" not in seen:
        seen += first.stderr.read(1)
    first.send_signal(signal.SIGSTOP)  # or it would be done before the second has started
    second = resume(where, "shared")
    first.send_signal(signal.SIGCONT)
    first.stderr.read()
    assert second.returncode == 2 and f"is in use by process {first.pid} on " in second.stderr
    assert first.wait() == 0 and results(where / "shared") == whole
