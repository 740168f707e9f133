"""Sections of text, tables, code and figures as Markdown and as one HTML file that needs no other."""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from sft_recipes import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = Path(__file__).with_name("page.css")
NUMBER = re.compile(r"[-+−]?[\d.,]+(e[-+]?\d+)?%?")  # 1,054, 98.9%, 2.00e-05
LONG = 280  # characters of a cell that an HTML table shows before it folds the rest away


@dataclass(frozen=True)
class Table:
    """Rows of cells, the first row the head; Markdown cuts its cells at `width`, HTML folds long ones."""

    rows: Sequence[Sequence[str]]
    width: int = 200
    prose: bool = False  # cells that are read, not compared: on a phone each row becomes a block of its own


@dataclass(frozen=True)
class Picture:
    """A figure of `plots`; beside Markdown it lies as `file`, what it shows is said in `label`."""

    figure: "Figure"
    file: str
    label: str


@dataclass(frozen=True)
class Code:
    """Lines as they are."""

    text: str
    language: str = ""


@dataclass(frozen=True)
class Note:
    """A paragraph that should not be overlooked."""

    text: str


@dataclass(frozen=True)
class Folded:
    """Blocks behind a line that opens them."""

    summary: str
    blocks: Sequence["Block"] = field(default_factory=list)


# A string is a paragraph in which `code` is code and a line break is one; a list of strings has a point for each.
Block = str | list[str] | Table | Picture | Code | Note | Folded
Sections = Mapping[str, Sequence[Block]]  # heading → blocks; an empty heading has none


def to_markdown(title: str, sections: Sections) -> str:
    """The page as Markdown; `save_pictures` writes the files that it shows."""
    parts = [f"# {plain(title)}"]
    for heading, blocks in sections.items():
        parts += [f"## {plain(heading)}"] if heading else []
        parts += [markdown_of(block) for block in blocks]
    return "\n\n".join(parts) + "\n"


def save_pictures(folder: Path, sections: Sections) -> None:
    """Writes every figure of the sections into the folder, under its file's name."""
    for block in pictures(block for blocks in sections.values() for block in blocks):
        plots.save(block.figure, folder / block.file)


def pictures(blocks: Iterable[Block]) -> Iterator[Picture]:
    """The pictures among these blocks, folded ones too."""
    for block in blocks:
        if isinstance(block, Picture):
            yield block
        elif isinstance(block, Folded):
            yield from pictures(block.blocks)


def markdown_of(block: Block) -> str:
    """One block as Markdown."""
    if isinstance(block, Table):
        return "\n".join(table([[plain(shown(cell, block.width)) for cell in row] for row in block.rows]))
    if isinstance(block, Picture):
        return f"![{plain(block.label)}]({block.file})"
    if isinstance(block, Code):
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block.text)), default=0))
        return f"{fence}{block.language}\n{block.text.rstrip()}\n{fence}"
    if isinstance(block, Note):
        return f"> {paragraph(block.text)}"
    if isinstance(block, Folded):
        inside = "\n\n".join(markdown_of(part) for part in block.blocks)
        return f"<details><summary>{escape(block.summary)}</summary>\n\n{inside}\n\n</details>"
    if isinstance(block, list):
        return "\n".join(f"- {paragraph(point)}" for point in block)
    return paragraph(block)


def paragraph(text: str) -> str:
    """A paragraph for Markdown, with what could be HTML outside of `code` written out."""
    pieces = re.split(r"(`[^`\n]+`)", text)
    return "".join(piece if index % 2 else re.sub(r"[<&]", r"\\\g<0>", piece) for index, piece in enumerate(pieces))


