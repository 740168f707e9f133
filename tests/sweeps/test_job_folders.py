"""A sweep that is started again does what is left of it, and no job is trained twice or written over."""

import json
from importlib import invalidate_caches
from pathlib import Path

import pytest

from sft_recipes import train
from support.commands import SHORT_ROWS_RUN, read_metrics

PRESSED_ONCE = """
import os, signal
from pathlib import Path
from transformers import TrainerCallback

class ControlC(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        pressed = Path("pressed")
        if args.seed == 2 and state.global_step == 2 and not pressed.exists():
            pressed.touch()
            os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.fixture
def steps(monkeypatch):
    """The seed and the step that each training of this test began with."""
    begun, before = [], train.SupervisedTrainer.restore_progress

    def watched(trainer):
        before(trainer)
        begun.append((trainer.args.seed, trainer.state.global_step))

    monkeypatch.setattr(train.SupervisedTrainer, "restore_progress", watched)
    return begun


@pytest.fixture
def made_up(monkeypatch):
    """The seeds of the jobs that were run, of which each leaves its metrics and trains nothing."""
    seeds = []

    def job(config, folder):
        seeds.append(config.seed)
        (folder / "metrics.json").write_text(json.dumps({"train_loss": float(config.seed)}))
        return float(config.seed)

    monkeypatch.setattr("sft_recipes.train.main", job)
    return seeds


def read_jobs_list(folder) -> list[str]:
    return json.loads((folder / "sweep.json").read_text())["jobs"]


def test_a_sweep_started_again_skips_what_finished_resumes_what_broke_off_and_adds_values(command, tmp_path, steps):
    (tmp_path / "pressed_once.py").write_text(PRESSED_ONCE)
    typed = ["-m", *SHORT_ROWS_RUN, "trainer.max_steps=4", "callbacks=[pressed_once.ControlC]", "hydra.sweep.dir=sweep"]
    code, printed, _ = command(*typed, "seed=1,2,3")
    assert code == 130 and "1 of 2 jobs finished." in printed and steps == [(1, 0), (2, 0)]
    first = (tmp_path / "sweep/0/metrics.json").read_bytes()
    code, printed, said = command(*typed, "seed=4,1,2,3")
    assert code == 0 and steps[2:] == [(4, 0), (2, 2), (3, 0)]
    assert "1 of 4 jobs finished earlier, not run again." in said
    assert "4 of 4 jobs finished." in printed and (tmp_path / "sweep/0/metrics.json").read_bytes() == first
    assert read_jobs_list(tmp_path / "sweep") == ["2", "0", "1", "3"]
    assert command(*typed[:-1], "seed=2", "hydra.sweep.dir=whole")[0] == 0
    resumed, whole = (read_metrics(tmp_path / folder)["train_loss"] for folder in ("sweep/1", "whole/0"))
    assert resumed == whole


def test_a_sweep_whose_jobs_all_finished_trains_nothing_and_returns_their_objectives(command, tmp_path, made_up):
    typed = ["-m", *SHORT_ROWS_RUN, "seed=1,2", "hydra.sweep.dir=sweep", "hydra.sweep.subdir=seed_${seed}"]
    _, first, _ = command(*typed)
    code, second, _ = command(*typed)
    assert code == 0 and made_up == [1, 2]
    assert first[first.index("2 of 2 jobs") :] == second[second.index("2 of 2 jobs") :]
    assert (tmp_path / "sweep/seed_1/metrics.json").is_file() and (tmp_path / "sweep/report.html").is_file()


def test_a_jobs_folder_may_have_any_name(command, tmp_path, made_up):
    typed = ["-m", *SHORT_ROWS_RUN, "seed=1", "hydra.sweep.dir=sweep", """hydra.sweep.subdir='größe, "a b" ${seed}'"""]
    assert command(*typed)[0] == command(*typed)[0] == 0 and made_up == [1]
    assert [path.parent.name for path in tmp_path.glob("sweep/*/metrics.json")] == ['größe, "a b" 1']


def test_the_report_is_of_this_sweeps_jobs_alone(command, tmp_path, monkeypatch):
    monkeypatch.setattr("sft_recipes.train.main", lambda *_: 0.0)
    typed = ["-m", *SHORT_ROWS_RUN, "hydra.sweep.dir=sweep"]
    command(*typed, "seed=1,2")
    _, printed, _ = command(*typed, "seed=3")
    assert printed == ""  # nothing of it trained
    (tmp_path / "sweep/2/metrics.json").write_text('{"train_loss": 1.5}')
    _, printed, _ = command("report", "sweep")
    assert printed.startswith(
        "1 of 1 job finished. Sorted by train_loss, the lowest first. In the folder, but not of this sweep: 0, 1.\n"
    )


def test_a_failed_job_is_run_again(command, tmp_path, steps):
    typed = ["-m", *SHORT_ROWS_RUN, "seed=1", "hydra.sweep.dir=sweep", "data.file.formatter.name=written_later.rows"]
    assert command(*typed)[0] == 2 and (tmp_path / "sweep/0/error.txt").is_file()
    (tmp_path / "written_later.py").write_text("def rows(row):\n    return {'text': row['output']}\n")
    invalidate_caches()  # a folder whose time is the same to the tick is not listed again
    assert command(*typed)[0] == 0 and read_jobs_list(tmp_path / "sweep") == ["0"]
    assert not (tmp_path / "sweep/0/error.txt").exists()


def test_overwrite_starts_the_sweep_anew(command, tmp_path, made_up):
    typed = ["-m", *SHORT_ROWS_RUN, "seed=1", "hydra.sweep.dir=sweep"]
    command(*typed)
    command(*typed, "overwrite=true")
    assert made_up == [1, 1] and read_jobs_list(tmp_path / "sweep") == ["0"]


def test_one_folder_for_two_jobs_is_refused(command):
    code, _, said = command("-m", *SHORT_ROWS_RUN, "seed=1,2", "hydra.sweep.dir=sweep", "hydra.sweep.subdir=all")
    assert code == 2 and said.startswith("hydra.sweep.subdir gives two jobs one folder, all.")


@pytest.mark.parametrize("outside", ["../x", "/tmp/x"])
def test_a_folder_outside_the_sweeps_is_refused(command, made_up, outside):
    code, _, said = command("-m", *SHORT_ROWS_RUN, "hydra.sweep.dir=sweep", f"hydra.sweep.subdir={outside}")
    line = f"hydra.sweep.subdir={outside} should be a folder within hydra.sweep.dir.\n"
    assert (code, made_up, said) == (2, [], line)


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("+sweep=optuna hydra.sweeper.n_jobs=0", "hydra.sweeper.n_jobs should be at least 1, not 0."),
        ("+sweep=optuna hydra.sweeper.n_trials=x", "hydra.sweeper.n_trials should be a whole number, not 'x'."),
        ("+sweep=optuna hydra.sweeper.direction=up", "hydra.sweeper.direction cannot be 'up'. Choices: maximize, minimize."),
        ("+sweep=halving hydra.sweeper.rungs=[0]", "hydra.sweeper.rungs should be above 0 and at most 1, not 0."),
        ("+sweep=halving hydra.sweeper.rungs=[x]", "hydra.sweeper.rungs[0] should be a number, not 'x'."),
        ("+sweep=halving hydra.sweeper.percentile=200", "hydra.sweeper.percentile should be above 0 and at most 100, not 200."),
        ("hydra/launcher=local_gpus hydra.launcher.n_jobs=-1", "hydra.launcher.n_jobs should be at least 1, not -1."),
        ("hydra/launcher=local_gpus hydra.launcher.n_jobs=x", "hydra.launcher.n_jobs should be a whole number or null, not 'x'."),
        ("+where=slurm", "Slurm's srun is not here. Start this on a machine of the cluster."),
    ],
)  # fmt: skip
def test_a_sweepers_and_a_launchers_values_are_checked_before_the_first_job(command, made_up, typed, line):
    pytest.importorskip({"+where=slurm": "hydra_plugins.hydra_submitit_launcher"}.get(typed, "optuna"))
    code, _, said = command("-m", *SHORT_ROWS_RUN, "hydra.sweep.dir=sweep", *typed.split())
    assert (code, made_up, said.splitlines()[-1]) == (2, [], line)


def test_what_is_for_a_sweeps_jobs_is_named_in_a_run_of_its_own(command, made_up):
    line = "+sweep=lr_epochs is for a sweep's jobs, and this is one run here. Write -m in front.\n"
    assert command(*SHORT_ROWS_RUN, "+sweep=lr_epochs", "hydra.run.dir=run") == (0, "", line)


def test_a_mistake_of_every_job_is_told_once_before_the_first_and_one_of_a_single_job_by_that_job(command, made_up):
    mistyped = "trainer.num_train_epoch is not a field of SFTConfig. Did you mean num_train_epochs?\n"
    assert command("-m", "+recipe=tiny", "seed=1,2", "trainer.num_train_epoch=1") == (2, "", mistyped)
    assert not Path("multirun").exists()
    code, printed, said = command("-m", "+recipe=tiny", "seed=-1,3")
    assert made_up == [3] and "seed should be" in said and "1 of 2 jobs finished" in printed


def test_what_a_config_warns_of_is_said_by_its_job_alone(command, made_up):
    said = command("-m", "+recipe=tiny", "adapter=none,lora", "adapter.lora.r=4", "hydra.sweep.dir=sweep")[2]
    assert said.count("adapter=none trains every weight") == 1 and made_up == [42, 42]
