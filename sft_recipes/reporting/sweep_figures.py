"""Figures of a sweep: the losses of all its jobs, and the objective over forgetting and over a grid of two settings."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sft_recipes.config.nested_values import get_path
from sft_recipes.reporting.figures import (
    COLOURS,
    LINE_STYLES,
    SERIES,
    draw_curve,
    history_column,
    scale_losses,
    styled_subplots,
)
from sft_recipes.reporting.sweep_table import Group, tidy_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_curves(groups: Sequence[Group]) -> "Figure":
    """The training loss of every job over its steps and, where it was measured on the way, the held-out loss."""
    from matplotlib.ticker import MaxNLocator

    histories = [[job.metrics.get("history") or [] for job in group.jobs] for group in groups]
    on_the_way = any(len(history_column(history, "eval_loss")[0]) > 1 for some in histories for history in some)
    height = 3.4 + 2 * on_the_way + 0.2 * math.ceil(len(groups) / 3)  # inches; the legend has three columns
    figure, panels = styled_subplots(1 + on_the_way, height=height, sharex=True, squeeze=False)
    for (axes,), key, label in zip(panels, ("loss", "eval_loss"), ("training", "held-out"), strict=False):
        for place, (group, some) in enumerate(zip(groups, histories, strict=True)):
            name = ", ".join(map(tidy_value, group.settings.values())) or "all seeds"
            line, colour = divmod(place, len(SERIES))
            style = {"color": SERIES[colour], "linestyle": LINE_STYLES[line % len(LINE_STYLES)]}
            for history in some:
                drawn = draw_curve(axes, history, key, label=name, **style)
                name = "_" if drawn else name  # one entry of the legend for all seeds
        axes.set_ylabel(f"{label} loss (nats a token)")
        scale_losses(axes)
    panels[-1][0].set_xlabel("step")
    panels[-1][0].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    names = ", ".join(key.rpartition(".")[2] for key in groups[0].settings)
    handles, labels = panels[0][0].get_legend_handles_labels()
    if handles:  # above the axes, where it covers no curve
        style = {"frameon": False, "labelcolor": COLOURS["ink"], "fontsize": 9, "title_fontsize": 9, "ncols": 3}
        figure.legend(handles, labels, loc="outside upper left", title=names or None, alignment="left", **style)
    return figure


def plot_front(groups: Sequence[Group], front: Mapping[str, tuple[float, float]], objective: str) -> "Figure":
    """The objective of every finished job over what it forgot, and a line through the Pareto front's means."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, axes = styled_subplots(height=3.4)
    for job in (job for group in groups for job in group.jobs):
        point = get_path(job.metrics, "forgetting.change"), get_path(job.metrics, objective)
        if None not in point:
            axes.plot(*point, marker="o", linestyle="", color=COLOURS["faint"])
    axes.plot(*zip(*front.values(), strict=True), marker="o", color=SERIES[0])
    for name, point in front.items():
        axes.annotate(name, point, (5, 5), textcoords="offset points", color=COLOURS["ink"])
    axes.xaxis.set_major_locator(MaxNLocator(5))  # more labels of small rises (0.0150%) would lie over each other
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(xlabel="rise of the loss on raw text: what was forgotten", ylabel=objective)
    return figure


def plot_grid(groups: Sequence[Group], objective: str, minimize: bool) -> "Figure | None":
    """The objective over a two-way grid, the better the darker; None where the sweep is no such grid."""
    axis_values = [sorted({group.settings[key] for group in groups}, key=sort_key) for key in groups[0].settings]
    means = {tuple(group.settings.values()): group.mean for group in groups if group.objective}
    finite = [value for value in means.values() if math.isfinite(value)]
    is_grid = len(axis_values) == 2 and min(map(len, axis_values)) > 1
    if not (is_grid and finite and len(groups) == len(axis_values[0]) * len(axis_values[1])):
        return None
    from matplotlib.colors import LinearSegmentedColormap

    across, down = axis_values
    figure, axes = styled_subplots(height=1.2 + 0.55 * len(down), width=min(6.0, 2.2 + 1.1 * len(across)))
    shades = ["#e3eff7", "#58a3d0"]  # on all of which dark figures are legible
    ramp = LinearSegmentedColormap.from_list("ramp", shades[::-1] if minimize else shades, bad="#b8bec4")
    log = min(finite) > 0 and max(finite) > 10 * min(finite)
    values = [[means.get((one, other), math.nan) for one in across] for other in down]
    axes.pcolormesh(values, cmap=ramp, norm="log" if log else "linear")
    for y, other in enumerate(down):
        for x, one in enumerate(across):
            text = f"{values[y][x]:.4g}" if (one, other) in means else "failed"
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", color="#10161c")
    axes.set_xticks([place + 0.5 for place in range(len(across))], map(tidy_value, across))
    axes.set_yticks([place + 0.5 for place in range(len(down))], map(tidy_value, down))
    names = list(groups[0].settings)
    axes.set(title=objective, xlabel=names[0], ylabel=names[1])
    axes.grid(False)
    return figure


def sort_key(value: str) -> tuple[bool, float, str]:
    """A key that sorts numbers by their size, and before words."""
    try:
        return False, float(value), value
    except ValueError:
        return True, 0.0, value
