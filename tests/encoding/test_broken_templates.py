"""Our chat templates, each with a character or a block missing, train rows all the same or are refused in one line."""

import copy
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_recipes.config.options import ModelOptions
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.errors import ConfigError, DataError
from sft_recipes.modeling.loading import load_own_tokenizer, prepare_with
from support.paths import ROOT, TEMPLATES

ASKED, SAID = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TALKS = [
    [{"role": "system", "content": "Be brief."}, ASKED, SAID, ASKED, SAID],
    [ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "1"}, SAID],
    [ASKED, SAID | {"reasoning_content": "Hm."}],
]


@st.composite
def broken_templates(draw) -> str:
    """One of ours without one of its characters, one of its blocks, or all that stands behind a block."""
    path = ROOT / "sft_recipes" / "encoding" / "templates" / f"{draw(st.sampled_from(TEMPLATES))}.jinja"
    text = path.read_text(encoding="utf-8")
    block = draw(st.sampled_from(list(re.finditer(r"\{[%{#].*?[%}#]\}", text, re.DOTALL))))
    place = draw(st.integers(0, len(text) - 1))
    return draw(st.sampled_from([
        text[:place] + text[place + 1 :], text[: block.start()] + text[block.end() :], text[: block.end()],
    ]))  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    """The tiny model's, of which each example changes a copy."""
    return load_own_tokenizer(ModelOptions(str(ROOT / "sft_recipes" / "tiny" / "model")))


@given(template=broken_templates())
def test_a_broken_template_is_used_or_refused(tokenizer, tmp_path_factory, template):
    path = tmp_path_factory.getbasetemp() / "broken.jinja"
    path.write_text(template, encoding="utf-8")
    mine = copy.deepcopy(tokenizer)
    try:
        marked, _ = prepare_with(mine, ModelOptions("tiny", str(path)))
        encoder = Encoder(mine, marked)
    except (ConfigError, DataError) as error:
        assert "\n" not in str(error)
        return
    for messages in TALKS:
        try:
            assert len(encoder.encode([{"messages": messages}])["input_ids"]) > 0
        except DataError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(("template", "line"), [
    ("{% for message in messages %}\n{{ message.content }", "line 2: unexpected '}'"),
    ("{{ messages | nope }}", "line 1: No filter named 'nope'."),
    ("{#" * 500_000, "line 1: Missing end of comment tag"),  # from each of which a search would go to the end
    ("{#" + "control tokens:" * 50_000, "line 1: Missing end of comment tag"),
    ("{{ strftime_now('" * 50_000, "line 1: expected token ',', got '{'"),
    (f"{{{{ {'(' * 5000}1{')' * 5000} }}}}", "cannot be read: maximum recursion depth exceeded"),
    (f"{{{{ {'9' * 5000} }}}}", "cannot be read: Exceeds the limit (4300 digits)"),
    (b"\xff", "cannot be read: 'utf-8' codec can't decode byte 0xff"),
])  # fmt: skip
def test_what_is_no_jinja_is_named_with_its_line(tokenizer, tmp_path, template, line):
    (tmp_path / "mine.jinja").write_bytes(template if isinstance(template, bytes) else template.encode())
    with pytest.raises(ConfigError, match=rf"^model.chat_template(=\S+)?,? {re.escape(line)}"):
        prepare_with(copy.deepcopy(tokenizer), ModelOptions("tiny", str(tmp_path / "mine.jinja")))


def test_a_template_in_the_place_of_its_name_is_named(tokenizer):
    pasted = "{% for message in messages %}{{ message.content }}{% endfor %}" * 9
    with pytest.raises(ConfigError, match="^model.chat_template=.* cannot be read: .*File name too long"):
        prepare_with(copy.deepcopy(tokenizer), ModelOptions("tiny", pasted))
