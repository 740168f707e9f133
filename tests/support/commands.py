"""The command, run in this process, and what it leaves; tests/support/processes.py has it in one of its own."""

import contextlib
import io
import json
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


def read_metrics(folder: Path) -> dict:
    """What a run measured."""
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
