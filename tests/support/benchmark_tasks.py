"""Benchmark tasks for lm-eval that need no hub: fields of their YAML, and questions about the tiny model's world."""

import json
from pathlib import Path

import yaml

from support.paths import ROOT

CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
}


def write_task(folder: Path, name: str, rows: list[dict], **fields) -> str:
    """The path of a task's YAML in this folder, its rows in a jsonl beside it."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"data_files": {"test": str(folder / f"{name}.jsonl")}}
    values = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"} | fields
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return str(folder / f"{name}.yaml")


def world_questions(number: int = 24) -> list[dict]:
    """Held-out questions of the little world, each with its answer and the next three rows' answers."""
    lines = (ROOT / "sft_recipes" / "tiny" / "data" / "held_out.jsonl").read_text().splitlines()[: number + 3]
    rows = [json.loads(line) for line in lines]
    return [
        {
            "question": rows[place]["instruction"],
            "choices": [rows[(place + step) % len(rows)]["output"] for step in (1, 0, 2, 3)],
            "answer": 1,
        }
        for place in range(number)
    ]
