"""All metrics of a run in one table, METRICS.

A new metric is one entry here and one function where it is measured: for answers, a function with the metric's name in
evaluation/text_metrics.py.
"""

import re
from dataclasses import dataclass
from typing import Literal

# What a metric is measured on: base and tuned model on answers, on thoughts before them, on held-out rows, on those of
# them that end with a stop token and on raw text; a training and its cost once; a comparison is of base with tuned.
MeasuredOn = Literal["answers", "thoughts", "held_out", "stop_tokens", "raw_text", "training", "cost", "comparison"]


@dataclass(frozen=True)
class Metric:
    """One metric. `objective` and `trainer.metric_for_best_model` take its name."""

    name: str  # its key in metrics.json: for the tuned model, or for the run
    label: str  # in tables and in the model card
    format: str  # a format specification
    better: Literal["lower", "higher"]
    measured_on: MeasuredOn
    path: str = ""  # its place in `before` and `after` of metrics.json
    column: str = ""  # the head of its column in a sweep's table; without one it has a column as the objective only
    column_format: str = ""  # where a sweep needs more digits to tell jobs apart


METRICS = {
    metric.name: metric
    for metric in (
        Metric("exact_match", "exact match", ".1%", "higher", "answers", "exact_match", "exact"),
        Metric("rouge_l", "ROUGE-L", ".1%", "higher", "answers", "rouge_l"),
        Metric("chrf", "chrF", ".1%", "higher", "answers", "chrf"),
        Metric("stops", "stops by itself", ".1%", "higher", "answers", "stops"),
        Metric("thinks", "thinks before it answers", ".1%", "higher", "thoughts", "thinking.share"),
        Metric("thought_tokens", "tokens of a thought", ",.0f", "lower", "thoughts", "thinking.tokens"),
        Metric("answered", "answers after its thought", ".1%", "higher", "thoughts", "thinking.answered"),
        Metric("p_stop", "p(stop)", ".1%", "higher", "stop_tokens", "held_out.p_stop", "p(stop)", ".3f"),
        Metric("eval_loss", "held-out loss", ".3f", "lower", "held_out", "held_out.loss", "held out", ".4f"),
        Metric("raw_text_loss", "loss on raw text", ".3f", "lower", "raw_text", "raw_text.loss"),
        Metric("bits_per_byte", "bits per byte", ".3f", "lower", "raw_text", "raw_text.bits_per_byte"),
        Metric("forgetting.change", "change of the loss on raw text", "+z.1%", "lower", "comparison", column="forgot"),
        Metric("train_loss", "training loss", ".3f", "lower", "training", column="loss", column_format=".4f"),
        Metric("train_seconds", "training time", "duration", "lower", "cost", column="time"),
        Metric("train_tokens", "tokens trained on", ",.0f", "higher", "cost"),
        Metric("tokens_per_second", "tokens per second", ",.0f", "higher", "cost"),
        Metric("peak_memory_gib", "peak memory, GiB", ".2f", "lower", "cost"),
        Metric("mfu", "model FLOPs utilization (MFU)", ".1%", "higher", "cost"),
    )
}


def metrics_on(*measured_on: MeasuredOn) -> list[Metric]:
    """The metrics that are measured on one of these, in the table's order."""
    return [metric for metric in METRICS.values() if metric.measured_on in measured_on]


def objective_direction(name: str | None) -> Literal["minimize", "maximize"]:
    """Which value of a metric is the better one; without a name the metric is a loss.

    `name` is a metric or a part of the held-out loss, also without `eval_`, as the trainer has it. A user's own metric
    is better the higher, unless its name says that it is a loss.

    >>> [objective_direction(name) for name in (None, "eval_loss", "loss_turn_later", "mine.word_overlap")]
    ['minimize', 'minimize', 'minimize', 'maximize']
    """
    name = "eval_loss" if name is None else name
    if known := METRICS.get(name) or METRICS.get(name.removeprefix("eval_")):
        return "minimize" if known.better == "lower" else "maximize"
    return "minimize" if re.search(r"loss|perplexity|entropy", name) else "maximize"
