"""Every recipe on the embedded tiny model, side by side, then recipe tiny with one thing changed: `make compare`.

All train on the same QUESTIONS about the little world and are asked the same held-out ones. A recipe keeps its epochs,
schedule, weight decay, optimizer, adapter, template, packing, and what it takes the loss on. Two things are scaled, for
all recipes alike, as the model is ten thousand times smaller than theirs and the rows are hundreds: the learning rate
is RATE times theirs, the rows of a step are a SHARE of theirs (packed: of 256 tokens). Who counts in steps gets three
epochs, and a warm-up counted in steps is 3 % of them.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from prepare import machine

from sft_recipes.config.hydra_plugin import config_folder
from sft_recipes.errors import did_you_mean
from sft_recipes.recipes import compose_recipe, recipe_names
from sft_recipes.reporting.provenance import effective_batch_size
from sft_recipes.reporting.setup_sections import describe_method
from sft_recipes.reporting.text import render_table

RATE, SHARE, QUESTIONS = 10, 1 / 8, "train[:700]"
TEXT = ("continual_pretraining",)  # trains on the world's prose, and so has no questions
ALIKE = ["evaluate.rows=300", "evaluate.batch_size=100", "evaluate.max_new_tokens=24", "evaluate.temperature=0",
         "evaluate.raw_text=${package:tiny/data/prose_held_out.jsonl}", "evaluate.weight_change=false",
         "trainer.eval_strategy='no'", "trainer.activation_checkpointing=false", "mix.total=null"]  # fmt: skip
CHANGES = {
    "15 epochs": ["trainer.num_train_epochs=15"],
    "2 epochs": ["trainer.num_train_epochs=2"],
    "10 times the learning rate": ["trainer.learning_rate=2.5e-2"],
    "loss on all tokens": ["data.tiny.train_on=all"],
    "packing": ["trainer.packing=true"],
    "two packed rows a step": ["trainer.packing=true", "trainer.per_device_train_batch_size=2"],
    "no raw text mixed in": ["~data.prose"],
    "all weights instead of LoRA": ["adapter=none"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="these recipes alone, with commas between; none of recipe tiny's changes")
    parser.add_argument("--out", type=Path, help="where the runs' folders are kept; without it they are not")
    parser.add_argument("--more", nargs="*", default=[], help="overrides of every run")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else recipe_names()
    for name in set(wanted) - set(recipe_names()):
        sys.exit(f"There is no recipe={name}.{did_you_mean(name, recipe_names())}")
    changes = {} if options.only else CHANGES
    runs = {change: [*overrides("tiny"), *more] for change, more in changes.items()}  # first, as they take long
    runs |= {name: overrides(name) for name in wanted}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        root = options.out or Path(scratch)
        found = run_all({name: [*values, *options.more] for name, values in runs.items()}, root)
    for name, result in found.items():
        if "failed" in result:
            print(f"{name} failed: {result['failed']}", file=sys.stderr)
    print(f"{machine()}\n{len(runs)} runs in {time.perf_counter() - started:,.0f} s, learning rates times {RATE}\n")
    print("\n".join(render_table([HEAD, *(row(name, found[name]) for name in wanted)])))
    if changes:
        before = found["tiny"]["before"]
        base = ["untrained", *[""] * 6, share(before["exact_match"]), share(before["held_out"]["p_stop"]), "", ""]
        rows = [base, row("as it is", found["tiny"]), *(row(change, found[change]) for change in changes)]
        print("\nRecipe tiny with one thing changed:\n\n" + "\n".join(render_table([HEAD, *rows])))


def overrides(name: str) -> list[str]:
    """What is typed to run this recipe on the tiny model and its questions."""
    if name == "tiny":
        return ["+recipe=tiny", f"+data.tiny.split='{QUESTIONS}'", *ALIKE]
    source = "prose" if name in TEXT else "tiny"
    chosen = [f"+recipe={name}", "model=tiny", "data=[tiny]"]
    config = compose_recipe(name)
    trainer, ours = config.composed["trainer"], next(iter(config.sources.values()))
    batch = max(1, round(effective_batch_size(trainer) * SHARE))
    values = {
        "trainer.learning_rate": f"{trainer['learning_rate'] * RATE:g}",
        "trainer.effective_batch_size": batch,
        "trainer.per_device_train_batch_size": batch,
        "trainer.max_length": 256,
        "model.chat_template": config.model.chat_template,
        "data.held_out": 0,
    }
    if trainer.get("max_steps", -1) > 0:
        values["trainer.max_steps"] = -1
    if trainer["warmup_steps"] >= 1:
        values["trainer.warmup_steps"] = 0.03
    if (trainer.get("optim") or "").startswith("paged"):  # to a GPU
        values["trainer.optim"] = "adamw_torch"
    if "lr_end" in trainer.get("lr_scheduler_kwargs", {}):
        values["trainer.lr_scheduler_kwargs.lr_end"] = f"{trainer['lr_scheduler_kwargs']['lr_end'] * RATE:g}"
    if name in TEXT:
        values["data.prose.share"] = "null"
    else:
        values["+data.tiny.split"] = f"'{QUESTIONS}'"
        if ours.train_on != "assistant":
            values["+data.tiny.train_on"] = ours.train_on
    gone = [f"~data.{key}" for key in left_over(chosen) if key != source]
    return [*chosen, *gone, *(f"{key}={value}" for key, value in values.items()), *ALIKE]


def left_over(chosen: list[str]) -> list[str]:
    """The sources that a config has after these choices: those a recipe sets something of stay behind."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder("conf")), version_base="1.3"):
        data = compose("config", chosen).data
    return [key for key in data if hasattr(data[key], "keys")]


