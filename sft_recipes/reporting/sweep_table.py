"""The jobs of a sweep as one table: grouped over their seeds, sorted by the objective."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from sft_recipes.config.metrics import METRICS, Metric, objective_direction
from sft_recipes.config.nested_values import get_path
from sft_recipes.reporting.text import Rows, compact_table, format_value, render_table

SHORT_NAMES = {"learning_rate": "lr", "num_train_epochs": "epochs", "per_device_train_batch_size": "batch"}
# scipy, which has the distribution, would be one more dependency for ten numbers.
# Student's t, two-sided 95 %, for 1 to 10 degrees of freedom; with more, 10 are counted.
T95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
UNFINISHED = "it did not finish."


@dataclass(frozen=True)
class Job:
    """What one job's folder holds."""

    name: str  # of its folder within the sweep's
    settings: dict[str, str]  # its overrides
    objective: str | None
    metrics: dict[str, Any]  # empty where the job did not finish
    reason: str = ""  # why not
    stopped: str = ""  # why a sweep that halves has trained it no further


@dataclass(frozen=True)
class Group:
    """The jobs that differ in nothing but their seed, and the objective of those that finished."""

    settings: dict[str, str]  # those that vary in the sweep
    jobs: list[Job]
    objective: list[float]

    @property
    def name(self) -> str:
        """The names of its jobs."""
        return ", ".join(job.name for job in self.jobs)

    @property
    def mean(self) -> float:
        """The mean of the objective, NaN without a result."""
        return fmean(self.objective) if self.objective else math.nan


def rank_groups(jobs: Sequence[Job], objective: str) -> list[Group]:
    """The jobs grouped over their seeds, the best group first, those without a result last."""
    keys = list(dict.fromkeys(key for job in jobs for key in job.settings))
    vary = [key for key in keys if key != "seed" and len({job.settings.get(key) for job in jobs}) > 1]
    members: dict[tuple, list[Job]] = {}
    for job in jobs:
        members.setdefault(tuple(job.settings.get(key, "") for key in vary), []).append(job)
    groups = [
        Group(dict(zip(vary, key, strict=True)), some, metric_values(some, objective)) for key, some in members.items()
    ]
    sign = 1 if objective_direction(objective) == "minimize" else -1
    return sorted(groups, key=lambda group: math.inf if math.isnan(group.mean) else sign * group.mean)


def metric_values(jobs: Sequence[Job], name: str) -> list[float]:
    """The metric's value in each of these jobs that has one; NaN, too, which is a result."""
    values = (get_path(job.metrics, name) for job in jobs)
    return [float(value) for value in values if isinstance(value, int | float)]


def table_columns(objective: str) -> dict[str, Metric]:
    """The metrics of the table by the head of their column, the objective first."""
    # a part of the held-out loss and a user's own metric are in no table
    first = METRICS.get(objective) or Metric(objective, objective, ".4f", "lower", "comparison")
    return {first.column or first.name: first} | {m.column: m for m in METRICS.values() if m.column}


def table_rows(groups: Sequence[Group], objective: str, name: Callable[[str], str]) -> Rows:
    """The table's cells, the head first; settings are headed by `name(key)`, columns without a number are left out."""
    seeds = any(len(group.jobs) > 1 for group in groups)
    columns = table_columns(objective)
    rows = [["job", *map(name, groups[0].settings), *columns, "to the best"]]
    for group in groups:
        cells = [format_cell(metric_values(group.jobs, m.name), m.column_format or m.format) for m in columns.values()]
        cells[0] = cells[0] or ("unfinished" if UNFINISHED in {job.reason for job in group.jobs} else "failed")
        verdict = compare_to_best(group.objective, groups[0].objective) if seeds else ""
        rows.append([group.name, *map(tidy_value, group.settings.values()), *cells, verdict])
    return compact_table(rows)


def format_cell(values: Sequence[float], form: str) -> str:
    """The mean, ± the standard deviation where there are several values.

    >>> format_cell([0.5, 0.7], ".1%"), format_cell([-1e-6], "+z.1%"), format_cell([], ".4f")
    ('60.0% ± 14.1%', '+0.0%', '')
    """
    if not values:
        return ""
    spread = f" ± {format_value(stdev(values), form.lstrip('+z'))}" if len(values) > 1 else ""
    return f"{format_value(fmean(values), form)}{spread}"


def compare_to_best(values: Sequence[float], best: Sequence[float]) -> str:
    """How far a group is from the best one, or that the seeds cannot tell them apart."""
    if values is best:
        return "best"
    if not values or not best:
        return ""
    if within_noise(values, best):
        return "no difference"
    return f"{fmean(values) - fmean(best):+z.4f}" + (" (one seed)" if min(len(values), len(best)) < 2 else "")


def within_noise(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether Welch's t-test (Biometrika 34, 1947) finds no difference of the means at 95 %; one seed shows no noise.

    >>> within_noise([1, 2, 3], [2, 3, 4]), within_noise([1, 2, 3], [5, 6, 7]), within_noise([1], [1])
    (True, False, False)
    """
    if min(len(a), len(b)) < 2:
        return False
    parts = [stdev(values) ** 2 / len(values) for values in (a, b)]
    if not sum(parts):
        return fmean(a) == fmean(b)
    freedom = sum(parts) ** 2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, (a, b), strict=True))
    return abs(fmean(a) - fmean(b)) <= T95[min(int(freedom), len(T95)) - 1] * math.sqrt(sum(parts))


def pareto_front(groups: Sequence[Group], objective: str) -> dict[str, tuple[float, float]]:
    """Means of forgetting and objective of the groups to which no other is better in one and as good in the other.

    By the names of their jobs, those that forget least first; empty where forgetting was not measured.
    """
    sign = 1 if objective_direction(objective) == "minimize" else -1
    points = []
    for group in groups:
        forgotten = metric_values(group.jobs, "forgetting.change")
        if forgotten and math.isfinite(group.mean):
            points.append((fmean(forgotten), sign * group.mean, group.name))
    front, best = {}, math.inf
    for forgotten, value, name in sorted(points):
        if value < best:
            front[name], best = (forgotten, sign * value), value
    return front


def fit_to_width(rows: Rows, objective: str, width: int) -> list[str]:
    """The table in at most `width` columns, if that is possible: metrics are left out from the right, then `job`.

    The objective stays. A line names what was left out.
    """
    _, *rest = table_columns(objective)
    left_out = []
    for head in [*reversed(rest), "job"]:
        if head in rows[0] and len(render_table(rows)[0]) > width:
            place = rows[0].index(head)
            rows = [[*row[:place], *row[place + 1 :]] for row in rows]
            left_out.append(head)
    note = [f"Too wide for the terminal, in the report: {', '.join(left_out)}."] if left_out else []
    return render_table(rows) + note


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
