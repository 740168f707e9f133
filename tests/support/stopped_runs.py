"""Runs that are killed or stopped on the way, resumed, and compared with one that was not."""

import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest

from support.paths import ALL_FAULTS, ROOT
from support.processes import Command

NEEDS_ALL_FAULTS = pytest.mark.skipif(not ALL_FAULTS, reason="fault tests that run under make test-faults only")
KILLABLE = "callbacks=[support.kill_at.KillAt]"  # at STOP_AT
FINDS_US = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}  # support.kill_at is a callback
# Forty rows in three epochs of ten steps, saved every fourth step
ROWS = [
    {"instruction": f"Name {n}{' very' * (n % 7)} things.", "output": f"It is {n * 7919 % 1000}."} for n in range(44)
]
STEPS = [
    "model=tiny", "model.chat_template=chatml", "data=file", "data.file.data_files=rows.jsonl", "data.held_out=4",
    "trainer.max_length=128", "trainer.per_device_train_batch_size=4", "trainer.gradient_accumulation_steps=1",
    "trainer.num_train_epochs=3", "trainer.learning_rate=1e-3", "trainer.logging_steps=3", "trainer.save_strategy=steps",
    "trainer.save_steps=4", "trainer.activation_checkpointing=false", "trainer.check_memory=false", "adapter=lora", "evaluate.rows=2",
    "evaluate.max_new_tokens=4", "evaluate.raw_text=null", "evaluate.weight_change=false",
]  # fmt: skip


def write_rows(folder: Path) -> None:
    """The rows that STEPS names, in the folder that the command is called in."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")


def start(where: Path, run: str, *arguments: str, **environment: str) -> Command:
    """The run of STEPS in a process of its own, started and not waited for."""
    return Command(where, f"hydra.run.dir={run}", *STEPS, *arguments, **FINDS_US | environment)


def train(where: Path, run: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """The run of STEPS, from its beginning to its end."""
    return start(where, run, *arguments, **environment).wait()


def resume(where: Path, run: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """`python -m sft_recipes resume RUN`."""
    return Command(where, "resume", run, *arguments, **FINDS_US | environment).wait()


def checkpoints(folder: Path) -> set[str]:
    """The names of its checkpoints, and of what is left of some."""
    return {path.name for path in folder.glob("*checkpoint*")}


def results(folder: Path) -> dict:
    """What two runs have in common that are the same: weights, losses, curve, tokens, answers and the rows' digest."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    timed = ("runtime", "per_second", "total_flos")
    curve = [{key: value for key, value in entry.items() if not any(word in key for word in timed)}
             for entry in metrics["history"]]  # fmt: skip
    weights = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "model").glob("*.safe*")}
    digest = json.loads((folder / "supervision.json").read_text(encoding="utf-8"))["digest"]
    kept = {key: metrics[key] for key in ("train_loss", "train_tokens", "steps", "eval_loss")}
    answers = (folder / "answers.jsonl").read_text(encoding="utf-8")
    return kept | {"curve": curve, "weights": weights, "digest": digest, "answers": answers}
