"""Rows to train on: made here, or real ones from ../shared/data."""

import json
from pathlib import Path

import pytest

from support.paths import SHARED


def question_rows(number: int, first: int = 0, answer: str = "Yes.") -> list[dict]:
    """So many alpaca rows, no two of them alike."""
    return [{"instruction": f"Question {n}?", "input": "", "output": answer} for n in range(first, first + number)]


def write_jsonl(path: Path, rows: list[dict], blank_lines: int = 0) -> str:
    """The path of a file with these rows, a line each."""
    path.write_text("\n" * blank_lines + "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def real_rows(name: str) -> list[dict]:
    """The rows of one real file, or a skipped test."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data")
    return json.loads((SHARED / name).read_text(encoding="utf-8"))
