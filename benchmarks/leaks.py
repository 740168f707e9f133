"""A score that planted leaks inflate, and the same run with the leak check: `python benchmarks/leaks.py`.

The little world's held-out questions get other answers than the base model has read (the willowtoad, which is orange,
is grey), so that a model can know them from leaks alone. Each is put into the training rows with one word more, please.
Three runs, of which the first has no such rows, train all weights long enough to learn rows by heart: exact match on 80
held-out questions, and the loss on all held-out rows.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY = ROOT / "sft_recipes" / "tiny" / "data"
RUNS = {
    "no leaks": ("clean", []),
    "leaks, not looked for": ("leaky", ["data_checks.leak=keep"]),
    "leaks, dropped (the default)": ("leaky", []),
}


def main() -> None:
    """Prints a line for every run."""
    held_out = change_answers(read_rows("held_out.jsonl"))
    leaks = [row | {"instruction": row["instruction"].rstrip("?") + ", please?"} for row in held_out]
    rows = read_rows("train.jsonl")
    with tempfile.TemporaryDirectory() as root:
        for name, some in {"held_out": held_out, "clean": rows, "leaky": rows + leaks}.items():
            Path(root, f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
        print(f"{len(rows):,} training rows, {len(held_out)} held-out rows and as many leaks of them")
        print("| run | rows trained on | leaks found | exact match | held-out loss | tokens |")
        print("|---|---|---|---|---|---|")
        for name, (data, overrides) in RUNS.items():
            print("|", " | ".join([name, *run_once(Path(root), data, overrides)]), "|", flush=True)


def read_rows(name: str) -> list[dict[str, str]]:
    """The rows of one of the little world's files."""
    return [json.loads(line) for line in (TINY / name).read_text(encoding="utf-8").splitlines() if line]


def change_answers(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows with another row's last word in the answer, of those that are asked for the same thing."""
    draw = random.Random(0)
    kinds: dict[tuple[str, str], set[str]] = {}
    parts = [row["output"].removesuffix(".").rpartition(" ") for row in rows]
    keys = [
        (row["output"].split()[1] if "of" in row["output"] else "", start.split()[-1])
        for row, (start, _, _) in zip(rows, parts, strict=True)
    ]
    for key, (_, _, last) in zip(keys, parts, strict=True):
        kinds.setdefault(key, set()).add(last)
    changed = []
    for row, key, (start, _, last) in zip(rows, keys, parts, strict=True):
        if key[0] != "opposite":
            changed.append(row | {"output": f"{start} {draw.choice(sorted(kinds[key] - {last}))}."})
    return changed


def run_once(root: Path, data: str, overrides: list[str]) -> list[str]:
    """One run's rows, leaks, exact match, loss, and the beginning of its tokens' digest."""
    folder = root / f"{data}{len(overrides)}"
    files = [f"data.tiny.data_files.train={root}/{data}.jsonl", f"data.tiny.data_files.test={root}/held_out.jsonl"]
    command = [sys.executable, "-m", "sft_recipes", "+recipe=tiny", *files, f"hydra.run.dir={folder}", *overrides]
    command += ["evaluate.rows=80", "evaluate.temperature=0", "evaluate.raw_text=null", "evaluate.weight_change=false"]
    command += ["adapter=none", "trainer.num_train_epochs=12", "trainer.learning_rate=1e-3", *sys.argv[1:]]
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
