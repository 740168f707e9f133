"""The measurements of a run as tables: the few that it is judged by, then all of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from sft_recipes.config.metrics import metrics_on
from sft_recipes.config.nested_values import as_mapping, finite_number, get_number, get_path, iterate_leaves
from sft_recipes.reporting.text import Rows, compact_table, format_value


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


def measurement_table(metrics: Mapping[str, Any]) -> Rows:
    """All that was measured of base and tuned model but for benchmarks, by its path in metrics.json; losses in nats."""
    old, new = (dict(iterate_leaves(as_mapping(metrics.get(when)))) for when in ("before", "after"))
    rows = [["measured", "base", "tuned"]]
    for key in {**old, **new}:
        if key.startswith("lm_eval."):
            continue  # `benchmark_table` has them
        both = (finite_number(values.get(key)) for values in (old, new))
        rows.append([key, *(format_value(value, "," if isinstance(value, int) else ".4f") for value in both)])
    return compact_table(rows)


def benchmark_table(metrics: Mapping[str, Any]) -> Rows:
    """The tasks of lm-eval, base beside tuned, and the change in points."""
    both = [as_mapping(get_path(metrics, f"{when}.lm_eval")) for when in ("before", "after")]
    rows = [["task", "base", "tuned", "points"]]
    for task in {**both[0], **both[1]}:
        old, new = (finite_number(values.get(task)) for values in both)
        points = None if None in (old, new) else 100 * (new - old)
        rows.append([task, format_value(old, ".1%"), format_value(new, ".1%"), format_value(points, "+z.1f")])
    return compact_table(rows)


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
