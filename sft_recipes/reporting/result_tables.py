"""What was measured of the base and of the tuned model, as tables: first the few figures, then all of them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sft_recipes.reporting.run_folder import as_mapping, finite_number, get_number, get_path, iterate_leaves

# label, where it stands in what was measured (a run of an earlier version wrote the second), form
MEASURES = (
    ("exact match", ("exact_match",), ".1%"),
    ("ROUGE-L", ("rouge_l",), ".1%"),
    ("chrF", ("chrf",), ".1%"),
    ("stops by itself", ("stops",), ".1%"),
    ("p(stop)", ("held_out.p_stop",), ".1%"),
    ("held-out loss", ("held_out.loss",), ".3f"),
    ("loss on raw text", ("raw_text.loss", "raw_text_loss"), ".3f"),
    ("bits per byte", ("raw_text.bits_per_byte",), ".3f"),
)
ANSWER_MEASURES = MEASURES[:4]
ANSWER_PARTS = {"": "all, greedy", "short": "short references", "long": "long references", "sampled": "sampled"}
PART_LABELS = {"stop": "stop tokens", "other": "other tokens", "first": "first answers", "later": "later answers"}


def result_table(metrics: Mapping[str, Any]) -> list[list[str]]:
    """The few figures that a run is judged by; base and tuned model, measured alike, or the one that was measured."""
    before, after = as_mapping(metrics.get("before")), as_mapping(metrics.get("after"))
    rows = [["", "base", "model" if metrics.get("mode") == "evaluate" and not before else "tuned"]]
    for label, places, form in MEASURES:
        old, new = (first_number(values, places) for values in (before, after))
        if label == "held-out loss" and new is None:
            new = get_number(metrics, "eval_loss")
        if old is None and new is None:
            continue
        cells = ["" if value is None else f"{value:{form}}" for value in (old, new)]
        if places[0].startswith("raw_text") and old and new:
            verdict = get_path(metrics, "forgetting.verdict") if label == "loss on raw text" else None
            cells[1] += f" ({new / old - 1:+.1%}{f', {verdict}' if verdict else ''})"
        rows.append([label, *cells])
    if get_number(metrics, "train_loss") is not None:
        rows.append(["training loss", "", f"{metrics['train_loss']:.3f}"])
    return rows if any(row[1] for row in rows[1:]) else [[label, new] for label, _, new in rows]


def first_number(values: Mapping[str, Any], places: Sequence[str]) -> float | None:
    """The first number that stands under one of these paths."""
    return next((found for place in places if (found := get_number(values, place)) is not None), None)


def answer_table(metrics: Mapping[str, Any]) -> list[list[str]]:
    """The answers' measures as base → tuned: all of them, by the reference's length, and sampled ones."""
    before, after = as_mapping(metrics.get("before")), as_mapping(metrics.get("after"))
    used = [(label, places[0], form) for label, places, form in ANSWER_MEASURES if places[0] in {**before, **after}]
    rows = [["answers", "rows", *(label for label, _, _ in used)]]
    for part, label in ANSWER_PARTS.items():
        old, new = (as_mapping(values.get(part)) if part else values for values in (before, after))
        cells = [change_arrow(get_number(old, key), get_number(new, key), form) for _, key, form in used]
        if any(cells):
            how = [f"{key.replace('_', ' ')} {new[key]:g}" for key in ("temperature", "top_p") if get_number(new, key)]
            count = get_number(new if part in ("short", "long") else after, "rows")
            rows.append([", ".join([label, *how]), "" if count is None else f"{count:,}", *cells])
    return rows


def change_arrow(old: float | None, new: float | None, form: str) -> str:
    """From the base's number to the tuned model's; one alone where only one was measured."""
    return "\u00a0→\u00a0".join(f"{value:{form}}" for value in (old, new) if value is not None)


def held_out_table(metrics: Mapping[str, Any]) -> list[list[str]]:
    """The held-out loss, nats a supervised token: of all rows, then by source, turn, position and length."""
    before, after = (as_mapping(get_path(metrics, f"{when}.held_out")) for when in ("before", "after"))
    rows = [["held-out loss", "base", "tuned"]]
    listed = [("all tokens", before.get("loss"), after.get("loss"))]
    for group in ("source", "turn", "position", "length"):
        old, new = as_mapping(before.get(group)), as_mapping(after.get(group))
        named = {"source": "source {}", "length": "rows of {}"}.get(group, "{}")
        listed += [(named.format(PART_LABELS.get(key, key)), old.get(key), new.get(key)) for key in {**old, **new}]
    for label, *values in listed:
        cells = ["" if finite_number(value) is None else f"{value:.4f}" for value in values]
        rows += [[label, *cells]] if any(cells) else []
    counts = [(get_number(values, "rows"), get_number(values, "tokens")) for values in (before, after)]
    for place, label in enumerate(("rows", "supervised tokens")):
        cells = ["" if count[place] is None else f"{count[place]:,}" for count in counts]
        rows += [[label, *cells]] if any(cells) else []
    return rows


def benchmark_table(metrics: Mapping[str, Any]) -> list[list[str]]:
    """lm-eval's tasks, base beside tuned, and the change in points."""
    before, after = (
        dict(iterate_leaves(as_mapping(get_path(metrics, f"{when}.lm_eval")))) for when in ("before", "after")
    )
    rows = [["task", "base", "tuned", "points"]]
    for task in {**before, **after}:
        old, new = (finite_number(values.get(task)) for values in (before, after))
        points = "" if None in (old, new) else f"{100 * (new - old):+.1f}"
        rows.append([task, *("" if value is None else f"{value:.1%}" for value in (old, new)), points])
    return rows


def other_metrics(metrics: Mapping[str, Any]) -> list[list[str]]:
    """What was measured and stands in none of the other tables."""
    found = [
        {
            path: value
            for path, value in iterate_leaves(as_mapping(metrics.get(when)))
            if not SHOWN_ELSEWHERE.fullmatch(path)
        }
        for when in ("before", "after")
    ]
    rows = [["measure", "base", "tuned"]]
    for path in found[0] | found[1]:
        cells = [values.get(path, "") for values in found]
        texts = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        rows.append([path.replace("_", " ").replace(".", ", "), *texts])
    return rows


SHOWN_ELSEWHERE = re.compile(
    r"((short|long|sampled)\.)?(rows|exact_match|stops|rouge_l|chrf)|sampled\.(temperature|top_p)|lm_eval\..*"
    r"|held_out\.(loss|p_stop|rows|tokens|(source|turn|position|length)\..*)"
    r"|raw_text_loss|raw_text\.(loss|bits_per_byte|tokens|bytes|source)"
)
