"""What a report says of one run, as the sections of a page: what was trained, on what, and what became of it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sft_recipes import plots
from sft_recipes.making import command, cost, environment, provenance, short, spent, supervision, trained
from sft_recipes.measures import answer_table, benchmark_table, held_out_table, other_measures, result_table
from sft_recipes.page import Block, Code, Folded, Note, Picture, Sections, Table
from sft_recipes.run_folder import Run, find, finite, leaves, mapping, number

LOSSES = (("loss", ".4f"), ("eval_loss", ".4f"), ("eval_p_stop", ".1%"), ("learning_rate", ".2e"), ("grad_norm", ".2f"))
ANSWERS, OPEN = 30, 10  # that a page holds side by side, and that it shows unasked; all are in answers.jsonl


def sections(run: Run, price_per_hour: float | None = None) -> Sections:
    """Every section that the run has something for, in the order a reader asks."""
    found: dict[str, Sequence[Block]] = {
        "": result(run),
        "Answers": answers(run.answers),
        "What was trained": trained(run),
        "Paper and this run": provenance(run),
        "Supervision": supervision(run),
        "Training": training(run),
        "How far the weights moved": weights(run.metrics),
        "Samples over training": samples(run.samples),
        "Evaluation": evaluation(run.metrics),
        "Forgetting": forgetting(run),
        "Benchmarks": benchmarks(run.metrics),
        "Judge": judge(run.metrics),
        "Cost": cost(run, price_per_hour),
        "Environment": environment(run),
        "To run it again": [Code(command(run), "bash")] if command(run) else [],
        "Config": [Code(run.config_text, "yaml")] if run.config_text else [],
    }
    return {heading: blocks for heading, blocks in found.items() if blocks}


def result(run: Run) -> list[Block]:
    """The table that stands first, then what there is to worry about."""
    return [Table(result_table(run.metrics)), *map(Note, concerns(run))]


def concerns(run: Run) -> list[str]:
    """The run's warnings, and the verdicts that are not `passed`; each one line."""
    found = [str(warning) for warning in run.metrics.get("warnings") or []]
    verdict = find(run.metrics, "forgetting.verdict")
    if verdict and verdict != "passed":
        found.append(f"Forgetting: {verdict}. {change_of(run.metrics)}")
    verdict = find(run.metrics, "benchmarks.verdict")
    if verdict and verdict != "passed":
        worst = number(run.metrics, "benchmarks.worst")
        found.append(f"Benchmarks: {verdict}." + (f" The worst changed by {worst:+.1f} points." if worst else ""))
    return found


def change_of(metrics: Mapping[str, Any]) -> str:
    """How the loss on raw text changed, and where the limits are."""
    change = number(metrics, "forgetting.change")
    limits = [number(metrics, f"forgetting.{key}") for key in ("warn_above", "fail_above")]
    said = "" if change is None else f"The loss on raw text changed by {change:+.1%}."
    if None not in limits:
        said += f" Above {limits[0]:+.0%} is a warning, above {limits[1]:+.0%} a failure."
    return said.strip()


def advice(run: Run) -> list[str]:
    """Where the model forgot: the three defences, with the config that switches each on and what it is now."""
    config = run.config
    if find(run.metrics, "forgetting.verdict") in (None, "passed"):
        return []
    now = {key: find(config, f"trainer.{key}") for key in ("learning_rate", "num_train_epochs")}
    here = {key: f" (now {value:g})" if isinstance(value, int | float) else "" for key, value in now.items()}
    lora = " (it is on)" if find(config, "adapter.type") == "lora" else ""
    return [
        f"Three defences: a lower `trainer.learning_rate`{here['learning_rate']} and fewer "
        f"`trainer.num_train_epochs`{here['num_train_epochs']}; `adapter=lora`{lora}; 2 to 10 % raw text in the mix: "
        "`'data=[mine,prose]' data.prose.share=0.05`."
    ]


