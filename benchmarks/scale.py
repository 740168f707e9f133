"""Time and memory of rows on their way to the trainer, by their number: `python benchmarks/scale.py`.

Each line is a process of its own. `anonymous` is its peak of memory that no file backs, above what it had after the
imports; the file that the rows are mapped from is shared by all processes of a machine and is given back when memory
is short. Rows are drawn at random, encoded by the embedded tokenizer, held out and checked as in a run, and packed.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

WORDS = [first + second for first in ("mor", "tel", "vas", "nib", "kur", "sol") for second in ("ane", "ilo", "ust")]
MAX_LENGTH = 2048
SIDES = {"encoded": "encoded and kept", "found": "found again", "streamed": "streamed"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=int, nargs="*", default=[20_000, 80_000, 320_000])
    parser.add_argument("--sides", default=",".join(SIDES), help="some of encoded, found, streamed")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(*options.child)))
        return
    print(f"{len(os.sched_getaffinity(0))} CPUs, load {os.getloadavg()[0]:.1f}")
    print("     rows                         tokens   seconds      CPU  anonymous  a token    all RSS")
    with tempfile.TemporaryDirectory() as folder:
        homes = {"SFT_RECIPES_CACHE": f"{folder}/cache", "HF_DATASETS_CACHE": f"{folder}/datasets"}
        for number in options.rows:
            path = Path(folder, f"{number}.jsonl")
            write_rows(path, number)
            for side in options.sides.split(","):
                command = [sys.executable, __file__, "--child", side, str(path)]
                done = subprocess.run(command, env=os.environ | homes, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(done.stderr)
                found = json.loads(done.stdout.splitlines()[-1])
                counts = f"{found['tokens']:11,}  {found['seconds']:8.1f}  {found['cpu']:7.1f}"
                sizes = [f"{found[kind] / 2**20:5,.0f} MiB" for kind in ("anonymous", "rss")]
                each = f"{found['anonymous'] / found['tokens']:5.1f} B"
                print(f"{number:9,}  {SIDES[side]:16}  {counts}  {sizes[0]}  {each}    {sizes[1]}", flush=True)


def write_rows(path: Path, number: int) -> None:
    """So many rows of 10 to 39 words, no two alike."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for row in range(number):
            words = [f"{draw.choice(WORDS)}{draw.randrange(1000)}" for _ in range(draw.randrange(10, 40))]
            answer = " ".join(words[6:]) + "."
            file.write(json.dumps({"instruction": f"{row}: {' '.join(words[:6])}?", "output": answer}) + "\n")


def measure(side: str, path: str) -> dict[str, Any]:
    """The seconds, the memory and the tokens of one way to the rows."""
    from sft_recipes.config.compose import compose
    from sft_recipes.config.curation_options import CurationOptions
    from sft_recipes.encoding.encoder import Encoder
    from sft_recipes.modeling.loading import load_tokenizer

    source = {"data_files": path, "streaming": side == "streamed", "held_out": 100}
    config = compose(None, "model=tiny", "data=file", "formatter=alpaca", "trainer.max_steps=1", data={"rows": source})
    config = replace(config, curation=CurationOptions(near_duplicates=None))  # which a run counts up to 20,000 rows
    encoder = Encoder(*load_tokenizer(config.model)[:2])
    make = stream_rows if side == "streamed" else load_rows
    usage, before = resource.getrusage(resource.RUSAGE_SELF), memory("RssAnon")
    rss, peak, ended = memory("VmRSS"), [before], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            peak[0] = max(peak[0], memory("RssAnon"))

    threading.Thread(target=watch, daemon=True).start()
    start = time.perf_counter()
    tokens = make(config, encoder)
    seconds = time.perf_counter() - start
    ended.set()
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime
    all_rss = after.ru_maxrss * 1024 - rss
    return {"tokens": tokens, "seconds": seconds, "cpu": cpu, "anonymous": peak[0] - before, "rss": all_rss}


def load_rows(config: Any, encoder: Any) -> int:
    """How many tokens there are, once all rows are packed and digested as in a run."""
    from sft_recipes.data.prepare import load_data
    from sft_recipes.data.token_rows import count_tokens

    return count_tokens(load_data(config, encoder, MAX_LENGTH, packing=True).packed)["tokens"]


def stream_rows(config: Any, encoder: Any) -> int:
    """How many tokens one pass of a stream has."""
    from sft_recipes.data.streaming import load_stream

    _, stream = load_stream(config, encoder, MAX_LENGTH, packing=True)
    return sum(len(row["input_ids"]) for row in stream.one_pass())


def memory(kind: str) -> int:
    """The bytes of this process that Linux counts under this name."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind + ":"))


if __name__ == "__main__":
    main()
