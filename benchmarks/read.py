"""Local files to Python rows, by `datasets.load_dataset` and by us: `python benchmarks/read.py`.

Every reading has a process of its own, so that its peak of memory is its own, and a cache of its own, so that nothing
was read before. The clock runs from the file to the last row in the hands of a formatter; imports are not counted.
"""

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIDES = ("load_dataset", "ours")
WORDS = [
    "the",
    "river",
    "rises",
    "in",
    "hills",
    "where",
    "early",
    "fog",
    "keeps",
    "small",
    "birds",
    "quiet",
    "until",
    "noon",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many counts")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)  # in a process of its own: who reads which file
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(*options.side)))
        return
    from prepare import machine  # which loads TRL, and the processes that are measured do without

    print(f"{machine()}\n{options.rows:,} rows, median of {options.rounds}\n")
    print(f"{'file':18} {'MiB':>6}  {'side':12} {'seconds':>8} {'CPU':>7} {'peak MiB':>9}   ours / load_dataset")
    with tempfile.TemporaryDirectory() as folder:
        for path in write_files(Path(folder), options.rows):
            compare(path, options.rows, options.rounds)


def compare(path: Path, rows: int, rounds: int) -> None:
    """Prints a line for each side; the sides take turns."""
    found = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            found[side].append(in_own_process(side, path))
            assert found[side][-1]["rows"] == rows, (side, path, found[side][-1])
    medians = {
        side: {key: sorted(each[key] for each in counts)[rounds // 2] for key in counts[0]}
        for side, counts in found.items()
    }
    for side, median in medians.items():
        ratios = ""
        if side == "ours":
            names = {"seconds": "time", "cpu": "CPU", "mib": "memory"}
            found = (f"{label} {median[key] / medians['load_dataset'][key]:.2f}" for key, label in names.items())
            ratios = f"   {', '.join(found)}"
        figures = f"{median['seconds']:8.2f} {median['cpu']:7.2f} {median['mib']:9.0f}"
        print(f"{path.name:18} {path.stat().st_size / 2**20:6.1f}  {side:12} {figures}{ratios}", flush=True)


def in_own_process(side: str, path: Path) -> dict[str, float]:
    """What `measure` gives in a new process with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--side", side, str(path)]
        done = subprocess.run(command, env=os.environ | {"HF_HOME": cache}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(side: str, path: str) -> dict[str, float]:
    """Seconds, CPU seconds, and the peak of memory above the imports', of reading a file and going over its rows."""
    import datasets

    from sft_recipes.config.options import Source
    from sft_recipes.data.sources import load_rows

    datasets.disable_progress_bars()
    source = Source(data_files=path)
    kind = "csv" if ".csv" in path else "json"
    Path("/proc/self/clear_refs").write_text("5")  # Linux begins the peak anew; getrusage would keep that of imports
    before, start, used, count = peak_mib(), time.perf_counter(), time.process_time(), 0
    if side == "ours":
        rows = load_rows("data.file", source, "train")
        for _ in rows.records(range(len(rows))):
            count += 1
    else:
        for _ in datasets.load_dataset(kind, data_files=path, split="train"):
            count += 1
    cpu = time.process_time() - used  # of all threads; other work on the machine does not count in it
    return {"seconds": time.perf_counter() - start, "cpu": cpu, "mib": peak_mib() - before, "rows": count}


def peak_mib() -> float:
    """The most memory that this process has held since the count began."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def write_files(folder: Path, number: int) -> list[Path]:
    """The same questions and answers as JSON Lines and csv, one array, and conversations of several turns."""
    draw = random.Random(0)
    rows = [{"instruction": say(draw, 20), "input": "", "output": say(draw, 60)} for _ in range(number)]
    paths = [folder / name for name in ("alpaca.jsonl", "alpaca.json", "alpaca.csv", "chat.jsonl")]
    with open(paths[0], "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    with open(paths[1], "w", encoding="utf-8") as file:
        json.dump(rows, file, indent=1)
    with open(paths[2], "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with open(paths[3], "w", encoding="utf-8") as file:
        for row in rows:
            turns = [("user", row["instruction"]), ("assistant", row["output"])] * 2
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return paths


def say(draw: random.Random, words: int) -> str:
    """A text of up to so many words."""
    return " ".join(draw.choices(WORDS, k=draw.randint(1, words))).capitalize() + "."


if __name__ == "__main__":
    main()
