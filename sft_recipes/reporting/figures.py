"""Figures by matplotlib, for paper, for a light page and for a dark one."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from sft_recipes.reporting.run_folder import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# On paper. In a page `to_svg` gives them as var(--blue), so that the page can lighten them in the dark. Blue, orange,
# green and purple are told apart by colour-blind readers, too (Okabe and Ito 2008).
COLOURS = {
    "ink": "#24292f",
    "faint": "#d0d7de",
    "blue": "#0072b2",
    "orange": "#d55e00",
    "green": "#008f68",
    "purple": "#9c4f92",
}
SERIES = [COLOURS[name] for name in ("blue", "orange", "green", "purple")]
LINE_STYLES = ("-", "--", ":", "-.")


def styled_subplots(rows: int = 1, columns: int = 1, height: float = 3.0, width: float = 6.0, **options: Any) -> tuple:
    """A figure of so many inches and its axes, as `matplotlib.pyplot.subplots` gives them, in our style.

    Colours should come from COLOURS or SERIES (the default cycle), or `to_svg` cannot adapt them to a dark page. A
    phone shows six inches at 85 %, so that the text stays legible. A legend is drawn by `draw_legend`.
    """
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: it keeps every figure and chooses a screen

    ink, faint = COLOURS["ink"], COLOURS["faint"]
    style = {
        "font.size": 11, "axes.titlesize": 11, "text.color": ink, "axes.labelcolor": ink, "xtick.color": ink,
        "ytick.color": ink, "axes.edgecolor": faint, "axes.grid": True, "grid.color": faint, "grid.linewidth": 0.6,
        "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
        "axes.prop_cycle": matplotlib.cycler(color=SERIES), "lines.linewidth": 1.6, "axes.titlelocation": "left",
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, **options)


def draw_legend(axes: "Axes", **options: Any) -> None:
    """A legend without a box, which would stay white on a dark page."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=COLOURS["ink"], **options)


def to_svg(figure: "Figure", label: str = "") -> Markup:
    """The figure as an <svg> element for a page: its text is text, its colours are the page's, `label` says what it is.

    A label should be there once a page, since the names inside the element are made from it.
    """
    import matplotlib

    drawn = io.StringIO()
    # text as text can be read aloud, searched and lightened, and is a third smaller than outlines (24 and 33 KB for
    # two curves); the salt makes the same figure the same bytes, so that a report made again does not change
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label or "figure"}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = drawn.getvalue()
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = text.replace("#000000", COLOURS["ink"])  # matplotlib's own default
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name}, {colour})")
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1))


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes the figure as a picture on white, in the format of the path's suffix."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:], dpi=150, facecolor="white")
    replace_file(path, drawn.getvalue())


def has_curve(history: Sequence[Mapping[str, float]]) -> bool:
    """Whether there is something to plot: a training loss, or two held-out losses.

    A run shorter than `trainer.logging_steps` logs its held-out loss at the end and nothing else.
    """
    return bool(history_column(history, "loss")[0]) or len(history_column(history, "eval_loss")[0]) > 1


def plot_losses(history: Sequence[Mapping[str, float]]) -> "Figure":
    """The training loss, the held-out loss and, where it is logged, the learning rate, over the steps."""
    rates = history_column(history, "learning_rate")
    panels = {"rows": 2, "height": 3.8, "height_ratios": (3, 1)} if rates[0] else {}
    figure, panels = styled_subplots(**panels, sharex=True, squeeze=False)
    upper, lower = panels[0][0], panels[-1][0]
    draw_curve(upper, history, "loss", label="training")
    draw_curve(upper, history, "eval_loss", label="held-out", marker="o")
    upper.set_ylabel("loss (nats a token)")
    scale_losses(upper)
    draw_legend(upper)
    if rates[0]:
        lower.plot(*rates, color=COLOURS["green"])
        lower.set(ylabel="learning rate", ylim=(0, None))
    lower.set_xlabel("step")
    figure.align_ylabels()
    return figure


def draw_curve(axes: "Axes", history: Sequence[Mapping[str, float]], key: str, marker: str = "", **look: Any) -> bool:
    """Draws what was logged under this key over the steps, a single value as a point; whether there was any."""
    steps, values = history_column(history, key)
    if steps:
        axes.plot(steps, values, marker=marker or ("o" if len(steps) == 1 else ""), markersize=4, **look)
    return bool(steps)


def scale_losses(axes: "Axes") -> None:
    """Gives the axes a logarithmic scale with labels at 1, 2 and 5 where the losses span more than a factor of ten."""
    from matplotlib.ticker import LogLocator

    values = [value for line in axes.lines for value in line.get_ydata() if math.isfinite(value)]
    if values and min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter("{x:g}")


def history_column(history: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """The steps that have a number under this key, and the numbers."""
    found = [(entry["step"], entry[key]) for entry in history if isinstance(entry.get(key), int | float)]
    return [step for step, _ in found], [value for _, value in found]


def plot_weight_change(change: Mapping[str, float]) -> "Figure":
    """How far the weights moved: a line over the layers for each part of a layer, a level for what is in no layer.

    The names are those of metrics.json: `layer 0 attention`, `layer 0 mlp`, …, and `embeddings` or the like.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = styled_subplots(height=2.4)
    lines: dict[str, list[tuple[int, float]]] = {}
    for name, value in change.items():
        if found := re.fullmatch(r"layer (\d+) (.+)", name):
            lines.setdefault(found[2], []).append((int(found[1]), value))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=name)
    for place, name in enumerate(name for name in change if not name.startswith("layer ")):
        axes.axhline(change[name], color=COLOURS["ink"], linestyle=LINE_STYLES[1 + place % 3], label=name)
    axes.set(ylim=(0, None), ylabel="relative change", xlabel="layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    draw_legend(axes, ncols=2)
    return figure
