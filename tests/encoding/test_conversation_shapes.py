"""A conversation that is filled into the shape of another one is what rendering makes of it, whatever it says."""

import re
from functools import cache
from pathlib import Path

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sft_recipes.encoding.chat_template import TEMPLATES_FOLDER as FOLDER
from sft_recipes.encoding.chat_template import prepare_tokenizer
from sft_recipes.encoding.conversation_shapes import MARK, writes_texts_verbatim
from sft_recipes.encoding.encoder import Encoder
from support.base_tokenizers import KINDS
from support.paths import TEMPLATES, TINY_MODEL

THEIRS = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
VERBATIM = {
    "gemma", "gemma_training", "llama3", "llama3_training", "phi3", "phi3_5", "phi3_5_training", "phi3_training",
    "qwen2_5", "qwen2_5_training", "qwen3_instruct_2507", "qwen3_instruct_2507_training",
}  # fmt: skip
CONTROL = re.compile(r"<\|\w+\|>|<\w+_of_turn>|<\|[A-Z_]+\|>")
# What a filled text could be taken for: marks, thoughts, whole and halved control tokens, half a character
TRAPS = (" ", "\n", "\t", MARK, f"{MARK}0{MARK}", "\0", "<think>\n\n</think>\n\n", "<think>", "</think>", "<|im_end|>", "</s>",
         "<|im_", "end|>", "<", "s>", "\ud83d", "{{ messages }}", "%s", "[INST]", "### Response:")  # fmt: skip
TEXT = st.lists(st.text(max_size=5) | st.sampled_from(TRAPS), max_size=3).map("".join)
PLAIN = st.text(max_size=12).map(str.strip)  # most of what is said, so that shapes come again
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
MORE = st.sampled_from([
    {}, {}, {}, {}, {}, {"train": False}, {"train": True}, {"train": 0}, {"name": "n"}, {"reasoning_content": "Hm."},
    {"reasoning_content": ""}, {"tool_calls": [CALL]}, {"instruction": "Add.", "input": "1"}, {"input": ""}, {"content": None},
])  # fmt: skip
TURNS = st.sampled_from(["ua", "ua", "sua", "uaua", "suaua", "uauaua", "uata", "a", "u", "aa", "usa", "uaa", "suau"])
ROLES = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
BESIDE = st.sampled_from([
    {}, {}, {}, {}, {"train": False}, {"tools": []}, {"tools": [{"type": "function", "function": {"name": "f"}}]},
    {"chat_template_kwargs": {"enable_thinking": False}}, {"chat_template_kwargs": {}}, {"id": 7},
])  # fmt: skip


@st.composite
def conversations(draw) -> dict:
    """Any conversation: most of a few shapes, some with what a formatter never gives."""
    messages = [{"role": ROLES[turn], "content": draw(PLAIN | TEXT)} for turn in draw(TURNS)]
    if draw(st.booleans()):
        messages[draw(st.integers(0, len(messages) - 1))] |= draw(MORE)
    return {"messages": messages} | draw(BESIDE)


def result_of(make, *arguments):
    """What comes out, an error included."""
    try:
        return make(*arguments)
    except Exception as error:
        return type(error), str(error)


encoder_of = cache(Encoder)


