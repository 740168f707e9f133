"""The measurements of a run as tables: the few that it is judged by, then all of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from sft_recipes.config.metrics import metrics_on
from sft_recipes.config.nested_values import as_mapping, finite_number, get_number, get_path, iterate_leaves
from sft_recipes.reporting.text import Rows, compact_table, format_value

ANSWER_PARTS = {"": "all, greedy", "short": "short references", "long": "long references", "sampled": "sampled"}


def result_table(metrics: Mapping[str, Any]) -> Rows:
    """Every metric of base and tuned model, or of the one that was measured; and of the base behind a prompt."""
    before = as_mapping(metrics.get("before"))
    rows = [["", "base", "prompted", "model" if metrics.get("mode") == "evaluate" and not before else "tuned"]]
    for metric in metrics_on("answers", "thoughts", "stop_tokens", "held_out", "raw_text", "training"):
        old, new = get_number(before, metric.path), get_number(metrics, metric.name)
        values = (old, get_number(before, f"prompted.{metric.path}"), new)
        if metric.name == "thinks" and not any(values):
            continue  # of models that never think, which is so for most
        cells = [format_value(value, metric.format) for value in values]
        if metric.measured_on == "raw_text" and old and new:
            verdict = get_path(metrics, "forgetting.verdict") if metric.name == "raw_text_loss" else None
            cells[-1] += f" ({new / old - 1:+z.1%}{f', {verdict}' if verdict else ''})"
        rows.append([metric.label, *cells])
    return compact_table(rows)


def answer_table(metrics: Mapping[str, Any]) -> Rows:
    """The metrics of answers as base → tuned: of all, by the length of the reference, and of sampled answers."""
    rows = [["answers", "rows", *(metric.label for metric in metrics_on("answers"))]]
    for part, label in ANSWER_PARTS.items():
        both = [as_mapping(metrics.get(when)) for when in ("before", "after")]
        count = get_number(both[1], f"{part}.rows") or get_number(both[1], "rows")  # as many are sampled as greedy
        both = [as_mapping(values.get(part)) for values in both] if part else both
        cells = []
        for metric in metrics_on("answers"):
            pair = (format_value(get_number(values, metric.path), metric.format) for values in both)
            cells.append("\u00a0→\u00a0".join(filter(None, pair)))
        if any(cells):
            how = [key for key in ("temperature", "top_p") if get_number(both[1], key)]
            label = ", ".join([label, *(f"{key.replace('_', ' ')} {both[1][key]:g}" for key in how)])
            rows.append([label, format_value(count, ","), *cells])
    return compact_table(rows)


def flat_measurements(metrics: Mapping[str, Any], part: str) -> list[dict[str, Any]]:
    """What was measured of base and tuned model in this part, by dotted path; empty where there is nothing."""
    return [dict(iterate_leaves(as_mapping(get_path(metrics, f"{when}.{part}")))) for when in ("before", "after")]


def held_out_table(metrics: Mapping[str, Any]) -> Rows:
    """What was measured on held-out rows, by its names in metrics.json; losses are in nats per supervised token."""
    old, new = flat_measurements(metrics, "held_out")
    rows = [["held-out rows", "base", "tuned"]]
    for key in {**old, **new}:
        form = "," if key in ("rows", "tokens") else ".4f"
        cells = (format_value(finite_number(values.get(key)), form) for values in (old, new))
        rows.append([key.replace(".", ": ", 1), *cells])
    return compact_table(rows)


def benchmark_table(metrics: Mapping[str, Any]) -> Rows:
    """The tasks of lm-eval, base beside tuned, and the change in points."""
    both = flat_measurements(metrics, "lm_eval")
    rows = [["task", "base", "tuned", "points"]]
    for task in {**both[0], **both[1]}:
        old, new = (finite_number(values.get(task)) for values in both)
        points = None if None in (old, new) else 100 * (new - old)
        rows.append([task, format_value(old, ".1%"), format_value(new, ".1%"), format_value(points, "+z.1f")])
    return compact_table(rows)


def judge_table(metrics: Mapping[str, Any]) -> Rows:
    """How often a judge preferred which model, and how it was asked."""
    names = {"wins": "tuned is better", "losses": "base is better"}
    found = iterate_leaves(as_mapping(metrics.get("judge")))
    return compact_table([["", ""], *([names.get(key, key.replace("_", " ")), str(value)] for key, value in found)])


def loss_history(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The log of the training, step by step."""
    return [entry for entry in metrics.get("history") or [] if isinstance(entry, dict) and "step" in entry]


def weight_changes(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The norm of the change over the norm before, for each part of the model that has a finite one."""
    changes = iterate_leaves(as_mapping(metrics.get("weight_change")))
    return {part: value for part, value in changes if finite_number(value) is not None}


def spread_evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, the first of them among these.

    >>> spread_evenly("abcdefgh", 3)
    ['a', 'c', 'f']
    """
    most = min(most, len(items))
    return [items[len(items) * place // most] for place in range(most)]


def sample_table(samples: Sequence[Mapping[str, Any]], prompts: int = 3, most: int = 12) -> Rows:
    """The answers to the same few questions during training, a row a step."""
    questions = list(dict.fromkeys(str(sample.get("prompt", "")) for sample in samples))[:prompts]
    steps = list(dict.fromkeys(sample.get("step") for sample in samples))
    found = {(sample.get("step"), str(sample.get("prompt", ""))): sample for sample in samples}
    rows = [["step", *questions]]
    for step in dict.fromkeys([*spread_evenly(steps, most), *steps[-1:]]):
        answers = (found.get((step, question), {}) for question in questions)
        rows.append([str(step), *(mark_unstopped(answer.get("text", ""), answer.get("stops")) for answer in answers)])
    return rows if samples else []


def example_table(answers: Sequence[Mapping[str, Any]], keys: Sequence[str], most: int = 30) -> Rows:
    """Held-out questions, spread over the whole list, with their references and the answers under these keys."""
    some = spread_evenly(answers, most)
    keys = [key for key in keys if any(key in answer for answer in some)]
    rows = [["question", "reference", *(key.replace("_", ", ") for key in keys)]]
    for answer in some:
        texts = (mark_unstopped(answer.get(key, ""), answer.get(f"{key}_stops")) for key in keys)
        rows.append([str(answer.get("prompt", "")), str(answer.get("reference", "")), *texts])
    return rows if keys else []


def mark_unstopped(text: Any, stops: bool | None) -> str:
    """An answer's text, with a mark where it did not stop by itself."""
    return f"{text} [did not stop]" if stops is False else str(text)