def plain(text: str) -> str:
    """The text with every character that Markdown would take for its own written out; | is a table's.

    >>> plain("a|b *c* snake_case <script>")
    'a\\\\|b \\\\*c\\\\* snake_case \\\\<script>'
    """
    return re.sub(r"[\\`*\[\]<&|~$]|(?<!\w)_|_(?!\w)|^[#>]", r"\\\g<0>", text)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table that reads alike in a terminal and as Markdown; the first row is the head.

    >>> print("\\n".join(table([["", "base"], ["exact match", "1 %"]])))
    |             | base |
    | ----------- | ---- |
    | exact match | 1 %  |
    """
    widths = [max(map(columns, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell + " " * (width - columns(cell)) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return [lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]]


def shown(text: str, width: int) -> str:
    """A text as one cell of a table: line breaks made visible, control characters too, cut at `width` columns.

    >>> shown("one\\ntwo", 10), shown("日本語の文", 6)
    ('one⏎two', '日本…')
    """
    text = text.replace("\n", "⏎").replace("\t", " ")
    text = "".join("�" if unicodedata.category(letter) == "Cc" else letter for letter in text)
    if columns(text) <= width:
        return text
    while columns(text) >= width:
        text = text[: min(len(text) - 1, width)]
    return text + "…"


def columns(text: str) -> int:
    """How many columns of a terminal the text takes."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text
    )


def to_html(title: str, sections: Sections, home: str = "") -> str:
    """The page as one HTML file without scripts or anything to load; `home` is the line above the title."""
    parts = [f"<p class=home>{escaped(home)}</p>" if home else "", f"<h1>{escaped(title)}</h1>"]
    for heading, blocks in sections.items():
        inside = "\n".join(html_of(block) for block in blocks)
        parts.append(f"<section>{f'<h2>{escaped(heading)}</h2>' if heading else ''}\n{inside}\n</section>")
    style = STYLE.read_text(encoding="utf-8")
    head = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escaped(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<style>{style}</style></head>
<body>"""
    return "\n".join([head, *parts, "</body></html>\n"])


def html_of(block: Block) -> str:
    """One block as HTML."""
    if isinstance(block, Table):
        return html_table(block)
    if isinstance(block, Picture):
        return f"<figure>{plots.svg(block.figure, block.label)}</figure>"
    if isinstance(block, Code):
        return f"<pre><code>{escaped(block.text.rstrip())}</code></pre>"
    if isinstance(block, Note):
        return f"<p class=note>{inline(block.text)}</p>"
    if isinstance(block, Folded):
        inside = "\n".join(html_of(part) for part in block.blocks)
        return f"<details><summary>{escaped(block.summary)}</summary>\n{inside}\n</details>"
    if isinstance(block, list):
        return "<ul>" + "".join(f"<li>{inline(point)}</li>" for point in block) + "</ul>"
    return f"<p>{inline(block)}</p>"


def html_table(block: Table) -> str:
    """A table whose columns of numbers stand to the right and whose long cells are folded."""
    head, *body = block.rows
    numbers = [
        all(NUMBER.fullmatch(row[place]) for row in body if row[place]) and not (block.prose and place)
        for place in range(len(head))
    ]
    kinds = [' class="number"' if number else "" for number in numbers]
    top = "".join(f"<th{kind}>{escaped(cell)}</th>" for kind, cell in zip(kinds, head, strict=True))
    top = f"<thead><tr>{top}</tr></thead>\n" if any(head) else ""
    labels = [f' data-head="{escaped(label)}"' if block.prose else "" for label in head]
    rows = ""
    for row in body:
        cells = zip(kinds, labels, row, strict=True)
        rows += f"<tr>{''.join(f'<td{kind}{label}>{folded(cell)}</td>' for kind, label, cell in cells)}</tr>\n"
    name = "table prose" if block.prose else "table"
    return f'<div class="{name}"><table>{top}<tbody>{rows}</tbody></table></div>'


def folded(text: str) -> str:
    """A cell; of a long one the beginning, which opens."""
    if len(text) <= LONG and text.count("\n") < 8:
        return escaped(text)
    start = shown(text, LONG // 2)
    return f"<details><summary><span>{escaped(start)}</span></summary>{escaped(text)}</details>"


def inline(text: str) -> str:
    """A paragraph's text: `code` is code, a line break is one, everything else is written out."""
    return re.sub(r"`([^`\n]+)`", r"<code>\1</code>", escaped(text)).replace("\n", "<br>\n")


def escaped(text: str) -> str:
    """The text with everything that HTML would take for its own written out, control characters made visible."""
    return escape("".join("�" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text))
