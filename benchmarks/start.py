"""A run's start and its whole cost, ours beside a plain TRL script: `python benchmarks/start.py`.

Both sides train the embedded tiny model on the same rows, by turns and in processes of their own. Ours finds the base's
measurements and the encoded rows of an earlier run, as every run after the first does.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

from transformers import TrainerCallback

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "sft_recipes" / "tiny" / "model"
MARK = "START_BENCHMARK"  # where a side writes what it had used at the end of its first step, and when it began
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
)
TRAINER = {  # conf/trainer/small.yaml, by TRL's names
    "learning_rate": 2e-5, "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "num_train_epochs": 3,
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 8,
    "max_length": 2048, "train_sampling_strategy": "group_by_length", "eval_strategy": "epoch",
    "save_strategy": "epoch", "save_total_limit": 2, "report_to": "none",
}  # fmt: skip


class FirstStep(TrainerCallback):
    """Writes what the process has used when its first step is done: CPU seconds, and seconds since it was started."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        file, started = Path(os.environ[MARK]), float(os.environ[f"{MARK}_AT"])
        if not file.exists():
            file.write_text(json.dumps([cpu_seconds(resource.RUSAGE_SELF), time.time() - started]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1000, help="rows of the file, of which 2 %% are held out")
    parser.add_argument("--steps", type=int, default=1, help="-1 is three epochs, as a run is by default")
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many counts")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        plain_trl(options.folder, options.steps)
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), options)


def compare(folder: Path, options: argparse.Namespace) -> None:
    """Runs both sides by turns and prints the table."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(options.rows)))
    steps = f"trainer.max_steps={options.steps}"
    ours = ["-m", "sft_recipes", "model=tiny", "data=file", f"data.file.data_files={folder / 'rows.jsonl'}",
            "trainer=small", steps, "callbacks=[start.FirstStep]"]  # fmt: skip
    trl = [__file__, "--side", "trl", "--folder", str(folder), "--steps", str(options.steps)]
    first = run([*ours, f"hydra.run.dir={folder / 'first'}"], folder)  # measures the base
    found: dict[str, list[list[float]]] = {"ours": [], "TRL": []}
    for turn in range(options.rounds):
        found["ours"].append(run([*ours, f"hydra.run.dir={folder / f'ours_{turn}'}"], folder))
        found["TRL"].append(run(trl, folder))
    columns = ("CPU s to first step", "seconds to it", "CPU s of the run", "seconds of it")
    print("| side | " + " | ".join(columns) + " |\n| --- |" + " --- |" * len(columns))
    middle = {side: [sorted(values)[len(values) // 2] for values in zip(*rounds, strict=True)]
              for side, rounds in found.items()}  # fmt: skip
    for side, values in middle.items():
        print(f"| {side} | " + " | ".join(f"{value:.1f}" for value in values) + " |")
    ratios = (one / other for one, other in zip(middle["ours"], middle["TRL"], strict=True))
    print("| ours / TRL | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    last = f"ours_{options.rounds - 1}", found["ours"][-1]
    for what, (name, used) in {"the base found": last, "the base measured": ("first", first)}.items():
        metrics = json.loads((folder / name / "metrics.json").read_text())
        evaluated, trained = metrics["evaluation_seconds"], metrics["train_seconds"]
        print(
            f"\nOurs with {what}: {metrics['steps']} steps in {trained:.1f} s; evaluation took {evaluated:.1f} s, "
            f"{evaluated / used[3]:.1%} of the run."
        )


def run(command: list[str], folder: Path) -> list[float]:
    """One process: CPU seconds and seconds to the end of its first step, then to its own end."""
    mark, started = folder / "mark.json", time.time()
    mark.unlink(missing_ok=True)
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    own = {MARK: str(mark), f"{MARK}_AT": str(started), "SFT_RECIPES_CACHE": str(folder / "cache"), "PYTHONPATH": path,
           "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / f"datasets_{started}")}  # fmt: skip
    before = cpu_seconds(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *command], env=os.environ | own, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}:\n{done.stderr[-2000:]}")
    whole = cpu_seconds(resource.RUSAGE_CHILDREN) - before, time.time() - started
    return [*json.loads(mark.read_text()), *whole]


def cpu_seconds(who: int) -> float:
    """What this process, or those that it started and that have ended, used of the CPU."""
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def make_rows(number: int) -> list[dict[str, Any]]:
    """Questions with answers of 8 to 40 words, the same each time."""
    draw, places = Random(0), ["lake", "hill", "town", "wood", "road", "mill", "farm"]
    rows = []
    for place in range(number):
        name = draw.choice(["Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana"])
        way = " ".join(draw.choice(places) for _ in range(draw.randint(3, 35)))
        rows.append({"messages": [
            {"role": "user", "content": f"Where does {name} live, and what is number {place}?"},
            {"role": "assistant", "content": f"{name} lives in house {draw.randint(1, 99)} by the {way}."},
        ]})  # fmt: skip
    return rows


def plain_trl(folder: Path, steps: int) -> None:
    """The script that a reader of TRL's documentation writes for the same run."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    parts = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train").train_test_split(0.02, seed=42)
    arguments = SFTConfig(output_dir=tempfile.mkdtemp(dir=folder), max_steps=steps, assistant_only_loss=True,
                          bf16=torch.cuda.is_available(),
                          **TRAINER)  # fmt: skip
    trainer = SFTTrainer(model, arguments, train_dataset=parts["train"], eval_dataset=parts["test"],
                         processing_class=tokenizer, callbacks=[FirstStep()])  # fmt: skip
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