def answers(found: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Held-out questions with the reference and both answers, spread over the whole list."""
    if not found:
        return []
    some = found[:: math.ceil(len(found) / ANSWERS)]
    said = f"{len(some)} of {len(found)} held-out questions, answered greedily; all are in `answers.jsonl`."
    head, *rows = answer_rows(some, ("base", "tuned"))
    blocks: list[Block] = [said, Table([head, *rows[:OPEN]], prose=True)]
    if rows[OPEN:]:
        blocks.append(Folded(f"{len(rows[OPEN:])} more", [Table([head, *rows[OPEN:]], prose=True)]))
    if any("tuned_sampled" in answer for answer in some):
        table = Table(answer_rows(some, ("base_sampled", "tuned_sampled")), prose=True)
        blocks.append(Folded("The same questions, answered by sampling", [table]))
    return blocks


def answer_rows(found: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[list[str]]:
    """The question, the reference and these answers as rows; an answer that did not stop by itself says so."""
    keys = [key for key in keys if any(key in answer for answer in found)]
    rows = [["question", "reference", *(key.replace("_", ", ") for key in keys)]]
    for answer in found:
        texts = [str(answer.get(key, "")) for key in ("prompt", "reference", *keys)]
        for place, key in enumerate(keys, start=2):
            if answer.get(f"{key}_stops") is False:
                texts[place] += " [did not stop]"
        rows.append(texts)
    return rows


def training(run: Run) -> list[Block]:
    """The steps, the loss curves and their numbers."""
    metrics = run.metrics
    history = [entry for entry in metrics.get("history") or [] if isinstance(entry, dict) and "step" in entry]
    steps, seconds = number(metrics, "steps"), number(metrics, "train_seconds")
    if steps is None and not history:
        return []
    parts = (
        [f"{steps:,} step{'s' * (steps != 1)}" + (f" in {spent(seconds)}" if seconds is not None else "")]
        if steps
        else []
    )
    for key, form, name in (
        ("trainable_parameters", ",", "trained parameters"),
        ("train_loss", ".3f", "mean training loss"),
        ("eval_loss", ".3f", "held-out loss at the end"),
    ):
        value = number(metrics, key)
        parts += [f"{value:{form}} {name}"] if value is not None else []
    blocks: list[Block] = [", ".join(parts) + "."] if parts else []
    rows = loss_rows(history)
    if len(rows) > 1:
        blocks.append(Picture(plots.losses(history), "loss.png", "Training loss, held-out loss and learning rate"))
        blocks.append(Folded("The numbers", [Table(rows)]))
    return blocks


def loss_rows(history: Sequence[Mapping[str, float]], most: int = 12) -> list[list[str]]:
    """The losses on the way, one row a step: evenly thinned, all held-out losses kept."""
    steps: dict[int, dict[str, Any]] = {}
    for entry in history:
        if number(entry, "loss") is not None or number(entry, "eval_loss") is not None:
            steps.setdefault(entry["step"], {}).update(entry)
    every = max(1, math.ceil(len(steps) / most))
    kept = [entry for place, entry in enumerate(steps.values()) if place % every == 0 or "eval_loss" in entry]
    kept += [entry for entry in list(steps.values())[-1:] if entry not in kept]
    used = [(key, form) for key, form in LOSSES if any(number(entry, key) is not None for entry in kept)]
    names = {"loss": "training loss", "eval_loss": "held-out loss", "eval_p_stop": "p(stop)"}
    rows = [["step", "epoch", *(names.get(key, key.replace("_", " ")) for key, _ in used)]]
    for entry in kept:
        cells = [shown_number(number(entry, key), form) for key, form in used]
        rows.append([f"{entry['step']}", shown_number(number(entry, "epoch"), ".2f"), *cells])
    return rows


def shown_number(value: float | None, form: str) -> str:
    """A number in this form, nothing where there is none."""
    return "" if value is None else f"{value:{form}}"


def weights(metrics: Mapping[str, Any]) -> list[Block]:
    """The norm of each part's change relative to its own norm before."""
    change = {part: value for part, value in leaves(mapping(metrics.get("weight_change"))) if finite(value) is not None}
    if not change:
        return []
    most = max(change, key=change.get)
    said = f"The norm of the change over the norm of the base model's weights; most in `{most}`, {change[most]:.2%}."
    return [said, Picture(plots.weight_change(change), "weight_change.png", "Relative change of the weights")]


def samples(found: Sequence[Mapping[str, Any]], prompts: int = 3, steps: int = 12) -> list[Block]:
    """What the model answered to the same few questions on the way, a row a step."""
    asked = list(dict.fromkeys(str(sample.get("prompt", "")) for sample in found))[:prompts]
    times = list(dict.fromkeys(sample.get("step") for sample in found))
    times = times[:: math.ceil(len(times) / steps)] + times[-1:] if times else []
    texts = {(sample.get("step"), str(sample.get("prompt", ""))): sample for sample in found}
    rows = [["step", *asked]]
    for step in dict.fromkeys(times):
        said = [texts.get((step, prompt), {}) for prompt in asked]
        ends = ["" if sample.get("stops", True) else " [did not stop]" for sample in said]
        rows.append([str(step), *(f"{one.get('text', '')}{end}" for one, end in zip(said, ends, strict=True))])
    return [Table(rows, width=80, prose=True)] if len(rows) > 1 else []


def evaluation(metrics: Mapping[str, Any]) -> list[Block]:
    """Everything that was measured of both models, beyond the table that stands first."""
    tables = [answer_table(metrics), held_out_table(metrics), other_measures(metrics)]
    return [Table(rows) for rows in tables if len(rows) > 1]


def forgetting(run: Run) -> list[Block]:
    """The loss on raw text with its verdict; where it is not passed, the defences."""
    before, after = (find(run.metrics, f"{when}.raw_text") for when in ("before", "after"))
    verdict = find(run.metrics, "forgetting.verdict")
    if not verdict:
        if after or number(run.metrics, "after.raw_text_loss") is not None:
            return ["The loss on raw text is in the first table; the run has no verdict on it."]
        return ["Not measured. `evaluate.raw_text=FILE` takes the loss on a text file before and after training."]
    blocks: list[Block] = [f"Verdict: {verdict}. {change_of(run.metrics)}"]
    rows = [["raw text", "base", "tuned"]]
    for key, form in (("loss", ".4f"), ("bits_per_byte", ".4f"), ("tokens", ",.0f"), ("bytes", ",.0f")):
        cells = [shown_number(number(values, key), form) for values in (before, after)]
        rows += [[key.replace("_", " "), *cells]] if any(cells) else []
    source = find(after, "source") or find(run.config, "evaluate.raw_text")
    blocks += [Table(rows)] if len(rows) > 1 else []
    blocks += [f"Measured on `{short(source)}`."] if source else []
    return [*blocks, *advice(run)]


def benchmarks(metrics: Mapping[str, Any]) -> list[Block]:
    """lm-eval's tasks, base beside tuned."""
    rows = benchmark_table(metrics)
    verdict, worst = find(metrics, "benchmarks.verdict"), number(metrics, "benchmarks.worst")
    said = f"Verdict: {verdict}" + (f", the worst changed by {worst:+.1f} points." if worst is not None else ".")
    return [*([said] if verdict else []), *([Table(rows)] if len(rows) > 1 else [])]


def judge(metrics: Mapping[str, Any]) -> list[Block]:
    """How often a judge preferred the tuned model's answer."""
    found = mapping(metrics.get("judge"))
    if not found:
        return []
    names = {"wins": "tuned is better", "losses": "base is better"}
    rows = [["", ""], *([names.get(key, key.replace("_", " ")), str(value)] for key, value in leaves(found))]
    return [Table(rows)]
