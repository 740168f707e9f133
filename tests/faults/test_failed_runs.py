"""Runs that fail on the way, in this process: one line that says what happened, no work lost, and the way on."""

import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sft_recipes import train as train_module
from sft_recipes.modeling import save_load
from sft_recipes.training import checkpoints
from sft_recipes.training.resumable_trainer import StopOnSignal
from sft_recipes.training.trainer import SupervisedTrainer
from support.commands import read_metrics
from support.stopped_runs import STEPS, write_rows

RUN = [*STEPS, "hydra.run.dir=run", "trainer.max_steps=4", "trainer.save_steps=1", "evaluate.rows=0"]


@pytest.fixture
def run(command, tmp_path):
    """`run("key=value")` is the exit code and stderr of a run of four steps, each of which is saved."""
    write_rows(tmp_path)
    return lambda *options: command(*RUN, *options)[::2]


def fail_in_step(monkeypatch, number: int, outcome) -> None:
    """Lets the given step's micro-batch raise, or have the loss that is given."""
    real, calls = SupervisedTrainer.training_step, []

    def step(self, *arguments, **options):
        calls.append(1)
        if len(calls) != number:
            return real(self, *arguments, **options)
        if isinstance(outcome, Exception):
            raise outcome
        real(self, *arguments, **options)
        self.loss_check.add(torch.tensor(outcome))
        return torch.tensor(outcome)

    monkeypatch.setattr(SupervisedTrainer, "training_step", step)


def steps_saved() -> list[str]:
    return sorted(path.name for path in Path("run").glob("checkpoint-*"))


