"""Sections of text, tables, code and figures as Markdown and as one HTML file that needs no other."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from sft_recipes.reporting.figures import save_figure, to_svg
from sft_recipes.reporting.text import escape_html, escape_markdown, fit_cell, render_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLESHEET = Path(__file__).with_name("page.css")
NUMBER_PATTERN = re.compile(r"[-+−]?[\d.,]+(e[-+]?\d+)?%?")  # 1,054, 98.9%, 2.00e-05
LONG_CELL = 280  # characters of a cell that an HTML table shows before it folds the rest away


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
    parts = [f"# {escape_markdown(title)}"]
    for heading, blocks in sections.items():
        parts += [f"## {escape_markdown(heading)}"] if heading else []
        parts += [block_to_markdown(block) for block in blocks]
    return "\n\n".join(parts) + "\n"


def save_pictures(folder: Path, sections: Sections) -> None:
    """Writes every figure of the sections into the folder, under its file's name."""
    for block in iterate_pictures(block for blocks in sections.values() for block in blocks):
        save_figure(block.figure, folder / block.file)


def iterate_pictures(blocks: Iterable[Block]) -> Iterator[Picture]:
    """The pictures among these blocks, folded ones too."""
    for block in blocks:
        if isinstance(block, Picture):
            yield block
        elif isinstance(block, Folded):
            yield from iterate_pictures(block.blocks)


def block_to_markdown(block: Block) -> str:
    """One block as Markdown."""
    if isinstance(block, Table):
        return "\n".join(
            render_table([[escape_markdown(fit_cell(cell, block.width)) for cell in row] for row in block.rows])
        )
    if isinstance(block, Picture):
        return f"![{escape_markdown(block.label)}]({block.file})"
    if isinstance(block, Code):
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block.text)), default=0))
        return f"{fence}{block.language}\n{block.text.rstrip()}\n{fence}"
    if isinstance(block, Note):
        return f"> {markdown_paragraph(block.text)}"
    if isinstance(block, Folded):
        inside = "\n\n".join(block_to_markdown(part) for part in block.blocks)
        return f"<details><summary>{escape(block.summary)}</summary>\n\n{inside}\n\n</details>"
    if isinstance(block, list):
        return "\n".join(f"- {markdown_paragraph(point)}" for point in block)
    return markdown_paragraph(block)


def markdown_paragraph(text: str) -> str:
    """A paragraph for Markdown, with what could be HTML outside of `code` written out."""
    pieces = re.split(r"(`[^`\n]+`)", text)
    return "".join(piece if index % 2 else re.sub(r"[<&]", r"\\\g<0>", piece) for index, piece in enumerate(pieces))


def to_html(title: str, sections: Sections, home: str = "") -> str:
    """The page as one HTML file without scripts or anything to load; `home` is the line above the title."""
    parts = [f"<p class=home>{escape_html(home)}</p>" if home else "", f"<h1>{escape_html(title)}</h1>"]
    for heading, blocks in sections.items():
        inside = "\n".join(block_to_html(block) for block in blocks)
        parts.append(f"<section>{f'<h2>{escape_html(heading)}</h2>' if heading else ''}\n{inside}\n</section>")
    style = STYLESHEET.read_text(encoding="utf-8")
    head = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape_html(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<style>{style}</style></head>
<body>"""
    return "\n".join([head, *parts, "</body></html>\n"])


def block_to_html(block: Block) -> str:
    """One block as HTML."""
    if isinstance(block, Table):
        return html_table(block)
    if isinstance(block, Picture):
        return f"<figure>{to_svg(block.figure, block.label)}</figure>"
    if isinstance(block, Code):
        return f"<pre><code>{escape_html(block.text.rstrip())}</code></pre>"
    if isinstance(block, Note):
        return f"<p class=note>{inline_html(block.text)}</p>"
    if isinstance(block, Folded):
        inside = "\n".join(block_to_html(part) for part in block.blocks)
        return f"<details><summary>{escape_html(block.summary)}</summary>\n{inside}\n</details>"
    if isinstance(block, list):
        return "<ul>" + "".join(f"<li>{inline_html(point)}</li>" for point in block) + "</ul>"
    return f"<p>{inline_html(block)}</p>"


def html_table(block: Table) -> str:
    """A table whose columns of numbers stand to the right and whose long cells are folded."""
    head, *body = block.rows
    numbers = [
        all(NUMBER_PATTERN.fullmatch(row[place]) for row in body if row[place]) and not (block.prose and place)
        for place in range(len(head))
    ]
    kinds = [' class="number"' if number else "" for number in numbers]
    top = "".join(f"<th{kind}>{escape_html(cell)}</th>" for kind, cell in zip(kinds, head, strict=True))
    top = f"<thead><tr>{top}</tr></thead>\n" if any(head) else ""
    labels = [f' data-head="{escape_html(label)}"' if block.prose else "" for label in head]
    rows = ""
    for row in body:
        cells = zip(kinds, labels, row, strict=True)
        rows += f"<tr>{''.join(f'<td{kind}{label}>{fold_cell(cell)}</td>' for kind, label, cell in cells)}</tr>\n"
    name = "table prose" if block.prose else "table"
    return f'<div class="{name}"><table>{top}<tbody>{rows}</tbody></table></div>'


def fold_cell(text: str) -> str:
    """A cell; of a long one the beginning, which opens."""
    if len(text) <= LONG_CELL and text.count("\n") < 8:
        return escape_html(text)
    start = fit_cell(text, LONG_CELL // 2)
    return f"<details><summary><span>{escape_html(start)}</span></summary>{escape_html(text)}</details>"


def inline_html(text: str) -> str:
    """A paragraph's text: `code` is code, a line break is one, everything else is written out."""
    return re.sub(r"`([^`\n]+)`", r"<code>\1</code>", escape_html(text)).replace("\n", "<br>\n")
