"""Who reads what is printed decides nothing: with an ASCII terminal, a closed pipe or a full disk a run is done all the same."""

import logging
import os
import subprocess
import sys

import pytest

from sft_recipes.config.secrets import TerminalFormatter
from support.commands import SHORT_ROWS_RUN, read_metrics

ROWS = '{"instruction": "Wie heißt ”drei“?", "output": "Trois, 三."}\n' * 4
WAYS = {  # of running a command, and what its stdout then has
    "PYTHONIOENCODING=ascii {} <&-": b"| Wie hei?t ?drei?? |",
    "PYTHONIOENCODING=latin-1 {}": "| Wie heißt ?drei?? |".encode("latin-1"),
    "{} | head -n 1": b"| tuned ",
    "{} > /dev/full": b"",
}


def run_in_bash(where, way: str, *arguments: str) -> subprocess.CompletedProcess:
    """The command run that way; a pipe's exit code is that of its first command to fail."""
    command = f'"$PYTHON" -m sft_recipes {" ".join(arguments)}'
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", way.format(command)], cwd=where, capture_output=True,
        env=os.environ | {"PYTHON": sys.executable},
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of one step with everything at once in its way, and what it wrote to stderr."""
    where = tmp_path_factory.mktemp("terminals")
    (where / "rows.jsonl").write_text(ROWS, encoding="utf-8")
    way = "PYTHONIOENCODING=ascii {} <&- > /dev/full"
    asked = [
        "data.held_out=1",
        "evaluate.rows=1",
        "evaluate.max_new_tokens=2",
        "curation=none",
        "data_checks.in_held_out=keep",
    ]
    done = run_in_bash(where, way, *SHORT_ROWS_RUN, "hydra.run.dir=run", *asked)
    assert done.returncode == 0, done.stderr
    return where / "run", done.stderr


def test_a_run_that_nobody_can_read_is_trained_saved_and_reported(run):
    folder, said = run
    assert read_metrics(folder)["steps"] == 1 and (folder / "model" / "model.safetensors").is_file()
    assert "Trois, 三." in (folder / "answers.jsonl").read_text(encoding="utf-8") and (folder / "report.html").is_file()
    assert b"Traceback" not in said and b"Error" not in said and said.isascii()


@pytest.mark.parametrize("way", WAYS)
def test_its_report_is_written_whoever_reads_it(run, way):
    folder, _ = run
    (folder / "report.html").unlink(missing_ok=True)
    done = run_in_bash(folder.parent, way, "report", "run")
    assert (done.returncode, done.stderr) == (0, b"") and (folder / "report.html").is_file()
    assert WAYS[way] in done.stdout


def test_a_log_line_is_folded_on_a_terminal_and_stays_whole_elsewhere(monkeypatch):
    text = f"{'word ' * 12}trainer.gradient_accumulation_steps=8 {'word ' * 12}end."
    record = logging.LogRecord("sft_recipes", logging.INFO, "", 0, f"{text}\n{'x' * 90}\nshort", None, None)
    monkeypatch.setenv("COLUMNS", "80")
    assert TerminalFormatter().format(record) == record.msg  # pytest's stderr is none
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    *folded, long, short = TerminalFormatter().format(record).split("\n")
    assert " ".join(folded) == text and max(map(len, folded)) <= 80 and len(folded) == 3
    assert (long, short) == ("x" * 90, "short")