def test_out_of_memory_names_the_step_the_estimate_and_three_settings_in_order(run, command, monkeypatch):
    with monkeypatch.context() as patched:
        fail_in_step(patched, 3, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
        code, said = run()
    line = said.strip().splitlines()[-1]
    assert code == 2 and "Traceback" not in said and "Out of memory in training step 3: it was estimated at " in line
    first, second, third = (line.index(words) for words in (
        "1. trainer.per_device_train_batch_size=1 trainer.gradient_accumulation_steps=4;",
        "2. trainer.activation_checkpointing=true;", "3. adapter=qlora."))  # fmt: skip
    assert first < second < third and line.endswith("checkpoint-2 is of before it and is kept.")
    assert steps_saved() == ["checkpoint-1", "checkpoint-2"]
    assert command("resume", "run")[0] == 0 and read_metrics(Path("run"))["steps"] == 4


@pytest.mark.parametrize(("place", "error"), [
    ("start_trainer", torch.OutOfMemoryError("CUDA out of memory.")),
    ("measure_base", RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")),
])  # fmt: skip
def test_out_of_memory_before_training_says_so(run, monkeypatch, place, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(train_module, place, fail)
    code, said = run()
    assert code == 2 and "Out of memory while the base was loaded and measured: " in said.strip().splitlines()[-1]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint_and_names_it(run, command, monkeypatch, loss):
    with monkeypatch.context() as patched:
        fail_in_step(patched, 3, loss)
        code, said = run()
    assert code == 2 and f"The loss is {loss} in step 3; no model is saved." in said
    assert said.strip().endswith("run/checkpoint-2 is of before it and is kept.")
    assert steps_saved() == ["checkpoint-1", "checkpoint-2"] and not Path("run/model").exists()
    assert command("resume", "run")[0] == 0 and read_metrics(Path("run"))["steps"] == 4


def test_a_disk_without_room_for_the_next_checkpoint_stops_before_it_is_written(run, command, monkeypatch):
    with monkeypatch.context() as patched:
        room = SimpleNamespace(free=2**30)
        patched.setattr(checkpoints.shutil, "disk_usage", lambda _: room)
        real = SupervisedTrainer.training_step

        def step(self, *arguments, **options):
            room.free = 2**30 if self.state.global_step < 2 else 2**20
            return real(self, *arguments, **options)

        patched.setattr(SupervisedTrainer, "training_step", step)
        code, said = run()
    line = said.strip().splitlines()[-1]
    assert code == 2 and "The checkpoint of step 3 could not be written to " in line
    assert "which has 1.0 MiB free: it takes about 1.0 MiB. Earlier checkpoints are as they were." in line
    assert steps_saved() == ["checkpoint-1", "checkpoint-2"] and not list(Path("run").glob(".checkpoint*"))
    assert command("resume", "run")[0] == 0 and read_metrics(Path("run"))["steps"] == 4


def test_a_disk_that_is_full_when_the_model_is_saved_is_one_line_and_the_run_goes_on(run, command, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(
            train_module, "save_model", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        code, said = run()
    line = said.strip().splitlines()[-1]
    assert code == 2 and "The model could not be written to " in line and "No space left on device" in line
    assert not Path("run/metrics.json").exists()
    assert command("resume", "run")[0] == 0 and Path("run/model").is_dir()


def test_a_run_that_was_stopped_before_its_report_gets_it_and_is_not_trained_again(run, command):
    assert run()[0] == 0
    weights = Path("run/model/adapter_model.safetensors").stat().st_mtime_ns
    report = Path("run/report.md").read_text()
    for name in ("report.md", "report.html"):
        Path("run", name).unlink()
    assert command("resume", "run")[0] == 0
    assert Path("run/report.html").is_file() and Path("run/report.md").read_text() == report
    assert Path("run/model/adapter_model.safetensors").stat().st_mtime_ns == weights
    code, _, said = command("resume", "run", "trainer.max_steps=1")  # fewer than it has made
    assert code == 2 and "is finished" in said and Path("run/report.md").read_text() == report
    for checkpoint in Path("run").glob("checkpoint-*"):  # without one, more steps would be those of another model
        shutil.rmtree(checkpoint)
    for more in ([], ["trainer.max_steps=9"]):
        code, _, said = command("resume", "run", *more)
        assert code == 2 and "is finished" in said
    assert Path("run/model/adapter_model.safetensors").stat().st_mtime_ns == weights


def test_a_push_is_checked_before_the_model_loads(run, monkeypatch):
    loaded = []
    monkeypatch.setattr(train_module, "load_model", lambda *_: loaded.append(1))
    monkeypatch.setattr(save_load, "whoami", lambda **_: (_ for _ in ()).throw(ConnectionError("no route to the hub")))
    code, said = run("trainer.push_to_hub=true")
    assert code == 2 and not loaded
    assert "trainer.push_to_hub=true: no route to the hub. Log in with `hf auth login`" in " ".join(said.split())


def test_a_push_that_fails_leaves_the_model_and_the_line_to_repeat_it(run, monkeypatch):
    monkeypatch.setattr(save_load, "whoami", lambda **_: {"name": "me"})
    monkeypatch.setattr(save_load, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="me/mine", url="…"))
    monkeypatch.setattr(save_load, "upload_folder", lambda **_: (_ for _ in ()).throw(ConnectionError("hub is down")))
    code, said = run("trainer.push_to_hub=true", "trainer.hub_model_id=me/mine")
    folder = Path("run/model").resolve()
    assert code == 0 and (folder / "adapter_model.safetensors").is_file()
    assert f"The model is in {folder}, but was not pushed (hub is down)." in said
    assert f"Push it with: hf upload me/mine {folder}" in said


def test_a_push_uploads_the_model_with_its_card_and_nothing_else_of_the_run(run, monkeypatch):
    sent = []
    monkeypatch.setattr(save_load, "whoami", lambda **_: {"name": "me"})
    monkeypatch.setattr(
        save_load, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="me/mine", url="the hub/me/mine")
    )
    monkeypatch.setattr(save_load, "upload_folder", lambda **options: sent.append(options))
    code, said = run("trainer.push_to_hub=true")
    assert code == 0 and "Pushed to the hub/me/mine." in said
    assert [(one["repo_id"], Path(one["folder_path"])) for one in sent] == [("me/mine", Path("run/model").resolve())]
    pushed = {path.name for path in Path("run/model").iterdir()}
    assert {"README.md", "adapter_model.safetensors", "tokenizer.json"} <= pushed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_is_taken_once_and_one_that_is_ignored_stays_ignored(number):
    before = signal.getsignal(number)
    stop = StopOnSignal()
    with stop.listening():
        signal.raise_signal(number)
        assert stop.received == number and signal.getsignal(number) == before
    try:
        signal.signal(number, signal.SIG_IGN)
        stop = StopOnSignal()
        with stop.listening():
            signal.raise_signal(number)
            assert stop.received == 0
    finally:
        signal.signal(number, before)
