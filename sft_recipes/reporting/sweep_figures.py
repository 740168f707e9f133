"""Figures of a sweep: the losses of all its jobs, and the objective over a grid of two settings."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sft_recipes.config.nested_values import get_path
from sft_recipes.reporting.figures import COLOURS, SERIES, history_column, scale_losses, styled_subplots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sft_recipes.reporting.sweep_table import Group

LINE_STYLES = ("-", "--", ":", "-.")
MAX_STYLED_GROUPS = len(SERIES) * len(LINE_STYLES)  # groups that can be told apart


def plot_curves(groups: Sequence["Group"], tidy: Callable[[str], str]) -> "Figure":
    """The training loss of every job over its steps and, where it was measured on the way, the held-out loss.

    Groups are in the table's order; beyond 16 of them only the best four have a colour.
    """
    from matplotlib.ticker import MaxNLocator

    on_the_way = any(
        len(history_column(job.metrics.get("history", []), "eval_loss")[0]) > 1 for g in groups for job in g.jobs
    )
    height = 3.4 + 2 * on_the_way + 0.2 * math.ceil(len(groups) / 3)  # inches; the legend has three columns
    figure, panels = styled_subplots(1 + on_the_way, height=height, sharex=True, squeeze=False)
    looks = group_styles(groups)
    for (axes,), key, label in zip(panels, ("loss", "eval_loss"), ("training", "held-out"), strict=False):
        drawn = []
        for group, look in zip(groups, looks, strict=True):
            name = ", ".join(map(tidy, group.settings.values())) or "all seeds"
            for job in group.jobs:
                steps, values = history_column(job.metrics.get("history", []), key)
                if not steps:
                    continue
                axes.plot(steps, values, marker="o" if len(steps) == 1 else "", markersize=4, label=name, **look)
                drawn += values
                name = "_"  # one entry of the legend for all seeds
        axes.set_ylabel(f"{label} loss (nats a token)")
        scale_losses(axes, drawn)
    panels[-1][0].set_xlabel("step")
    panels[-1][0].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    names = ", ".join(key.rpartition(".")[2] for key in groups[0].settings)
    handles, labels = panels[0][0].get_legend_handles_labels()
    if handles:  # above the axes, where it covers no curve
        style = {"frameon": False, "labelcolor": COLOURS["ink"], "fontsize": 9, "title_fontsize": 9}
        figure.legend(
            handles, labels, loc="outside upper left", ncols=3, title=names or None, alignment="left", **style
        )
    return figure


def group_styles(groups: Sequence["Group"]) -> list[dict[str, Any]]:
    """Colour and line of each group: in a small grid by its two settings, else by its place in the table."""
    if len(groups) > MAX_STYLED_GROUPS:
        faint = {"color": COLOURS["faint"], "zorder": 1}
        return [{"color": SERIES[place]} if place < len(SERIES) else faint for place in range(len(groups))]
    grid = grid_values(groups)
    if grid and len(grid[0]) <= len(SERIES) and len(grid[1]) <= len(LINE_STYLES):
        places = [
            [values.index(value) for values, value in zip(grid, g.settings.values(), strict=True)] for g in groups
        ]
    else:
        places = [divmod(place, len(SERIES))[::-1] for place in range(len(groups))]
    return [{"color": SERIES[colour], "linestyle": LINE_STYLES[line]} for colour, line in places]


def grid_values(groups: Sequence["Group"]) -> list[list[str]] | None:
    """The values of the two settings of a two-way grid in order, or None where it is none."""
    if len(groups[0].settings) != 2:
        return None
    values = [sorted({group.settings[key] for group in groups}, key=sort_key) for key in groups[0].settings]
    full = len(groups) == len(values[0]) * len(values[1]) and min(map(len, values)) > 1
    return values if full else None


def sort_key(value: str) -> tuple[bool, float, str]:
    """A key that sorts numbers by their size, and before words."""
    try:
        return False, float(value), value
    except ValueError:
        return True, 0.0, value


def plot_front(groups: Sequence["Group"], front: Mapping[str, tuple[float, float]], objective: str) -> "Figure":
    """The objective of every finished job over what it forgot, and a line through the Pareto front's means."""
    figure, axes = styled_subplots(height=3.4)
    for job in (job for group in groups for job in group.jobs):
        point = get_path(job.metrics, "forgetting.change"), get_path(job.metrics, objective)
        if None not in point:
            axes.plot(*point, marker="o", linestyle="", color=COLOURS["faint"])
    axes.plot(*zip(*front.values(), strict=True), marker="o", color=SERIES[0])
    for name, point in front.items():
        axes.annotate(name, point, (5, 5), textcoords="offset points", color=COLOURS["ink"])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+.1%}")
    axes.set(xlabel="rise of the loss on raw text: what was forgotten", ylabel=objective)
    return figure


def plot_grid(groups: Sequence["Group"], objective: str, minimize: bool, tidy: Callable[[str], str]) -> "Figure | None":
    """The objective over a two-way grid, the better the darker; None where the sweep is no such grid."""
    grid = grid_values(groups)
    means = {tuple(g.settings.values()): sum(g.objective) / len(g.objective) for g in groups if g.objective}
    finite = [value for value in means.values() if math.isfinite(value)]
    if not grid or not finite:
        return None
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
    from matplotlib.patches import Rectangle

    across, down = grid
    figure, axes = styled_subplots(height=1.2 + 0.55 * len(down), width=min(6.0, 2.2 + 1.1 * len(across)))
    log = min(finite) > 0 and max(finite) > 10 * min(finite)
    norm = (LogNorm if log else Normalize)(min(finite), max(finite))
    ramp = LinearSegmentedColormap.from_list("ramp", ["#e3eff7", "#2f86b9", "#00466e"])
    for x, one in enumerate(across):
        for y, other in enumerate(down):
            value = means.get((one, other), math.nan)
            share, fill = 0.0, "#b8bec4"
            if math.isfinite(value):
                share = float(norm(value)) if max(finite) > min(finite) else 0.5
                share = 1 - share if minimize else share
                fill = ramp(share)
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=fill, edgecolor="none"))
            text = f"{value:.4g}" if (one, other) in means else "failed"
            axes.text(x, y, text, ha="center", va="center", color="#ffffff" if share > 0.4 else "#10161c")
    axes.set(xlim=(-0.5, len(across) - 0.5), ylim=(-0.5, len(down) - 0.5), title=objective)
    axes.set_xticks(range(len(across)), map(tidy, across))
    axes.set_yticks(range(len(down)), map(tidy, down))
    axes.set_xlabel(list(groups[0].settings)[0])
    axes.set_ylabel(list(groups[0].settings)[1])
    axes.grid(False)
    return figure
