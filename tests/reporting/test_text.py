"""No text of a row or of a model becomes a tag or breaks a table, judged by parsers that are not ours."""

import re
import unicodedata
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from sft_recipes.reporting.text import display_width, fit_cell, render_table
from support.pages import html_block, markdown_block

MARKUP = ["<script>", "</td>", "<b x='", "-->", "&lt;", "&", "|", "\\", "\\|", "`", "``", "```", "*", "_", "[a](b)", "![a](b)", "~~",
          "$", "#", ">", "- ", "1. ", "\n", "\n\n", "\r", "\t", "\x1b[31m", "https://a.b", "<https://a.b>", "---", "日本"]  # fmt: skip
TEXT = st.lists(st.text(max_size=5) | st.sampled_from(MARKUP), max_size=6).map("".join)
LINE = TEXT.filter(str.strip)


def shown(text: str) -> str:
    """The text as a page shows it: control characters made visible, line breaks and tabs kept."""
    return "".join(
        "\ufffd" if unicodedata.category(letter) == "Cc" and letter not in "\n\t" else letter for letter in text
    )


class Page(HTMLParser):
    """The tags of a page's body and the text between them, as a browser's parser sees them."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(page.partition("<body>")[2])
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, tuple(name for name, value in attributes if value != "number")))

    def handle_endtag(self, tag):
        self.tags.append((f"/{tag}", ()))

    def handle_data(self, data):
        self.texts.append(data)

    def handle_comment(self, data):
        self.tags.append(("comment", ()))


BLOCKS = {
    "table": lambda text: [["head", text], [text, "x"]],
    "prose": lambda text: [["head", text], ["x", text]],
    "code": lambda text: text,
    "folded": lambda text: text,
    "title": lambda text: text,
    "heading": lambda text: text,
}


@pytest.mark.parametrize("kind", BLOCKS)
@given(text=TEXT)
def test_in_html_a_text_is_text(kind, text):
    found, plain = (Page(html_block(kind, BLOCKS[kind](words))) for words in (text, "x"))
    assert found.tags == plain.tags
    assert shown(text).rstrip() in "".join(found.texts)


@pytest.mark.parametrize(("kind", "put"), [("text", str), ("points", lambda text: [text]), ("note", str)])
@given(text=TEXT)
def test_in_an_html_paragraph_a_text_is_text_code_and_line_breaks(kind, put, text):
    found = Page(html_block(kind, put(text)))
    assert {tag.strip("/") for tag, _ in found.tags} <= {"p", "ul", "li", "code", "br", "body", "html"}
    assert re.sub("[`\n]", "", shown(text)) in re.sub("[`\n]", "", "".join(found.texts))


def parsed(page: str) -> list:
    """The page's tokens, by CommonMark's rules and with GitHub's tables."""
    return MarkdownIt("commonmark").enable("table").enable("strikethrough").parse(page)


def cells(page: str) -> list[str]:
    """The texts of a page's table, cell by cell; fails where a cell holds more than text."""
    tokens = parsed(page)
    found = []
    for place, token in enumerate(tokens):
        if token.type in ("th_open", "td_open"):
            parts = tokens[place + 1].children
            assert {part.type for part in parts} <= {"text", "text_special"}, [part.type for part in parts]
            found.append("".join(part.content for part in parts))
    return found


@given(st.lists(st.tuples(LINE, LINE), min_size=1, max_size=3))
def test_in_markdown_a_table_has_every_cell_and_nothing_but_its_text(rows):
    page = markdown_block("prose", [["one", "two"], *rows], 40)
    assert cells(page) == [
        fit_cell(cell, 40).strip() for cell in ("one", "two", *(cell for row in rows for cell in row))
    ]


@given(LINE)
def test_in_a_markdown_paragraph_no_text_becomes_a_tag(text):
    for page in (markdown_block("text", text), markdown_block("points", [text]), markdown_block("note", text)):
        tokens = parsed(page)
        kinds = {token.type for token in tokens} | {part.type for token in tokens for part in token.children or []}
        assert not {kind for kind in kinds if kind.startswith("html")}


@given(st.lists(st.lists(TEXT.map(lambda text: fit_cell(text, 30)), min_size=3, max_size=3), min_size=1, max_size=4))
def test_a_table_in_the_terminal_is_as_wide_in_every_line(rows):
    lines = render_table(rows)
    assert len(lines) == len(rows) + 1 and len({display_width(line) for line in lines}) == 1
