"""The command, run in this process or in one of its own, and what it leaves."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra

from sft_recipes.__main__ import main

# The memory estimate takes a fifth of so short a run, and has tests of its own.
# One step on rows.jsonl, which the fixture `command` writes
SHORT_ROWS_RUN = ["model=tiny", "data=file", "data.file.data_files=rows.jsonl", "trainer.max_steps=1", "trainer.max_length=128",
                  "evaluate.rows=0", "data.held_out=0", "trainer.activation_checkpointing=false",
                  "trainer.check_memory=false"]  # fmt: skip
# Four steps of the recipe tiny
SHORT_TINY_RUN = ["trainer.max_steps=4", "evaluate.rows=8", "evaluate.raw_text=null", "trainer.logging_steps=1",
                  "trainer.check_memory=false"]  # fmt: skip


def run_command(folder: Path, *arguments: str) -> tuple[int, str]:
    """Runs the command in this process, its run's folder given: its exit code and what it printed."""
    printed, code, before = io.StringIO(), 0, sys.argv
    sys.argv = ["sft_recipes", f"hydra.run.dir={folder}", *arguments]
    GlobalHydra.instance().clear()
    try:
        with contextlib.redirect_stdout(printed):
            main()
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
    return code, printed.getvalue()


def spawn_command(where: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "sft_recipes", *arguments],
        cwd=where, env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip


def spawn_sweep(where: Path, callback: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """A sweep in `sweep` of short runs on rows.jsonl, with the class `Callback` of the given source."""
    (where / "swept.py").write_text(callback)
    (where / "rows.jsonl").write_text('{"instruction": "Name one.", "output": "It is one."}\n' * 4)
    typed = ["-m", *SHORT_ROWS_RUN, "callbacks=[swept.Callback]", "hydra.sweep.dir=sweep", *arguments]
    return spawn_command(where, *typed, **environment)


def read_metrics(folder: Path) -> dict:
    """What a run measured."""
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