def run_all(runs: dict[str, list[str]], root: Path) -> dict[str, dict[str, Any]]:
    """What every run left in metrics.json, and its config; one process a core, each with one thread."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        jobs = {name: pool.submit(one, values, root / name.replace(" ", "_")) for name, values in runs.items()}
        return {name: job.result() for name, job in jobs.items()}


def one(values: list[str], where: Path) -> dict[str, Any]:
    """One run in this process, as the command line would do it; its output is in the folder's log."""
    from sft_recipes.__main__ import main

    GlobalHydra.instance().clear()
    sys.argv = ["sft_recipes", *values, f"hydra.run.dir={where}"]
    where.mkdir(parents=True, exist_ok=True)
    with (where / "said.txt").open("w") as said, redirect_stdout(said), redirect_stderr(said):
        try:
            main()
            failed = None
        except SystemExit as stopped:
            failed = stopped.code
    if failed:
        return {"failed": (where / "said.txt").read_text(encoding="utf-8").strip().rpartition("\n")[2]}
    metrics = json.loads((where / "metrics.json").read_text(encoding="utf-8"))
    return metrics | {"config": json.loads((where / "supervision.json").read_text(encoding="utf-8"))["config"]}


HEAD = ["", "method", "rate", "epochs", "rows a step", "loss on", "steps", "exact", "p(stop)", "forgot", "time"]


def row(name: str, found: dict[str, Any]) -> list[str]:
    """The table's cells of one run."""
    if "failed" in found:
        return [name, "failed", *[""] * (len(HEAD) - 2)]
    config = found["config"]
    trainer, source = config["trainer"], next(value for value in config["data"].values() if isinstance(value, dict))
    batch = effective_batch_size(trainer)
    on = "all tokens" if source.get("train_on") == "all" or source.get("formatter") == "text" else "answers"
    method = describe_method(config["adapter"])
    return [
        name, method, f"{trainer['learning_rate']:.2g}", f"{trainer['num_train_epochs']:g}",
        f"{batch} packed" if trainer["packing"] else str(batch), on, str(found["steps"]),
        share(found.get("exact_match")), share(found.get("p_stop")),
        f"{found['forgetting']['change']:+.1%}", f"{found['train_seconds']:.0f} s",
    ]  # fmt: skip


def share(value: float | None) -> str:
    """A share in percent, nothing where nothing was asked."""
    return "" if value is None else f"{value:.1%}"


if __name__ == "__main__":
    main()
