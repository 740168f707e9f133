"""What a report says of one run, as the sections of a page: what was trained, on what, and what became of it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sft_recipes.reporting.document import Block, Code, Folded, Note, Picture, Sections, Table
from sft_recipes.reporting.figures import plot_losses, plot_weight_change
from sft_recipes.reporting.result_tables import (
    answer_table,
    benchmark_table,
    held_out_table,
    other_metrics,
    result_table,
)
from sft_recipes.reporting.run_folder import RunFiles, as_mapping, finite_number, get_number, get_path, iterate_leaves
from sft_recipes.reporting.setup_sections import (
    cost_section,
    data_checks_section,
    environment_section,
    format_seconds,
    provenance_section,
    rerun_command,
    shorten_path,
    training_setup,
)

LOSS_COLUMNS = (
    ("loss", ".4f"),
    ("eval_loss", ".4f"),
    ("eval_p_stop", ".1%"),
    ("learning_rate", ".2e"),
    ("grad_norm", ".2f"),
)
SHOWN_ANSWERS, OPEN_ANSWERS = (
    30,
    10,
)  # that a page holds side by side, and that it shows unasked; all are in answers.jsonl


def build_sections(run: RunFiles, price_per_hour: float | None = None) -> Sections:
    """Every section that the run has something for, in the order a reader asks."""
    found: dict[str, Sequence[Block]] = {
        "": result_section(run),
        "Answers": answers_section(run.answers),
        "What was trained": training_setup(run),
        "Paper and this run": provenance_section(run),
        "Supervision": data_checks_section(run),
        "Training": training_section(run),
        "How far the weights moved": weights_section(run.metrics),
        "Samples over training": samples_section(run.samples),
        "Evaluation": evaluation_section(run.metrics),
        "Forgetting": forgetting_section(run),
        "Benchmarks": benchmarks_section(run.metrics),
        "Judge": judge_section(run.metrics),
        "Cost": cost_section(run, price_per_hour),
        "Environment": environment_section(run),
        "To run it again": [Code(rerun_command(run), "bash")] if rerun_command(run) else [],
        "Config": [Code(run.config_text, "yaml")] if run.config_text else [],
    }
    return {heading: blocks for heading, blocks in found.items() if blocks}


def result_section(run: RunFiles) -> list[Block]:
    """The table that stands first, then what there is to worry about."""
    return [Table(result_table(run.metrics)), *map(Note, run_warnings(run))]


def run_warnings(run: RunFiles) -> list[str]:
    """The run's warnings, and the verdicts that are not `passed`; each one line."""
    found = [str(warning) for warning in run.metrics.get("warnings") or []]
    verdict = get_path(run.metrics, "forgetting.verdict")
    if verdict and verdict != "passed":
        found.append(f"Forgetting: {verdict}. {describe_change(run.metrics)}")
    verdict = get_path(run.metrics, "benchmarks.verdict")
    if verdict and verdict != "passed":
        worst = get_number(run.metrics, "benchmarks.worst")
        found.append(f"Benchmarks: {verdict}." + (f" The worst changed by {worst:+.1f} points." if worst else ""))
    return found


def describe_change(metrics: Mapping[str, Any]) -> str:
    """How the loss on raw text changed, and where the limits are."""
    change = get_number(metrics, "forgetting.change")
    limits = [get_number(metrics, f"forgetting.{key}") for key in ("warn_above", "fail_above")]
    said = "" if change is None else f"The loss on raw text changed by {change:+.1%}."
    if None not in limits:
        said += f" Above {limits[0]:+.0%} is a warning, above {limits[1]:+.0%} a failure."
    return said.strip()


def forgetting_advice(run: RunFiles) -> list[str]:
    """Where the model forgot: the three defences, with the config that switches each on and what it is now."""
    config = run.config
    if get_path(run.metrics, "forgetting.verdict") in (None, "passed"):
        return []
    now = {key: get_path(config, f"trainer.{key}") for key in ("learning_rate", "num_train_epochs")}
    here = {key: f" (now {value:g})" if isinstance(value, int | float) else "" for key, value in now.items()}
    lora = " (it is on)" if get_path(config, "adapter.type") == "lora" else ""
    return [
        f"Three defences: a lower `trainer.learning_rate`{here['learning_rate']} and fewer "
        f"`trainer.num_train_epochs`{here['num_train_epochs']}; `adapter=lora`{lora}; 2 to 10 % raw text in the mix: "
        "`'data=[mine,prose]' data.prose.share=0.05`."
    ]


