"""Text in tables, Markdown and HTML: formatted, escaped, cut and aligned."""

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_recipes.config.nested_values import as_mapping, iterate_leaves
from sft_recipes.errors import printable

Rows = list[list[str]]  # of a table, its head first; empty where there is nothing to show


def format_value(value: float | None, form: str, sentence: str = "{}") -> str:
    """A number by its format specification, or a `duration` in seconds, in a sentence; empty where there is none.

    >>> format_value(0.25, ".1%"), format_value(None, ".1%"), format_value(600, "duration", "in {}")
    ('25.0%', '', 'in 10 min')
    """
    if value is None:
        return ""
    return sentence.format(format_duration(value) if form == "duration" else f"{value:{form}}")


def format_duration(seconds: float) -> str:
    """Seconds in at most seven characters.

    >>> format_duration(0.25), format_duration(38.2), format_duration(600), format_duration(9000)
    ('0.2 s', '38 s', '10 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.{int(seconds < 10)}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def shorten_path(path: Any) -> str:
    """A name on the hub as it is; of an absolute path the last two parts.

    >>> shorten_path("Qwen/Qwen3-0.6B-Base"), shorten_path("/home/me/models/tiny/model"), shorten_path("/model")
    ('Qwen/Qwen3-0.6B-Base', '…/tiny/model', '/model')
    """
    parts = Path(str(path)).parts  # of an absolute path the root is the first
    return "/".join(("…", *parts[-2:])) if len(parts) > 2 and parts[0].startswith("/") else str(path)


def render_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table that reads the same in a terminal and as Markdown; the first row is its head.

    >>> print("\\n".join(render_table([["", "base"], ["exact match", "1 %"]])))
    |             | base |
    | ----------- | ---- |
    | exact match | 1 %  |
    """
    if not rows:
        return []
    widths = [max(map(display_width, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| "
        + " | ".join(cell + " " * (width - display_width(cell)) for cell, width in zip(row, widths, strict=True))
        + " |"
        for row in rows
    ]
    return [lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]]


def compact_table(rows: Rows) -> Rows:
    """The table without rows that hold nothing but their label, and without columns that hold nothing but their head.

    Empty where no row is left.

    >>> compact_table([["", "base", "tuned"], ["exact match", "", "1 %"], ["chrF", "", ""]])
    [['', 'tuned'], ['exact match', '1 %']]
    """
    head, *body = rows
    body = [row for row in body if any(row[1:])]
    used = [place for place, column in enumerate(zip(*body, strict=True)) if place == 0 or any(column)]
    return [[row[place] for place in used] for row in (head, *body)] if body else []


def flat_table(values: Mapping[str, Any]) -> Rows:
    """Nested values by their dotted paths, in a table without a head.

    >>> flat_table({"gpu": None, "threads": {"cpu": 2}})
    [['', ''], ['gpu', 'none'], ['threads.cpu', '2']]
    """
    leaves = iterate_leaves(as_mapping(values))
    rows = ([key.replace("_", " "), "none" if value is None else str(value)] for key, value in leaves)
    return compact_table([["", ""], *rows])


def fit_cell(text: str, width: int) -> str:
    """A text as one cell of a table, cut at `width` columns; line breaks and control characters are made visible.

    >>> fit_cell("one\\ntwo", 10), fit_cell("日本語の文", 6)
    ('one⏎two', '日本…')
    """
    text = printable(text.replace("\n", "⏎").replace("\t", " "))
    if display_width(text) <= width:
        return text
    while display_width(text) >= width:
        text = text[: min(len(text) - 1, width)]
    return text + "…"


def display_width(text: str) -> int:
    """How many columns the text takes in a terminal."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text
    )
