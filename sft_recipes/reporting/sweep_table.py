"""The jobs of a sweep as one table: grouped over their seeds, sorted by the objective."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from sft_recipes.config.hydra_plugin import objective_direction
from sft_recipes.reporting.text import render_table

# What the table shows of a job: its head, where metrics.json has it, how it is written.
METRIC_COLUMNS = {
    "loss": (("train_loss",), ".4f"),
    "held out": (("eval_loss", "after.held_out.loss"), ".4f"),
    "exact": (("exact_match",), ".1%"),
    "p(stop)": (("p_stop",), ".3f"),
    "forgot": (("forgetting.change",), "+z.1%"),
    "time": (("train_seconds",), "duration"),
}
DROPPED_FIRST = ("time", "p(stop)", "job", "loss", "forgot", "exact", "held out")  # where the terminal is narrow
SHORT_NAMES = {"learning_rate": "lr", "num_train_epochs": "epochs", "per_device_train_batch_size": "batch"}
# Student's t, two-sided 95 %, for 1 to 10 degrees of freedom; with more, 10 are counted.
T95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
UNFINISHED = "it did not come to its end."


@dataclass(frozen=True)
class Job:
    """One job's folder as it was left."""

    number: int
    settings: dict[str, str]  # its overrides
    objective: str | None
    metrics: dict[str, Any]  # empty where the job did not finish
    reason: str = ""  # why it did not


@dataclass(frozen=True)
class Group:
    """The jobs that differ in nothing but their seed, and the objective of those that finished."""

    settings: dict[str, str]  # those that vary in the sweep
    jobs: list[Job]
    objective: list[float]


def rank_groups(found: Sequence[Job], goal: str) -> list[Group]:
    """The jobs grouped over their seeds, the best group first, those without a result last."""
    keys = list(dict.fromkeys(key for job in found for key in job.settings))
    vary = [key for key in keys if key != "seed" and len({job.settings.get(key) for job in found}) > 1]
    members: dict[tuple, list[Job]] = {}
    for each in found:
        members.setdefault(tuple(each.settings.get(key, "") for key in vary), []).append(each)
    names = METRIC_COLUMNS[column_head(goal)][0] if column_head(goal) in METRIC_COLUMNS else (goal,)
    groups = [
        Group(dict(zip(vary, key, strict=True)), some, metric_values(some, names)) for key, some in members.items()
    ]
    sign = 1 if objective_direction(goal) == "minimize" else -1

    def place(group: Group) -> tuple[bool, float]:
        mean = fmean(group.objective) if group.objective else math.nan
        return math.isnan(mean), 0.0 if math.isnan(mean) else sign * mean

    return sorted(groups, key=place)


def metric_values(some: Sequence[Job], names: Sequence[str]) -> list[float]:
    """What these jobs measured under the first of the dotted names that is there."""
    found = [
        next((value for name in names if (value := metric_values_of(job.metrics, name)) is not None), None)
        for job in some
    ]
    return [float(value) for value in found if value is not None]


def metric_values_of(metrics: dict[str, Any], name: str) -> Any:
    """The value under a dotted name, or None."""
    value: Any = metrics
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def column_head(goal: str) -> str:
    """The head of the objective's column: one of COLUMNS, or its own name."""
    return next((head for head, (names, _) in METRIC_COLUMNS.items() if goal in names), goal)


def table_rows(groups: Sequence[Group], goal: str, name: Callable[[str], str]) -> list[list[str]]:
    """The table's cells, the head first; settings are headed by `name(key)`, columns without a number are left out."""
    seeds = any(len(group.jobs) > 1 for group in groups)
    mark = column_head(goal)
    columns = METRIC_COLUMNS if mark in METRIC_COLUMNS else {mark: ((goal,), ".4f")} | METRIC_COLUMNS
    there = {mark, *(head for head, (names, _) in columns.items() if any(metric_values(g.jobs, names) for g in groups))}
    columns = {head: columns[head] for head in columns if head in there}
    vary = list(groups[0].settings)
    lines = [["job", *map(name, vary), *columns, *["to the best"] * seeds]]
    for group in groups:
        cells = {head: format_cell(metric_values(group.jobs, names), form) for head, (names, form) in columns.items()}
        cells[mark] = cells[mark] or ("unfinished" if UNFINISHED in {job.reason for job in group.jobs} else "failed")
        listed = ", ".join(str(job.number) for job in group.jobs)
        verdict = [compare_to_best(group.objective, groups[0].objective)] if seeds else []
        lines.append([listed, *map(tidy_value, group.settings.values()), *cells.values(), *verdict])
    return lines


