"""The measurements of a run as tables: the few that it is judged by, then all of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sft_recipes.config.metrics import metrics_on
from sft_recipes.config.nested_values import as_mapping, finite_number, get_number, get_path, iterate_leaves
from sft_recipes.reporting.text import format_value

Rows = list[list[str]]  # of a table, its head first; empty where there is nothing to show
ANSWER_PARTS = {"": "all, greedy", "short": "short references", "long": "long references", "sampled": "sampled"}
LOSS_PARTS = {"source": "source {}", "turn": "{} answers", "position": "{} tokens", "length": "rows of {}"}
HISTORY_COLUMNS = {
    "loss": ("training loss", ".4f"),
    "eval_loss": ("held-out loss", ".4f"),
    "eval_p_stop": ("p(stop)", ".1%"),
    "learning_rate": ("learning rate", ".2e"),
    "grad_norm": ("gradient norm", ".2f"),
}


def result_table(metrics: Mapping[str, Any]) -> Rows:
    """Every metric of base and tuned model, or of the one that was measured; and of the base behind a prompt."""
    before, tuned = as_mapping(metrics.get("before")), "tuned"
    prompted = as_mapping(before.get("prompted"))
    if metrics.get("mode") == "evaluate" and not before:
        tuned = "model"
    rows = [["", "base", "prompted", tuned]]
    for metric in metrics_on("answers", "thoughts", "stop_tokens", "held_out", "raw_text", "training"):
        old, new = get_number(before, metric.path), get_number(metrics, metric.name)
        cells = [format_value(value, metric.format) for value in (old, get_number(prompted, metric.path), new)]
        if metric.measured_on == "raw_text" and old and new:
            verdict = get_path(metrics, "forgetting.verdict") if metric.name == "raw_text_loss" else None
            cells[-1] += f" ({new / old - 1:+.1%}{f', {verdict}' if verdict else ''})"
        rows += [[metric.label, *cells]] if any(cells) else []
    used = [0, *(place for place in (1, 2) if any(row[place] for row in rows[1:])), 3]
    return with_body([[row[place] for place in used] for row in rows])


def with_body(rows: Rows) -> Rows:
    """The table, or no rows where it is nothing but a head."""
    return rows if len(rows) > 1 else []


def base_and_tuned(metrics: Mapping[str, Any], path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the base and the tuned model have at this path; empty where they have nothing."""
    return as_mapping(get_path(metrics, f"before.{path}")), as_mapping(get_path(metrics, f"after.{path}"))


def answer_table(metrics: Mapping[str, Any]) -> Rows:
    """The metrics of answers as base → tuned: of all, by the length of the reference, and of sampled answers."""
    before, after = as_mapping(metrics.get("before")), as_mapping(metrics.get("after"))
    used = [metric for metric in metrics_on("answers") if metric.path in {**before, **after}]
    rows = [["answers", "rows", *(metric.label for metric in used)]]
    for part, label in ANSWER_PARTS.items():
        old, new = base_and_tuned(metrics, part) if part else (before, after)
        pairs = [
            [format_value(get_number(values, metric.path), metric.format) for values in (old, new)] for metric in used
        ]
        cells = ["\u00a0→\u00a0".join(filter(None, pair)) for pair in pairs]
        if any(cells):
            how = [f"{key.replace('_', ' ')} {new[key]:g}" for key in ("temperature", "top_p") if get_number(new, key)]
            count = get_number(new if part in ("short", "long") else after, "rows")
            rows.append([", ".join([label, *how]), format_value(count, ","), *cells])
    return with_body(rows)


def held_out_table(metrics: Mapping[str, Any]) -> Rows:
    """The held-out loss in nats per supervised token: of all rows, then by source, turn, position and length."""
    both = base_and_tuned(metrics, "held_out")
    rows = paired_rows(both, {"loss": "all tokens"}, ".4f")
    for group, label in LOSS_PARTS.items():
        parts = base_and_tuned(metrics, f"held_out.{group}")
        rows += paired_rows(parts, {key: label.format(key) for key in {**parts[0], **parts[1]}}, ".4f")
    rows += paired_rows(both, {"rows": "rows", "tokens": "supervised tokens"}, ",")
    return with_body([["held-out loss", "base", "tuned"], *rows])


def raw_text_table(metrics: Mapping[str, Any]) -> Rows:
    """The loss on raw text, base and tuned, and on how much text it was measured."""
    both = base_and_tuned(metrics, "raw_text")
    rows = paired_rows(both, {"loss": "loss", "bits_per_byte": "bits per byte"}, ".4f")
    rows += paired_rows(both, {"tokens": "tokens", "bytes": "bytes"}, ",")
    return with_body([["raw text", "base", "tuned"], *rows])


