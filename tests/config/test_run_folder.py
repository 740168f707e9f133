"""Whose folder a run writes into: a typo leaves none, and no run is written over in silence."""

import re

import pytest

from sft_recipes import compose
from sft_recipes.config.run_folder import holds_run, own_folder
from sft_recipes.training.setup import open_run_folder
from support.configs import error_of

LINE = "run holds a run already. Write another folder, or overwrite=true to replace the run.\n"
# What a run leaves, as the README lists it
FILES = ("metrics.json", "supervision.json", "answers.jsonl", "samples.jsonl", "report.md", "report.html", "loss.png",
         "weight_change.png", "model/config.json", "checkpoint-4/config.json", "runs/events", "error.txt")  # fmt: skip
OWN = ("notes.txt", "my.png", "checkpoint-2.bak/config.json", ".metrics.json.mine")  # of the user's, beside it


@pytest.fixture
def old_run(tmp_path):
    """The folder of a finished run, with some files of the user's beside the run's."""
    for name in (*FILES, ".hydra/config.yaml", "sft_recipes.log", *OWN):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("old")
    return tmp_path / "run"


def files_of(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("typed", ["seed=abc", "trainer.learning_ratee=1", "data.file.data_files=rows.jsonl"])
def test_a_mistake_leaves_no_folder(command, tmp_path, typed):
    assert command("+recipe=tiny", typed)[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_mistake_in_a_primary_config_without_ours_leaves_no_folder(command, tmp_path):
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "bare.yaml").write_text("name: bare\n")
    assert command("-cd", "my", "-cn", "bare")[0] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "my"}


def test_a_mistake_leaves_the_folders_of_other_runs(command, tmp_path):
    (tmp_path / "outputs" / "other").mkdir(parents=True)
    command("+recipe=tiny", "seed=abc")
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["other"]


def test_the_folder_of_a_run_is_refused_and_left_as_it_is(command, old_run):
    before = files_of(old_run)
    assert command("hydra.run.dir=run") == (2, "", LINE)
    assert files_of(old_run) == before and {(old_run / name).read_text() for name in before} == {"old"}


def test_with_overwrite_what_the_run_wrote_is_removed_and_nothing_else(command, old_run, monkeypatch):
    monkeypatch.setattr("sft_recipes.train.main", lambda *_: 0.0)
    assert command("hydra.run.dir=run", "overwrite=true")[0] == 0
    hydras = {".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", "sft_recipes.log"}
    assert files_of(old_run) == {*OWN} | hydras
    assert "old" not in {(old_run / name).read_text() for name in hydras}


def test_what_a_killed_run_was_writing_is_removed_by_the_next_one_in_its_folder(old_run):
    before = files_of(old_run)
    for name in (".metrics.json.4711", ".report.html.12"):
        (old_run / name).write_text("{")
    with own_folder(old_run):
        pass
    assert files_of(old_run) == before


def test_a_folder_that_a_user_moved_a_checkpoint_into_holds_no_run(tmp_path):
    (tmp_path / "checkpoint-2.bak").mkdir()
    assert not holds_run(tmp_path)
    (tmp_path / "checkpoint-2").mkdir()
    assert holds_run(tmp_path)


def test_a_lock_that_is_a_link_leaves_what_it_points_to(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "mine.txt")
    with own_folder(tmp_path / "run"):
        pass
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_run_that_is_still_writing_is_not_overwritten(command, old_run):
    with own_folder(old_run):
        code, _, said = command("hydra.run.dir=run", "overwrite=true")
    assert code == 2 and re.fullmatch(r"run is in use by process \d+ on \S+\. Wait for it, or name .*\n", said)
    assert (old_run / "metrics.json").read_text() == "old"


def test_a_sweep_writes_beside_the_runs_of_its_folder(command, old_run, tmp_path, monkeypatch):
    monkeypatch.setattr("sft_recipes.train.main", lambda *_: 0.0)
    (tmp_path / "sweep").mkdir()
    before = files_of(old_run)
    old_run = old_run.rename(tmp_path / "sweep" / "0")
    assert command("-m", "seed=1,2", "hydra.sweep.dir=sweep")[0] == 0
    assert files_of(old_run) == before and {(old_run / name).read_text() for name in before} == {"old"}
    assert {path.name for path in (tmp_path / "sweep").glob("[0-9]*")} == {"0", "1", "2"}