def format_cell(values: Sequence[float], form: str) -> str:
    """The mean, ± the standard deviation where there are several values.

    >>> format_cell([0.5, 0.7], ".1%"), format_cell([-1e-6], "+z.1%"), format_cell([], ".4f")
    ('60.0% ± 14.1%', '+0.0%', '')
    """
    if not values:
        return ""
    if form == "duration":
        return format_duration(fmean(values))
    spread = f" ± {stdev(values):{form.lstrip('+z')}}" if len(values) > 1 else ""
    return f"{fmean(values):{form}}{spread}"


def format_duration(seconds: float) -> str:
    """Seconds in at most seven letters.

    >>> format_duration(0.25), format_duration(38.2), format_duration(600), format_duration(9000)
    ('0.2 s', '38 s', '10 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.{int(seconds < 10)}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def compare_to_best(values: Sequence[float], best: Sequence[float]) -> str:
    """How far a group is from the best one, or that the seeds cannot tell them apart."""
    if values is best:
        return "best"
    if not values or not best:
        return ""
    if min(len(values), len(best)) > 1 and within_noise(values, best):
        return "no difference"
    return f"{fmean(values) - fmean(best):+.4f}" + (" (one seed)" if min(len(values), len(best)) < 2 else "")


def within_noise(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether Welch's t-test (Biometrika 34, 1947) finds no difference of the means at 95 %.

    >>> within_noise([1, 2, 3], [2, 3, 4]), within_noise([1, 2, 3], [5, 6, 7])
    (True, False)
    """
    parts = [stdev(values) ** 2 / len(values) for values in (a, b)]
    if not sum(parts):
        return fmean(a) == fmean(b)
    freedom = sum(parts) ** 2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, (a, b), strict=True))
    return abs(fmean(a) - fmean(b)) <= T95[min(int(freedom), len(T95)) - 1] * math.sqrt(sum(parts))


def fit_to_width(lines: list[list[str]], keep: str, width: int) -> list[str]:
    """The table in at most `width` columns, if it can be: some go, in the order of FIRST_TO_GO, and a line says so."""
    gone = []
    for head in DROPPED_FIRST:
        if len(render_table(lines)[0]) <= width:
            break
        if head in lines[0] and head != keep:
            place = lines[0].index(head)
            lines = [[*line[:place], *line[place + 1 :]] for line in lines]
            gone.append(head)
    return render_table(lines) + ([f"Too wide for the terminal, in the report: {', '.join(gone)}."] if gone else [])


def short_name(key: str) -> str:
    """The head of a setting's column where room is scarce.

    >>> short_name("trainer.learning_rate"), short_name("+recipe"), short_name("adapter.lora.r")
    ('lr', 'recipe', 'lora.r')
    """
    parts = key.lstrip("+").split(".")
    return SHORT_NAMES.get(parts[-1]) or ".".join(parts[-2:] if len(parts[-1]) < 3 else parts[-1:])


def tidy_value(value: str) -> str:
    """A setting's value as a person writes it: Hydra writes numbers in full.

    >>> tidy_value("0.0001"), tidy_value("3"), tidy_value("0.00012345"), tidy_value("False")
    ('1e-4', '3', '1.23e-4', 'false')
    """
    try:
        number = float(value)
    except ValueError:
        return value.lower() if value in ("True", "False") else value
    if not math.isfinite(number) or number == int(number):
        return value
    if abs(number) > 0.01:
        return f"{number:.4g}"
    mantissa, _, exponent = f"{number:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
