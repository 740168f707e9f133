"""What a person is shown is the mask itself, in colour, without colour, and as HTML."""

import re

import pytest

from sft_recipes import DataError, show_mask
from sft_recipes.data.mask_view import mask_tokens, render_html, render_terminal, show_whitespace
from sft_recipes.encoding.encoder import Encoder

ROW = [
    ("user", False, False), ("\n", False, False), ("two", True, False), (" words", True, False), ("<stop>", True, True),
    ("\n", False, False),
]  # fmt: skip


def test_without_colour_brackets_show_where_the_loss_is():
    assert render_terminal(ROW, 80, colour=False) == "user│⏎│\n⟦two│·words│<stop>■⟧⏎│"


def test_lines_wrap_between_tokens():
    lines = render_terminal([("abcd", True, False)] * 5, 12, colour=False).splitlines()
    assert lines == ["⟦abcd│abcd│", "abcd│abcd│", "abcd⟧"]


def test_in_colour_only_supervised_tokens_are_on_green():
    shown = render_terminal(ROW, 80, colour=True)
    assert re.findall(r"\033\[30;(?:42|102)m(.*?)\033\[0m", shown) == ["two", "·words"]
    assert re.findall(r"\033\[30;43m(.*?)\033\[0m", shown) == ["<stop>"]
    assert re.sub(r"\033\[[\d;]*m", "", shown) == "user⏎\ntwo·words<stop>⏎"


def test_html_marks_supervised_tokens_and_escapes_the_rest():
    assert (
        render_html([("<b>", False, False), ("a", True, False)])
        == '<div class="sft-mask"><span>&lt;b&gt;</span><span class="on">a</span></div>'
    )


def test_braces_and_blanks_survive():
    assert show_whitespace("\t{x} \r\n") == "→{x}·␍⏎"
    assert "{x}" in render_terminal([("{x}", True, False)], 80, colour=True)


def test_characters_of_several_tokens_stand_together(chat_tokenizer):
    tokenizer, marked, _ = chat_tokenizer("llama3", "chatml")
    ids = tokenizer("né 🙂!", add_special_tokens=False).input_ids
    shown = [text for text, _, _ in mask_tokens(Encoder(tokenizer, marked), ids, ids)]
    assert "".join(shown) == "né 🙂!" and not any("\ufffd" in text for text in shown)
    assert render_terminal([("x", True, False)], 80, colour=False) == "⟦x⟧"


def test_show_mask_renders_a_row_in_a_notebook(chat_tokenizer):
    tokenizer, _, _ = chat_tokenizer("llama3", "chatml")
    shown = show_mask({"instruction": "Add.", "input": "", "output": "2"}, tokenizer)._repr_html_()
    assert re.findall(r'<span class="(\w+)">(.*?)</span>', shown) == [("on", "2"), ("stop", "&lt;|im_end|&gt;")]


@pytest.mark.parametrize(
    "row", [{"text": "a\ud83d"}, [{"role": "user", "content": "a\ud83d"}, {"role": "assistant", "content": "b"}]]
)
def test_half_of_a_surrogate_pair_gets_a_line(chat_tokenizer, row):
    tokenizer, _, _ = chat_tokenizer("llama3", "chatml")
    with pytest.raises(DataError) as raised:
        show_mask(row, tokenizer, "chatml")
    assert str(raised.value) == "the text has a lone surrogate, '\\ud83d', half a character. Remove or replace it."