def test_a_run_that_is_resumed_writes_into_its_own_folder(command, old_run, monkeypatch):
    monkeypatch.setattr("sft_recipes.train.main", lambda *_: 0.0)
    assert command("hydra.run.dir=run", "trainer.resume_from_checkpoint=run/checkpoint-4")[0] == 0
    assert (old_run / "metrics.json").is_file()


@pytest.mark.parametrize("mode", ["preview", "evaluate"])
def test_what_trains_nothing_does_not_write_over_the_run_to_resume(command, old_run, mode):
    resumed = ["hydra.run.dir=run", "trainer.resume_from_checkpoint=true"]
    code, _, said = command("+recipe=tiny", f"mode={mode}", *resumed)
    assert code == 2 and said.strip().endswith(
        "holds a run already. Write another folder, or overwrite=true to replace the run."
    )
    assert {path.read_text() for path in old_run.rglob("*") if path.is_file()} == {"old"}


@pytest.mark.parametrize("typed", ["hydra.run.dir=other", "overwrite=true", "mode=evaluate", "++mode=preview"])
def test_a_run_is_resumed_as_training_in_its_own_folder(command, old_run, typed):
    line = f"{typed}: a run that is resumed trains on in its own folder. Leave that out.\n"
    assert command("resume", "run", "trainer.max_steps=9", typed) == (2, "", line)


def test_a_folder_with_other_files_or_a_refused_run_is_no_run(command, tmp_path, monkeypatch):
    monkeypatch.setattr("sft_recipes.train.main", lambda *_: 0.0)
    assert command("hydra.run.dir=run", "seed=abc")[0] == 2
    (tmp_path / "run" / "notes.txt").touch()
    assert command("hydra.run.dir=run")[0] == 0


def test_from_python_the_folder_of_a_run_is_refused_too(old_run):
    line = error_of(open_run_folder, compose("tiny"), old_run)
    assert line == f"{old_run} holds a run already. Write another folder, or overwrite=true to replace the run."
    assert open_run_folder(compose("tiny", "overwrite=true"), old_run) == old_run
    assert files_of(old_run) == {*OWN, ".hydra/config.yaml"}
    assert "name: tiny" in (old_run / ".hydra" / "config.yaml").read_text()


@pytest.mark.parametrize("typed", [["hydra.run.dir=file/x"], ["-m", "seed=1,2", "hydra.sweep.dir=file/x"]])
def test_a_folder_that_cannot_be_made_is_one_line(command, tmp_path, typed):
    (tmp_path / "file").touch()
    line = "file/x cannot be written: Not a directory. Name another folder.\n"
    assert command("+recipe=tiny", *typed) == (2, "", line)
    assert error_of(open_run_folder, compose("tiny"), "file/x").startswith(f"{tmp_path}/file/x cannot be written")


@pytest.mark.parametrize(("typed", "key"), [(["seed=1"], "hydra.run.dir"), (["-m", "seed=1,2"], "hydra.sweep.dir")])
def test_an_empty_folder_is_not_the_current_one(command, tmp_path, typed, key):
    assert command("+recipe=tiny", *typed, f"{key}=") == (2, "", f"{key} is empty. Write {key}=DIR.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_no_folder_where_runs_go_is_one_line(command, tmp_path):
    (tmp_path / "outputs").touch()
    code, printed, said = command("+recipe=tiny")
    assert (code, printed, said.count("\n")) == (2, "", 1) and "cannot be written: " in said


def test_a_log_that_cannot_be_written_is_named(command, tmp_path):
    (tmp_path / "run" / "sft_recipes.log").mkdir(parents=True)
    line = f"[Errno 21] Is a directory: '{tmp_path}/run/sft_recipes.log'\n"
    assert command("+recipe=tiny", "hydra.run.dir=run") == (2, "", line)
