"""Templates become Markdown and one HTML file; nothing that a model says can change the page."""

import re
from html.parser import HTMLParser

import pytest

from sft_recipes.reporting.document import Picture, load_environment, render_html, render_markdown, save_pictures
from sft_recipes.reporting.figures import COLOURS, has_curve, plot_losses, plot_weight_change, styled_subplots, to_svg
from sft_recipes.reporting.text import display_width, fit_cell
from support.pages import html_block, markdown_block

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


BLOCKS = [
    ("title", NASTY), ("heading", NASTY), ("text", NASTY), ("points", [NASTY]), ("note", NASTY), ("code", NASTY),
    ("table", [[NASTY], [NASTY]]), ("prose", [[NASTY], [NASTY]]), ("folded", NASTY),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "value"), BLOCKS)
def test_html_shows_tags_in_an_answer_as_text(kind, value):
    page = html_block(kind, value, inside=NASTY, title=NASTY)
    assert "<script>" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page.partition("<body>")[2]
    assert "details" not in Tags(page).found or kind == "folded"


def test_the_html_page_closes_what_it_opens_and_loads_nothing():
    history = [{"step": 1, "loss": 2.0, "learning_rate": 1.0}, {"step": 2, "loss": 1.0, "learning_rate": 0.5}]
    picture = Picture(plot_losses(history), "x.png", "x")
    blocks = [("text", "one"), ("points", ["two"]), ("table", [["a"], ["b"]]), ("code", "c"), ("folded", "d")]
    for page in (html_block("picture", picture), *(html_block(*block) for block in blocks)):
        assert Tags(page).open == []
        assert not re.search(r'src=|href="(?!#)|<link|@import|url\((?!#)', page)


@pytest.mark.parametrize("kind", ["title", "heading", "text", "note"])
def test_markdown_shows_tags_in_an_answer_as_text(kind):
    for page in (markdown_block(kind, NASTY), markdown_block("points", [NASTY])):
        assert not re.search(r"(?<!\\)<", re.sub(r"`[^`]*`", "", page))
    for kind in ("table", "prose"):
        assert not re.search(r"(?<!\\)<", re.sub(r"`[^`]*`", "", markdown_block(kind, [[NASTY], [NASTY]])))


def test_a_markdown_table_has_as_many_cells_as_its_head_whatever_stands_in_them():
    head, line, row = markdown_block("table", [["x|y", "z"], [NASTY, "1"]]).strip().splitlines()
    assert [len(re.split(r"(?<!\\)\|", text)) for text in (head, line, row)] == [4, 4, 4]


def test_markdown_code_with_a_fence_of_its_own_stays_one_block():
    assert markdown_block("code", "```\nx\n```", "yaml") == "````yaml\n```\nx\n```\n````\n"


def test_a_blank_line_parts_the_blocks_of_a_markdown_page():
    template = """{{ page.title("run") }}
{{ page.text("first") }}
{% if true %}
{{ page.heading("Part") }}
{{ page.text("Say `x` < y.") }}
{{ page.points(["a", "b"]) }}
{{ page.note("careful") }}
{% call page.folded("more") %}
{{ page.text("inside") }}
{{ page.text("twice") }}
{% endcall %}
{% endif %}
{{ page.code("1\n\n2", "text") }}
"""
    assert render_markdown(load_environment(False).from_string(template)).split("\n\n") == [
        "# run", "first", "## Part", "Say `x` \\< y.", "- a\n- b", "> careful",
        "<details><summary>more</summary>", "inside", "twice", "</details>", "```text\n1", "2\n```\n",
    ]  # fmt: skip


def test_a_value_that_a_template_names_but_does_not_get_is_an_error():
    with pytest.raises(Exception, match="'nosuch' is undefined"):
        render_html(load_environment(True).from_string("{{ page.text(nosuch) }}"), "t")


def test_a_long_cell_is_folded_in_html_and_cut_in_markdown():
    rows = [["answer"], ["word " * 100 + "end"]]
    page = html_block("prose", rows, 20)
    assert "<details><summary><span>word word" in page and "word end</details></td>" in page
    assert "| word word word word… |" in markdown_block("prose", rows, 20)


def test_a_short_cell_is_not_folded():
    assert "<details>" not in html_block("table", [["answer"], ["yes\nno"]])


def test_columns_of_numbers_stand_to_the_right():
    page = html_block("table", [["a", "b"], ["x", "1,054"], ["y", "98.9%"], ["z", ""]])
    assert '<th class="number">b</th>' in page and "<td>x</td>" in page


def test_a_head_without_words_is_left_out_in_html():
    assert "<thead>" not in html_block("table", [["", ""], ["a", "b"]])


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
    assert drawn.startswith('<svg role="img" aria-label="a &#34;label&#34;"')
    assert "var(--blue, #0072b2)" in drawn and "Loss &amp; &lt;others&gt;</text>" in drawn
    assert not [colour for colour in re.findall(r"(?<!, )#[0-9a-f]{6}\b", drawn) if colour in COLOURS.values()]
    assert "#000000" not in drawn and "date" not in drawn.lower()


def test_a_figure_is_no_wider_than_a_phone_and_its_text_is_legible_there():
    style = re.search(r"^svg \{(.*?)\}", html_block("text", "x"), re.M)[1]
    assert "max-width: 100%" in style and "min-width" not in style
    figure, axes = styled_subplots()
    label = axes.xaxis.get_ticklabels()[0].get_fontsize()
    assert label * (400 - 2 * 14.4) / (figure.get_figwidth() * 72) > 9  # pixels; the page has margins of 0.9 rem


def test_a_figure_is_drawn_alike_twice():
    assert len({to_svg(plot_losses([{"step": 1, "loss": 1.0}]), "loss") for _ in range(2)}) == 1


def test_pictures_are_saved_in_the_format_of_their_name(tmp_path):
    save_pictures(tmp_path, [Picture(styled_subplots()[0], name, "x") for name in ("a.png", "b.svg")])
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


@pytest.mark.parametrize(
    ("history", "drawn"),
    [
        ([], False),
        ([{"step": 1, "train_runtime": 1.0}], False),
        ([{"step": 1, "eval_loss": 1.0}, {"step": 1, "train_runtime": 1.0}], False),
        ([{"step": 1, "eval_loss": 1.0}, {"step": 2, "eval_loss": 0.5}], True),
        ([{"step": 1, "loss": 1.0}], True),
    ],
)
def test_a_chart_needs_a_training_loss_or_two_held_out_losses(history, drawn):
    assert has_curve(history) is drawn


def test_without_a_learning_rate_there_is_no_axis_for_it():
    assert len(plot_losses([{"step": 1, "loss": 1.0}]).axes) == 1


def test_weights_have_a_line_for_each_part_of_a_layer_and_a_level_for_the_rest():
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
    assert [height for _, height in drawn["embeddings"]] == [0.1, 0.1]
