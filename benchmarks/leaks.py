"""A score that planted leaks inflate, and the same run with the leak check: `python benchmarks/leaks.py`.

The little world's held-out questions are put into its training rows, each with one word more (`please`). Three runs of
the demo, of which the first has no such rows: exact match on 80 held-out questions, and the loss on all held-out rows.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY = ROOT / "sft_recipes" / "tiny" / "data"
RUNS = {
    "no leaks": ("clean", ["data_checks.leak=drop"]),
    "264 leaks, not looked for": ("leaky", ["data_checks.leak=keep"]),
    "264 leaks, dropped (the default)": ("leaky", []),
}


def main() -> None:
    """Prints a line for every run."""
    with tempfile.TemporaryDirectory() as root:
        rows = [line for line in (TINY / "train.jsonl").read_text(encoding="utf-8").splitlines() if line]
        Path(root, "clean.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        Path(root, "leaky.jsonl").write_text("\n".join(rows + plant_leaks()) + "\n", encoding="utf-8")
        print(
            "| run | rows trained on | leaks found | exact match | held-out loss | tokens |\n|---|---|---|---|---|---|"
        )
        for name, (data, overrides) in RUNS.items():
            print("|", " | ".join([name, *run_once(Path(root), data, overrides)]), "|", flush=True)


def plant_leaks() -> list[str]:
    """A line for every held-out row, which asks the same a little more kindly."""
    lines = (TINY / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line]
    return [json.dumps(row | {"instruction": row["instruction"].rstrip("?") + ", please?"}) for row in rows]


def run_once(root: Path, data: str, overrides: list[str]) -> list[str]:
    """One run's rows, leaks, exact match, loss, and the beginning of its tokens' digest."""
    folder = root / f"{data}{len(overrides)}"
    command = [sys.executable, "-m", "sft_recipes", "+recipe=tiny", f"data.tiny.data_files.train={root}/{data}.jsonl"]
    command += ["trainer.num_train_epochs=2", "evaluate.rows=80", "evaluate.temperature=0", "evaluate.raw_text=null"]
    command += ["evaluate.weight_change=false", f"hydra.run.dir={folder}", *overrides]
    done = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    metrics, checks = (json.loads((folder / name).read_text()) for name in ("metrics.json", "supervision.json"))
    source = checks["sources"]["tiny"]
    found = source["problems"].get("leak", {"rows": 0})["rows"]
    scores = [f"{metrics['exact_match']:.3f}", f"{metrics['eval_loss']:.3f}", checks["digest"]["sha256"][:8]]
    return [f"{source['kept']:,}", str(found), *scores]


if __name__ == "__main__":
    main()
