"""Sections become Markdown and one HTML file; nothing that a model says can change the page."""

import re
from html.parser import HTMLParser

import pytest

from sft_recipes.reporting.document import Code, Folded, Note, Picture, Table, save_pictures, to_html, to_markdown
from sft_recipes.reporting.figures import COLOURS, plot_losses, plot_weight_change, styled_subplots, to_svg
from sft_recipes.reporting.text import display_width, fit_cell

NASTY = "<script>alert(1)</script> a | b\n**c** `d` [e](f) <details>"


class Tags(HTMLParser):
    """Every tag that opens, in order."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self.open = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass


@pytest.mark.parametrize(
    "block", [NASTY, [NASTY], Note(NASTY), Code(NASTY), Table([[NASTY], [NASTY]]), Folded(NASTY, [NASTY])]
)
def test_html_shows_tags_in_an_answer_as_text(block):
    page = to_html(NASTY, {NASTY: [block]}, home=NASTY)
    assert "<script>" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "details" not in Tags(page).found or isinstance(block, Folded)


def test_the_html_page_closes_what_it_opens_and_loads_nothing():
    figure = plot_losses(
        [{"step": 1, "loss": 2.0, "learning_rate": 1.0}, {"step": 2, "loss": 1.0, "learning_rate": 0.5}]
    )
    blocks = ["one", ["two"], Table([["a"], ["b"]]), Picture(figure, "x.png", "x"), Code("c"), Folded("d", ["e"])]
    page = to_html("title", {"part": blocks})
    assert Tags(page).open == []
    assert not re.search(r'src=|href="(?!#)|<link|@import|url\((?!#)', page)


@pytest.mark.parametrize("block", [NASTY, [NASTY], Note(NASTY), Table([[NASTY], [NASTY]])])
def test_markdown_shows_tags_in_an_answer_as_text(block):
    outside = re.sub(r"`[^`]*`", "", to_markdown("t", {"": [block]}))
    assert not re.search(r"(?<!\\)<", outside)


def test_a_markdown_table_has_as_many_cells_as_its_head_whatever_stands_in_them():
    head, line, row = to_markdown("t", {"": [Table([["x|y", "z"], [NASTY, "1"]])]}).strip().splitlines()[2:]
    assert [len(re.split(r"(?<!\\)\|", text)) for text in (head, line, row)] == [4, 4, 4]


def test_markdown_code_with_a_fence_of_its_own_stays_one_block():
    page = to_markdown("t", {"": [Code("```\nx\n```", "yaml")]})
    assert page == "# t\n\n````yaml\n```\nx\n```\n````\n"


def test_markdown_of_every_block():
    blocks = ["Say `x` < y.", ["a", "b"], Note("careful"), Folded("more", ["inside"])]
    assert to_markdown("run", {"": ["first"], "Part": blocks}).split("\n\n") == [
        "# run", "first", "## Part", "Say `x` \\< y.", "- a\n- b", "> careful",
        "<details><summary>more</summary>", "inside", "</details>\n",
    ]  # fmt: skip


def test_a_long_cell_is_folded_in_html_and_cut_in_markdown():
    table = Table([["answer"], ["word " * 100 + "end"]], width=20)
    page = to_html("t", {"": [table]})
    assert "<td><details><summary><span>word word" in page and "word end</details></td>" in page
    assert "| word word word word… |" in to_markdown("t", {"": [table]})


def test_a_short_cell_is_not_folded():
    assert "<details>" not in to_html("t", {"": [Table([["answer"], ["yes\nno"]])]})


def test_columns_of_numbers_stand_to_the_right():
    page = to_html("t", {"": [Table([["a", "b"], ["x", "1,054"], ["y", "98.9%"], ["z", ""]])]})
    assert '<th class="number">b</th>' in page and "<td>x</td>" in page


def test_a_head_without_words_is_left_out_in_html():
    assert "<thead>" not in to_html("t", {"": [Table([["", ""], ["a", "b"]])]})


@pytest.mark.parametrize(("text", "wide"), [("abc", 3), ("日本", 4), ("é", 1), ("e\u0301", 1), ("🙂", 2), ("", 0)])
def test_columns_counts_what_a_terminal_shows(text, wide):
    assert display_width(text) == wide


@pytest.mark.parametrize("text", ["日本語の答えです", "a日b本c語", "abcdefgh", "e\u0301" * 9])
@pytest.mark.parametrize("width", [4, 5, 6, 7])
def test_a_cut_cell_fits_its_width_and_ends_with_an_ellipsis(text, width):
    cut = fit_cell(text, width)
    assert display_width(cut) <= width and cut.endswith("…") and text.startswith(cut[:-1])


def test_control_characters_do_not_reach_the_terminal():
    assert fit_cell("a\x1b[31mb\tc\r", 20) == "a�[31mb c�"


def test_a_figure_in_a_page_takes_the_page_s_colours():
    figure, axes = styled_subplots()
    axes.plot([1, 2], [1, 2])
    axes.set_title("Loss & <others>")
    drawn = to_svg(figure, 'a "label"')
    assert drawn.startswith('<svg role="img" aria-label="a &quot;label&quot;"')
    assert "var(--blue, #0072b2)" in drawn and "Loss &amp; &lt;others&gt;</text>" in drawn
    assert not [colour for colour in re.findall(r"(?<!, )#[0-9a-f]{6}\b", drawn) if colour in COLOURS.values()]
    assert "#000000" not in drawn and "date" not in drawn.lower()


def test_a_figure_is_drawn_alike_twice():
    assert len({to_svg(plot_losses([{"step": 1, "loss": 1.0}]), "loss") for _ in range(2)}) == 1


def test_pictures_are_saved_folded_ones_too(tmp_path):
    pictures = [Picture(styled_subplots()[0], name, "x") for name in ("a.png", "b.svg")]
    save_pictures(tmp_path, {"": [pictures[0], Folded("more", [pictures[1]])]})
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "b.svg").read_text()


def lines(figure, place=0):
    """The points of every line in one of the figure's axes, by the line's name."""
    return {line.get_label(): line.get_xydata().tolist() for line in figure.axes[place].lines}


def test_the_loss_curves_hold_the_history_s_numbers():
    history = [
        {"step": 1, "loss": 4.0, "learning_rate": 0.1},
        {"step": 2, "eval_loss": 3.0},
        {"step": 3, "loss": float("nan"), "learning_rate": 0.0},
        {"step": 3, "train_runtime": 1.0},
    ]
    figure = plot_losses(history)
    assert lines(figure)["held-out"] == [[2.0, 3.0]]
    assert lines(figure)["training"][0] == [1.0, 4.0]
    assert list(lines(figure, 1).values()) == [[[1.0, 0.1], [3.0, 0.0]]]


@pytest.mark.parametrize("history", [[], [{"step": 1, "eval_loss": 1.0}], [{"step": 1, "loss": 0.0}]])
def test_loss_curves_of_very_little_are_drawn(history):
    assert to_svg(plot_losses(history), "loss").endswith("</svg>\n")


def test_weights_have_a_line_for_each_part_of_a_layer_and_a_point_for_the_rest():
    change = {
        "embeddings": 0.1,
        "layer 0 attention": 0.2,
        "layer 0 mlp": 0.3,
        "layer 1 attention": 0.4,
        "layer 1 mlp": 0.5,
    }
    drawn = lines(plot_weight_change(change))
    assert drawn["attention"] == [[0.0, 0.2], [1.0, 0.4]]
    assert drawn["mlp"] == [[0.0, 0.3], [1.0, 0.5]]
    assert [points for name, points in drawn.items() if name.startswith("_")] == [[[2.0, 0.1]]]
