"""The templates of `templates/` as Markdown and as one HTML file that loads nothing.

A template of a page calls the blocks of `page`, which are macros of the same names in markdown.jinja and html.jinja:
title, heading, text, points, note, table, prose, code, picture, folded. In text, `code` is code.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from sft_recipes.config.nested_values import get_number, get_path
from sft_recipes.errors import escape_markdown, mask_secrets, plural, printable
from sft_recipes.reporting.figures import save_figure, to_svg
from sft_recipes.reporting.run_folder import replace_file
from sft_recipes.reporting.text import fit_cell, flat_table, format_value, render_table, shorten_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUMBER_PATTERN = re.compile(r"[-+−]?[\d.,]+(e[-+]?\d+)?%?")  # 1,054, 98.9%, 2.00e-05
LONG_CELL = 280  # characters; an HTML table shows the beginning of longer cells, which opens


@dataclass(frozen=True)
class Picture:
    """A figure, the name of its file beside the Markdown, and what it shows in words."""

    figure: "Figure"
    file: str
    label: str


def write_pages(folder: Path, template: str, title: str, **values: Any) -> None:
    """Writes the template as report.md, to which `save_pictures` adds, and as report.html, the last file of a run."""
    replace_file(folder / "report.md", render_markdown(template, title=title, **values))
    replace_file(folder / "report.html", render_html(template, title, **values))


def save_pictures(folder: Path, pictures: Sequence[Picture]) -> None:
    """Writes the figures that the Markdown in this folder shows."""
    for picture in pictures:
        save_figure(picture.figure, folder / picture.file)


def render_markdown(template: str, **values: Any) -> str:
    """The template as Markdown; `save_pictures` writes the figures that it shows."""
    return render_template(template, "markdown.jinja", values).strip() + "\n"


def render_html(template: str, title: str, **values: Any) -> str:
    """The template as one HTML file without scripts or anything to load; all values are escaped."""
    return wrap_html(title, Markup(render_template(template, "html.jinja", {"title": title, **values})))


def render_lines(template: str, **values: Any) -> list[str]:
    """The lines of a template without blocks, for a terminal and for both kinds of page."""
    return [line for line in render_template(template, "markdown.jinja", values).split("\n") if line]


def wrap_html(title: str, body: Markup) -> str:
    """A page with this body, in light or dark as the reader's system is."""
    return printable(load_environment(escaping=True).get_template("page.jinja").render(title=title, body=body))


def render_template(template: str, blocks: str, values: dict[str, Any]) -> str:
    """The template with the blocks of one of the two languages, without secrets and what shows one text as another."""
    environment = load_environment(escaping=blocks == "html.jinja")
    page = environment.get_template(blocks).module
    return printable(mask_secrets(environment.get_template(template).render(page=page, **values)))


@cache  # the first page takes 0.7 s, most of it to compile the templates; a sweep writes one for every job
def load_environment(escaping: bool) -> Environment:
    """The templates, with HTML escaping or without, and the filters that their blocks use."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=escaping,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,  # a misspelt name ends the report; by default it would be an empty place in it
    )
    environment.globals |= {"get_path": get_path, "get_number": get_number, "lines": render_lines, "plural": plural}
    texts = (format_value, flat_table, shorten_path, escape_markdown, markdown_text, html_text, fence, cell_start)
    environment.filters |= {each.__name__: each for each in (*texts, markdown_table, number_columns, to_svg)}
    return environment


def markdown_text(text: str) -> str:
    """A paragraph of Markdown: `code` as it is, and elsewhere what could be HTML escaped."""
    pieces = re.split(r"(`[^`\n]+`)", text)
    return "".join(piece if place % 2 else re.sub(r"[<&]", r"\\\g<0>", piece) for place, piece in enumerate(pieces))


def markdown_table(rows: Sequence[Sequence[str]], width: int) -> str:
    """A table of Markdown, its cells cut at `width` columns."""
    return "\n".join(render_table([[escape_markdown(fit_cell(cell, width)) for cell in row] for row in rows]))


def fence(text: str) -> str:
    """More backticks than stand together anywhere in the text, at least three."""
    return "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))


def html_text(text: str) -> Markup:
    """A paragraph of HTML, escaped: `code` is code, a line break is one."""
    escaped = str(escape(str(text)))
    return Markup(re.sub(r"`([^`\n]+)`", r"<code>\1</code>", escaped).replace("\n", "<br>\n"))


def number_columns(rows: Sequence[Sequence[str]]) -> list[bool]:
    """Which columns hold nothing but numbers below their head; they are aligned to the right.

    >>> number_columns([["a", "b"], ["x", "1,054"], ["y", "98.9%"], ["z", ""]])
    [False, True]
    """
    _, *body = rows
    return [all(NUMBER_PATTERN.fullmatch(cell) for cell in column if cell) for column in zip(*body, strict=True)]


def cell_start(text: str) -> str:
    """The beginning of a long cell; empty for a cell that is shown whole."""
    return "" if len(text) <= LONG_CELL and text.count("\n") < 8 else fit_cell(text, LONG_CELL // 2)