def paired_rows(both: Sequence[Mapping[str, Any]], labels: Mapping[str, str], form: str) -> Rows:
    """For each key a row of its label and of the numbers that base and tuned have there; none without a number."""
    rows = [
        [label, *(format_value(finite_number(values.get(key)), form) for values in both)]
        for key, label in labels.items()
    ]
    return [row for row in rows if any(row[1:])]


def benchmark_table(metrics: Mapping[str, Any]) -> Rows:
    """The tasks of lm-eval, base beside tuned, and the change in points."""
    before, after = (dict(iterate_leaves(values)) for values in base_and_tuned(metrics, "lm_eval"))
    rows = [["task", "base", "tuned", "points"]]
    for task in {**before, **after}:
        old, new = (finite_number(values.get(task)) for values in (before, after))
        points = None if None in (old, new) else 100 * (new - old)
        rows.append([task, format_value(old, ".1%"), format_value(new, ".1%"), format_value(points, "+.1f")])
    return with_body(rows)


def judge_table(metrics: Mapping[str, Any]) -> Rows:
    """How often a judge preferred which model, and how it was asked."""
    names = {"wins": "tuned is better", "losses": "base is better"}
    found = iterate_leaves(as_mapping(metrics.get("judge")))
    return with_body([["", ""], *([names.get(key, key.replace("_", " ")), str(value)] for key, value in found)])


def loss_history(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The log of the training, step by step."""
    return [entry for entry in metrics.get("history") or [] if isinstance(entry, dict) and "step" in entry]


def history_table(metrics: Mapping[str, Any], most: int = 12) -> Rows:
    """The losses on the way, a row a step: evenly thinned, but with all held-out losses and the last step."""
    steps: dict[int, dict[str, Any]] = {}
    for entry in loss_history(metrics):
        if get_number(entry, "loss") is not None or get_number(entry, "eval_loss") is not None:
            steps.setdefault(entry["step"], {}).update(entry)
    every, last = max(1, math.ceil(len(steps) / most)), len(steps) - 1
    kept = [
        entry
        for place, entry in enumerate(steps.values())
        if place % every == 0 or "eval_loss" in entry or place == last
    ]
    used = {key: column for key, column in HISTORY_COLUMNS.items() if any(get_number(e, key) is not None for e in kept)}
    rows = [["step", "epoch", *(head for head, _ in used.values())]]
    for entry in kept:
        cells = [format_value(get_number(entry, key), form) for key, (_, form) in used.items()]
        rows.append([f"{entry['step']}", format_value(get_number(entry, "epoch"), ".2f"), *cells])
    return with_body(rows)


def sample_table(samples: Sequence[Mapping[str, Any]], prompts: int = 3, steps: int = 12) -> Rows:
    """The answers to the same few questions during training, a row a step."""
    questions = list(dict.fromkeys(str(sample.get("prompt", "")) for sample in samples))[:prompts]
    taken = list(dict.fromkeys(sample.get("step") for sample in samples))
    taken = taken[:: math.ceil(len(taken) / steps)] + taken[-1:] if taken else []
    found = {(sample.get("step"), str(sample.get("prompt", ""))): sample for sample in samples}
    rows = [["step", *questions]]
    for step in dict.fromkeys(taken):
        answers = [found.get((step, question), {}) for question in questions]
        rows.append([str(step), *(mark_unstopped(answer.get("text", ""), answer.get("stops")) for answer in answers)])
    return with_body(rows)


def answer_tables(answers: Sequence[Mapping[str, Any]], shown: int = 30, open: int = 10) -> dict[str, Rows]:
    """Held-out questions with the answers of both models, spread over the whole list: `open`, `more` and `sampled`."""
    some = answers[:: max(1, math.ceil(len(answers) / shown))]
    head, *rows = answer_rows(some, ("base", "prompted", "tuned"))
    sampled = answer_rows(some, ("base_sampled", "tuned_sampled"))
    return {
        "open": with_body([head, *rows[:open]]),
        "more": with_body([head, *rows[open:]]),
        "sampled": with_body(sampled) if len(sampled[0]) > 2 else [],
    }


def answer_rows(answers: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> Rows:
    """A row a question: its reference and these answers."""
    keys = [key for key in keys if any(key in answer for answer in answers)]
    rows = [["question", "reference", *(key.replace("_", ", ") for key in keys)]]
    for answer in answers:
        texts = [mark_unstopped(answer.get(key, ""), answer.get(f"{key}_stops")) for key in keys]
        rows.append([str(answer.get("prompt", "")), str(answer.get("reference", "")), *texts])
    return rows


def mark_unstopped(text: Any, stops: bool | None) -> str:
    """An answer's text, with a mark where it did not stop by itself."""
    return f"{text} [did not stop]" if stops is False else str(text)
