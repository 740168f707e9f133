"""Runs that are killed or stopped on the way, resumed, and compared with one that was not."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from support.paths import ROOT

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


def train(where: Path, run: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """The run of STEPS in a process of its own."""
    command = [sys.executable, "-m", "sft_recipes", f"hydra.run.dir={run}", *STEPS, *arguments]
    return subprocess.run(command, cwd=where, env=os.environ | FINDS_US | environment, capture_output=True, text=True)


def resume(where: Path, run: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """`python -m sft_recipes resume RUN`."""
    command = [sys.executable, "-m", "sft_recipes", "resume", run, *arguments]
    return subprocess.run(command, cwd=where, env=os.environ | FINDS_US | environment, capture_output=True, text=True)


def train_until(where: Path, run: str, line: str, number: signal.Signals, *arguments: str) -> tuple[int, str]:
    """The exit code and stderr of a run that gets a signal when it has logged `line`."""
    command = [sys.executable, "-m", "sft_recipes", f"hydra.run.dir={run}", *STEPS, *arguments]
    process = subprocess.Popen(command, cwd=where, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    seen = ""
    while line not in seen and (character := process.stderr.read(1)):
        seen += character
    process.send_signal(number)
    seen += process.stderr.read()
    return process.wait(), seen


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
