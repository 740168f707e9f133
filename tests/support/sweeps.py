"""Sweeps in a process of their own."""

import subprocess
from pathlib import Path

from support.commands import SHORT_ROWS_RUN
from support.processes import Command


def spawn_sweep(where: Path, callback: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """A sweep in `sweep` of short runs on rows.jsonl, with the class `Callback` of the given source."""
    (where / "swept.py").write_text(callback)
    (where / "rows.jsonl").write_text('{"instruction": "Name one.", "output": "It is one."}\n' * 4)
    typed = ["-m", *SHORT_ROWS_RUN, "callbacks=[swept.Callback]", "hydra.sweep.dir=sweep", *arguments]
    return Command(where, *typed, **environment).wait()