def answers_section(found: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Held-out questions with the reference and both answers, spread over the whole list."""
    if not found:
        return []
    some = found[:: math.ceil(len(found) / SHOWN_ANSWERS)]
    said = f"{len(some)} of {len(found)} held-out questions, answered greedily; all are in `answers.jsonl`."
    head, *rows = answer_rows(some, ("base", "tuned"))
    blocks: list[Block] = [said, Table([head, *rows[:OPEN_ANSWERS]], prose=True)]
    if rows[OPEN_ANSWERS:]:
        blocks.append(Folded(f"{len(rows[OPEN_ANSWERS:])} more", [Table([head, *rows[OPEN_ANSWERS:]], prose=True)]))
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


def training_section(run: RunFiles) -> list[Block]:
    """The steps, the loss curves and their numbers."""
    metrics = run.metrics
    history = [entry for entry in metrics.get("history") or [] if isinstance(entry, dict) and "step" in entry]
    steps, seconds = get_number(metrics, "steps"), get_number(metrics, "train_seconds")
    if steps is None and not history:
        return []
    parts = (
        [f"{steps:,} step{'s' * (steps != 1)}" + (f" in {format_seconds(seconds)}" if seconds is not None else "")]
        if steps
        else []
    )
    for key, form, name in (
        ("trainable_parameters", ",", "trained parameters"),
        ("train_loss", ".3f", "mean training loss"),
        ("eval_loss", ".3f", "held-out loss at the end"),
    ):
        value = get_number(metrics, key)
        parts += [f"{value:{form}} {name}"] if value is not None else []
    blocks: list[Block] = [", ".join(parts) + "."] if parts else []
    rows = loss_rows(history)
    if len(rows) > 1:
        blocks.append(Picture(plot_losses(history), "loss.png", "Training loss, held-out loss and learning rate"))
        blocks.append(Folded("The numbers", [Table(rows)]))
    return blocks


def loss_rows(history: Sequence[Mapping[str, float]], most: int = 12) -> list[list[str]]:
    """The losses on the way, one row a step: evenly thinned, all held-out losses kept."""
    steps: dict[int, dict[str, Any]] = {}
    for entry in history:
        if get_number(entry, "loss") is not None or get_number(entry, "eval_loss") is not None:
            steps.setdefault(entry["step"], {}).update(entry)
    every = max(1, math.ceil(len(steps) / most))
    kept = [entry for place, entry in enumerate(steps.values()) if place % every == 0 or "eval_loss" in entry]
    kept += [entry for entry in list(steps.values())[-1:] if entry not in kept]
    used = [(key, form) for key, form in LOSS_COLUMNS if any(get_number(entry, key) is not None for entry in kept)]
    names = {"loss": "training loss", "eval_loss": "held-out loss", "eval_p_stop": "p(stop)"}
    rows = [["step", "epoch", *(names.get(key, key.replace("_", " ")) for key, _ in used)]]
    for entry in kept:
        cells = [format_number(get_number(entry, key), form) for key, form in used]
        rows.append([f"{entry['step']}", format_number(get_number(entry, "epoch"), ".2f"), *cells])
    return rows


def format_number(value: float | None, form: str) -> str:
    """A number in this form, nothing where there is none."""
    return "" if value is None else f"{value:{form}}"


def weights_section(metrics: Mapping[str, Any]) -> list[Block]:
    """The norm of each part's change relative to its own norm before."""
    change = {
        part: value
        for part, value in iterate_leaves(as_mapping(metrics.get("weight_change")))
        if finite_number(value) is not None
    }
    if not change:
        return []
    most = max(change, key=change.get)
    said = f"The norm of the change over the norm of the base model's weights; most in `{most}`, {change[most]:.2%}."
    return [said, Picture(plot_weight_change(change), "weight_change.png", "Relative change of the weights")]


def samples_section(found: Sequence[Mapping[str, Any]], prompts: int = 3, steps: int = 12) -> list[Block]:
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


def evaluation_section(metrics: Mapping[str, Any]) -> list[Block]:
    """Everything that was measured of both models, beyond the table that stands first."""
    tables = [answer_table(metrics), held_out_table(metrics), other_metrics(metrics)]
    return [Table(rows) for rows in tables if len(rows) > 1]


def forgetting_section(run: RunFiles) -> list[Block]:
    """The loss on raw text with its verdict; where it is not passed, the defences."""
    before, after = (get_path(run.metrics, f"{when}.raw_text") for when in ("before", "after"))
    verdict = get_path(run.metrics, "forgetting.verdict")
    if not verdict:
        if after or get_number(run.metrics, "after.raw_text_loss") is not None:
            return ["The loss on raw text is in the first table; the run has no verdict on it."]
        return ["Not measured. `evaluate.raw_text=FILE` takes the loss on a text file before and after training."]
    blocks: list[Block] = [f"Verdict: {verdict}. {describe_change(run.metrics)}"]
    rows = [["raw text", "base", "tuned"]]
    for key, form in (("loss", ".4f"), ("bits_per_byte", ".4f"), ("tokens", ",.0f"), ("bytes", ",.0f")):
        cells = [format_number(get_number(values, key), form) for values in (before, after)]
        rows += [[key.replace("_", " "), *cells]] if any(cells) else []
    source = get_path(after, "source") or get_path(run.config, "evaluate.raw_text")
    blocks += [Table(rows)] if len(rows) > 1 else []
    blocks += [f"Measured on `{shorten_path(source)}`."] if source else []
    return [*blocks, *forgetting_advice(run)]


def benchmarks_section(metrics: Mapping[str, Any]) -> list[Block]:
    """lm-eval's tasks, base beside tuned."""
    rows = benchmark_table(metrics)
    verdict, worst = get_path(metrics, "benchmarks.verdict"), get_number(metrics, "benchmarks.worst")
    said = f"Verdict: {verdict}" + (f", the worst changed by {worst:+.1f} points." if worst is not None else ".")
    return [*([said] if verdict else []), *([Table(rows)] if len(rows) > 1 else [])]


def judge_section(metrics: Mapping[str, Any]) -> list[Block]:
    """How often a judge preferred the tuned model's answer."""
    found = as_mapping(metrics.get("judge"))
    if not found:
        return []
    names = {"wins": "tuned is better", "losses": "base is better"}
    rows = [["", ""], *([names.get(key, key.replace("_", " ")), str(value)] for key, value in iterate_leaves(found))]
    return [Table(rows)]