@cache
def with_template(path: Path) -> tuple:
    """A tokenizer that knows the control tokens of a template of TRL's, and what training renders."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    control = {*CONTROL.findall(path.read_text()), *("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")}
    tokenizer.add_special_tokens({"extra_special_tokens": sorted(control)}, replace_extra_special_tokens=False)
    return tokenizer, prepare_tokenizer(tokenizer, str(path), any_stop=True, day="2026-11-03")[0]


def ask(question: str, answer: str, **more) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer} | more]}


def check_filling(encoder: Encoder, talks: list[dict], train_on: str, unroll: str) -> None:
    """The rows of each conversation are those that rendering makes of it."""
    for talk in [*talks, *talks]:
        rendered = result_of(encoder.render_contexts, talk, train_on, unroll)
        assert result_of(encoder.contexts, talk, train_on, unroll) == rendered


SETTINGS = {
    "train_on": st.sampled_from(["assistant", "last", "all"]),
    "unroll": st.sampled_from(["auto", "last", "keep"]),
}
TALKS = st.lists(conversations(), min_size=1, max_size=3)
FEW = settings(max_examples=settings.default.max_examples // 2)


@pytest.mark.parametrize(("kind", "template"), [(KINDS[place % 5], name) for place, name in enumerate(TEMPLATES)])
@FEW
@given(talks=TALKS, **SETTINGS)
def test_our_templates_are_filled_as_they_are_rendered(chat_tokenizer, kind, template, talks, train_on, unroll):
    check_filling(encoder_of(*chat_tokenizer(kind, template)[:2]), talks, train_on, unroll)


@pytest.mark.parametrize("path", [path for path in THEIRS if path.stem in VERBATIM], ids=lambda path: path.stem)
@FEW
@given(talks=TALKS, **SETTINGS)
def test_templates_of_trl_are_filled_as_they_are_rendered(path, talks, train_on, unroll):
    check_filling(encoder_of(*with_template(path)), talks, train_on, unroll)


def test_templates_that_look_at_texts_are_always_rendered():
    assert {path.stem for path in THEIRS if writes_texts_verbatim(path.read_text())} == VERBATIM
    looking = [name for name in TEMPLATES if not writes_texts_verbatim((FOLDER / f"{name}.jinja").read_text())]
    assert looking == ["qwen3"]


@pytest.mark.parametrize(
    "line",
    [
        "{{ message.content | upper }}", "{{ message['con' + 'tent'] }}", "{{ message }}", "{{ messages | tojson }}",
        "{{ message.get('content') }}", "{% for key in message %}{{ message[key] }}{% endfor %}", "{{ message.content[:9] }}",
        "{% if 'x' in message.content %}y{% endif %}", "{% if message.content == 'x' %}y{% endif %}", "{{ message.content * 2 }}",
        "{% set said = message.content %}{{ said | length }}", "{{ message.content.split('x')[0] }}", "{{ '%s' % message.content }}",
        "{% macro say() %}{{ message.content }}{% endmacro %}{{ say() | length }}", "{{ dict(message, role='x') }}",
        "{% set ns = namespace(said=message.content) %}{{ ns.said | length }}", "{{ loop.previtem | default(1) }}",
        "{{ [message.content] }}", "{% set a, b = message.content, 1 %}{{ a | length }}", "{{ message.content | trim('x') }}",
        "{{ later | length }}{% set later = message.content %}", "{{ strftime_now('%S') }}", "{{ loop['nextitem'] | string }}",
        "{% if not (message.content is string and message.content is in 'abc') %}y{% endif %}", "{{ message.values() | list }}",
    ],
)  # fmt: skip
def test_a_line_that_does_more_with_a_text_than_to_write_it_is_found(line):
    around = "{% for message in messages %}{{ message.role }}: {{ message.content | trim }}\n", "{% endfor %}"
    assert writes_texts_verbatim("".join(around)) and not writes_texts_verbatim(line.join(around))


def test_flags_and_what_stands_beside_messages_make_another_shape(chat_tokenizer):
    encoder = Encoder(*chat_tokenizer("tiny", "chatml")[:2])
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}]}
    talks = [ask("Hi", "Hello!") | beside for beside in ({}, tools, {"chat_template_kwargs": tools})]
    talks += [ask("Hi", "Hello!") | {"train": train} for train in (False, True, 0)]
    talks += [ask("Hi", "Hello!", train=train) for train in (False, 0, True, 1)]
    for train_on in ("assistant", "last", "all"):
        for unroll in ("auto", "keep"):
            check_filling(encoder, talks, train_on, unroll)


# Templates that show an answer otherwise once it is history: with another heading, or not at all
HISTORY = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ 'A:' if loop.last else 'B:' }}{{ message.content + "
    "eos_token }}{% else %}{{ 'Q:' + message.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}",
    "{% for message in messages %}{% if message.role == 'user' and loop.index0 + 2 >= messages | length %}"
    "{{ 'Q:' + message.content }}{% elif loop.last %}{{ 'A:' + message.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}",
)


@pytest.mark.parametrize("template", HISTORY)
@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
@pytest.mark.parametrize("unroll", ["auto", "last", "keep"])
def test_turns_that_say_the_same_by_chance_are_told_from_the_same_turn(chat_tokenizer, template, train_on, unroll):
    encoder = Encoder(chat_tokenizer("tiny", "chatml")[0], template)
    assert encoder.shapes.is_verbatim
    again = {"messages": [*ask("Hi", "Hello!")["messages"], *ask("Hi", "Hello!")["messages"]]}
    other = {"messages": [*ask("Hi", "Hello!")["messages"], *ask("Bye", "Bye!")["messages"]]}
    asked = {"messages": [*ask("Hi", "Hello!")["messages"], {"role": "user", "content": "Bye"}]}
    check_filling(encoder, [other, again, other, asked], train_on, unroll)


def test_the_second_conversation_of_a_shape_is_not_rendered(chat_tokenizer, monkeypatch):
    encoder = Encoder(*chat_tokenizer("tiny", "chatml")[:2])
    encoder.contexts(ask("Hi", "Hello!"))
    expected = encoder.render_contexts(ask(f"{MARK}1{MARK}", "Yes, %s."), "assistant", "auto")
    monkeypatch.setattr(encoder, "render", None)
    assert encoder.contexts(ask(f"{MARK}1{MARK}", "Yes, %s.")) == expected


@pytest.mark.parametrize("typed", ["<|im_end|>", "<think>\n\n</think>\n\nYes.", "Hm.</think>Yes.", "<think>", " Yes."])
def test_a_text_that_could_matter_to_others_is_rendered(chat_tokenizer, monkeypatch, typed):
    encoder = Encoder(*chat_tokenizer("tiny", "chatml")[:2])
    encoder.contexts(ask("Hi", "Hello!"))
    monkeypatch.setattr(encoder, "render", None)
    with pytest.raises(TypeError):
        encoder.contexts(ask("Hi", typed))


def test_a_text_between_the_halves_of_a_special_token_is_rendered(chat_tokenizer):
    tokenizer, marked, _ = chat_tokenizer("tiny", "chatml")
    halves = marked.replace(
        "+ message.role + '\\n' + message.content +", "+ message.role + '<|im_' + message.content + 'd|>' +"
    )
    assert halves != marked
    encoder = Encoder(tokenizer, halves)
    check_filling(encoder, [ask("Hi", "Hello!"), ask("en", "Hello!")], "assistant", "auto")
    assert set(encoder.shapes.moulds.values()) == {None}
