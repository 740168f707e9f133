"""Text in tables, Markdown and HTML: escaped, cut and aligned."""

import re
import unicodedata
from collections.abc import Sequence
from html import escape


def escape_markdown(text: str) -> str:
    """The text with every character that Markdown would take for its own written out; | is a table's.

    >>> escape_markdown("a|b *c* snake_case <script>")
    'a\\\\|b \\\\*c\\\\* snake_case \\\\<script>'
    """
    return re.sub(r"[\\`*\[\]<&|~$]|(?<!\w)_|_(?!\w)|^[#>]", r"\\\g<0>", text)


def render_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table that reads alike in a terminal and as Markdown; the first row is the head.

    >>> print("\\n".join(render_table([["", "base"], ["exact match", "1 %"]])))
    |             | base |
    | ----------- | ---- |
    | exact match | 1 %  |
    """
    widths = [max(map(display_width, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| "
        + " | ".join(cell + " " * (width - display_width(cell)) for cell, width in zip(row, widths, strict=True))
        + " |"
        for row in rows
    ]
    return [lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]]


def fit_cell(text: str, width: int) -> str:
    """A text as one cell of a table: line breaks made visible, control characters too, cut at `width` columns.

    >>> fit_cell("one\\ntwo", 10), fit_cell("日本語の文", 6)
    ('one⏎two', '日本…')
    """
    text = text.replace("\n", "⏎").replace("\t", " ")
    text = "".join("�" if unicodedata.category(letter) == "Cc" else letter for letter in text)
    if display_width(text) <= width:
        return text
    while display_width(text) >= width:
        text = text[: min(len(text) - 1, width)]
    return text + "…"


def display_width(text: str) -> int:
    """How many columns of a terminal the text takes."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text
    )


def escape_html(text: str) -> str:
    """The text with everything that HTML would take for its own written out, control characters made visible."""
    return escape("".join("�" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text))
