"""Sweeps in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

from support.commands import SHORT_ROWS_RUN


def spawn_sweep(where: Path, callback: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """A sweep in `sweep` of short runs on rows.jsonl, with the class `Callback` of the given source."""
    (where / "swept.py").write_text(callback)
    (where / "rows.jsonl").write_text('{"instruction": "Name one.", "output": "It is one."}\n' * 4)
    typed = ["-m", *SHORT_ROWS_RUN, "callbacks=[swept.Callback]", "hydra.sweep.dir=sweep", *arguments]
    # no child of a fork server, in which Hydra does not find the sweepers that an earlier test has imported
    command = [sys.executable, "-m", "sft_recipes", *typed]
    return subprocess.run(command, cwd=where, env=os.environ | environment, capture_output=True, text=True)
