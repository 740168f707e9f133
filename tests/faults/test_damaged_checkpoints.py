"""Checkpoints that are damaged: each is named and passed over, and the run goes on from an earlier one or anew."""

import shutil
import signal
from itertools import cycle
from pathlib import Path

import pytest

from support.stopped_runs import KILLABLE, NEEDS_ALL_FAULTS, checkpoints, results, resume, train

pytestmark = NEEDS_ALL_FAULTS
FILES = (
    "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "manifest.json", "optimizer.pt",
    "progress.json", "rng_state.pth", "scheduler.pt", "tokenizer.json", "tokenizer_config.json", "trainer_state.json",
)  # fmt: skip
DAMAGES = {
    "missing": None,
    "empty": lambda content: b"",
    "short": lambda content: content[: len(content) // 2],
    "zeroed": lambda content: bytes(len(content)),
    "one bit turned": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
}
WHOLE = {"checkpoint-28", "checkpoint-30"}
LEFTOVERS = {  # what lies beside the checkpoints of the steps 20 and 24, and stays
    "an empty folder": (lambda run: (run / "checkpoint-26").mkdir(), set()),
    "a file": (lambda run: (run / "checkpoint-26").write_text("not a folder"), {"checkpoint-26"}),
    "a link to nothing": (lambda run: (run / "checkpoint-26").symlink_to("nowhere"), {"checkpoint-26"}),
    "a folder of the user's": (lambda run: (run / "checkpoint-last").mkdir(), {"checkpoint-last"}),
    "one that the user moved aside": (
        lambda run: (run / "checkpoint-24").rename(run / "checkpoint-24.bak"), {"checkpoint-24.bak"}
    ),
    "one without its manifest": (lambda run: (copy(run, "checkpoint-26") / "manifest.json").unlink(), set()),
    "one in the making": (lambda run: copy(run, ".checkpoint_in_the_making/checkpoint-26"), set()),
}  # fmt: skip


@pytest.fixture(scope="session")
def killed(where):
    """The folder of a run that was killed behind its checkpoints of the steps 20 and 24."""
    point = "sft_recipes.training.callbacks.FiniteLossCheck.on_pre_optimizer_step:26:before"
    run = train(where, "killed", KILLABLE, STOP_AT=point)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert checkpoints(where / "killed") == {"checkpoint-20", "checkpoint-24"}
    return where / "killed"


@pytest.fixture
def run(where, killed):
    """A copy of that folder."""
    shutil.rmtree(where / "damaged", ignore_errors=True)
    return shutil.copytree(killed, where / "damaged")


def copy(run: Path, name: str) -> Path:
    return shutil.copytree(run / "checkpoint-24", run / name)


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if DAMAGES[kind]:
        path.write_bytes(DAMAGES[kind](content))


def test_every_file_of_a_checkpoint_is_damaged_here(killed):
    assert tuple(sorted(path.name for path in (killed / "checkpoint-24").iterdir())) == FILES


# tests/training/test_checkpoints.py has the other kinds: here each file has one, since a resume takes seconds
@pytest.mark.parametrize(("name", "kind"), zip(FILES, cycle(DAMAGES), strict=False))
def test_a_damaged_file_is_named_and_its_checkpoint_passed_over(where, whole, run, name, kind):
    damage(run / "checkpoint-24" / name, kind)
    resumed = resume(where, run.name)
    assert resumed.returncode == 0, resumed.stderr
    (said,) = [line for line in resumed.stderr.splitlines() if "is passed over" in line]
    assert f"{run / 'checkpoint-24'} is passed over: " in said and name in said
    assert results(run) == whole and checkpoints(run) == WHOLE


def test_a_run_whose_checkpoints_are_all_damaged_begins_anew(where, whole, run):
    damage(run / "checkpoint-20" / "optimizer.pt", "short")
    damage(run / "checkpoint-24" / "rng_state.pth", "missing")
    resumed = resume(where, run.name)
    assert resumed.returncode == 0 and resumed.stderr.count("is passed over") == 2, resumed.stderr
    assert "has no whole checkpoint to resume from: training begins anew." in resumed.stderr
    assert results(run) == whole and checkpoints(run) == WHOLE


@pytest.mark.parametrize("kind", LEFTOVERS)
def test_what_lies_beside_whole_checkpoints_is_in_nobody_s_way(where, whole, run, kind):
    leave, stays = LEFTOVERS[kind]
    leave(run)
    resumed = resume(where, run.name)
    assert resumed.returncode == 0, resumed.stderr
    assert results(run) == whole
    assert checkpoints(run) == WHOLE | stays
