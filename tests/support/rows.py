"""Rows to train on: made here, of tests/rows, or real ones of ../shared/data."""

import json
from pathlib import Path

import pytest

from support.paths import NEEDS_SHARED, ROOT, SHARED


def question_rows(number: int, first: int = 0, answer: str = "Yes.") -> list[dict]:
    """So many alpaca rows, no two of them alike."""
    return [{"instruction": f"Question {n}?", "input": "", "output": answer} for n in range(first, first + number)]


def write_jsonl(path: Path, rows: list[dict], blank_lines: int = 0) -> str:
    """The path of a file with these rows, a line each."""
    path.write_text("\n" * blank_lines + "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows_of(name: str) -> list[dict]:
    """The rows of a .jsonl of tests/rows or, where ../shared is there, of a .json of real ones; else the test is skipped."""
    if name.endswith(".jsonl"):
        lines = (ROOT / "tests" / "rows" / name).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]
    if not SHARED.is_dir():
        pytest.skip(NEEDS_SHARED)
    return json.loads((SHARED / name).read_text(encoding="utf-8"))
