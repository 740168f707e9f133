"""Where a template shows history otherwise than new turns, each answer is trained in the context that serving shows."""

import pytest

from sft_recipes.encoding.encoder import IGNORE_INDEX, Encoder
from sft_recipes.errors import DataError
from support.base_tokenizers import encoder_with_template

# A thought is shown while its turn is the present one, as Qwen 3 does it
FORGETS = (
    "{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'assistant' and loop.last and m.reasoning_content %}"
    "{{ '<' + m.reasoning_content + '>' }}{% endif %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
ROW = {
    "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "think"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "reasoning_content": "hard"},
    ]
}
EOS = "<|endoftext|>"


@pytest.fixture(scope="module")
def forgets(chat_tokenizer, tmp_path_factory) -> Encoder:
    tokenizer, template, _ = chat_tokenizer("neox", "chatml")
    return encoder_with_template(
        Encoder(tokenizer, template), tmp_path_factory.mktemp("template") / "mine.jinja", FORGETS
    )


def shown(encoder: Encoder, row: dict, train_on: str = "assistant", unroll: str = "auto") -> list[str]:
    """Each row's text, with what carries loss in brackets."""
    rows = (encoder.tokenized([context.pieces]) for context in encoder.contexts(row, train_on, unroll))
    texts = []
    for each in rows:
        text, on = "", False
        for id, label in zip(each["input_ids"][0].tolist(), each["labels"][0].tolist(), strict=True):
            text += ("]" if on else "[") * ((label != IGNORE_INDEX) != on) + encoder.tokenizer.decode([id])
            on = label != IGNORE_INDEX
        texts.append(text + "]" * on)
    return texts


FIRST = f"user:a\nassistant:[<think>b{EOS}]\n"
SECOND = f"user:a\nassistant:b{EOS}\nuser:c\nassistant:[<hard>d{EOS}]\n"


def test_an_answer_that_history_shows_otherwise_gets_a_row_of_its_own(forgets):
    assert shown(forgets, ROW) == [FIRST, SECOND]
    first, last = forgets.contexts(ROW)
    assert (first.notes, last.notes) == ({"unrolled"}, frozenset())
    assert [len(context.conversation["messages"]) for context in (first, last)] == [2, 4]


def test_without_thoughts_one_row_trains_both(forgets):
    plain = {"messages": [{key: each[key] for key in ("role", "content")} for each in ROW["messages"]]}
    assert shown(forgets, plain) == [f"user:a\nassistant:[b{EOS}]\nuser:c\nassistant:[d{EOS}]\n"]


def test_last_trains_the_answer_that_the_whole_row_shows_as_it_is_served(forgets):
    assert shown(forgets, ROW, unroll="last") == shown(forgets, ROW, train_on="last") == [SECOND]


def test_keep_trains_the_answers_as_the_whole_row_shows_them_and_notes_it(forgets):
    assert shown(forgets, ROW, unroll="keep") == [f"user:a\nassistant:[b{EOS}]\nuser:c\nassistant:[<hard>d{EOS}]\n"]
    assert forgets.contexts(ROW, unroll="keep")[0].notes == {"history_differs"}


@pytest.mark.parametrize(("train_on", "unroll"), [("assistant", "last"), ("assistant", "keep"), ("last", "auto")])
def test_a_thought_that_only_history_drops_is_not_missed(forgets, train_on, unroll):
    (context,) = forgets.contexts(ROW, train_on, unroll)
    assert "<think>" in context.text and "<hard>" in context.text


def test_keep_reads_past_a_stop_token_that_an_answer_spells_out(forgets):
    first, answer, *rest = ROW["messages"]
    typed = {"messages": [first, answer | {"content": f"x{EOS}y"}, *rest]}
    assert shown(forgets, typed, unroll="keep") == [
        f"user:a\nassistant:[x{EOS}y{EOS}]\nuser:c\nassistant:[<hard>d{EOS}]\n"
    ]


def test_half_of_the_marks_around_a_typed_token_that_a_template_cuts_through_leaves_no_trace(forgets):
    cuts = Encoder(forgets.tokenizer, FORGETS.replace("{{ m.content }}", "{{ m.content.split(eos_token)[-1] }}"))
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"b{EOS}c"}]}
    assert shown(cuts, row) == [f"user:a\nassistant:[c{EOS}]\n"]


EARLY = FORGETS.replace("{{ m.role + ':' }}", "{% generation %}{{ m.role + ':' }}").replace(
    "{{ '\n' }}{% endfor %}", "{% endgeneration %}{{ '\n' }}{% endfor %}"
)


def test_markers_that_do_not_begin_where_serving_s_prompt_ends_are_named_and_not_followed(forgets, caplog):
    marked = Encoder(forgets.tokenizer, EARLY)
    assert shown(marked, ROW) == [FIRST, SECOND]
    assert "markers of model.chat_template do not begin where serving's prompt ends" in caplog.text


def test_an_answer_that_a_template_does_not_mark_is_context(forgets):
    marked = Encoder(
        forgets.tokenizer,
        "{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'assistant' and not m.copied %}{% generation %}"
        "{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
    )
    first, answer, *rest = ROW["messages"]
    row = {"messages": [first, answer | {"copied": True}, *rest]}
    assert shown(marked, row) == [f"user:a\nassistant:b\nuser:c\nassistant:[d{EOS}]\n"]


def test_a_stop_token_that_the_next_turn_writes_is_trained_with_markers_too(forgets):
    marked = Encoder(
        forgets.tokenizer,
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ eos_token + m.content + ':' }}{% endif %}{% endfor %}",
    )
    assert shown(marked, ROW) == [f"{EOS}a:[b{EOS}]c:[d{EOS}]"]


def test_an_untrained_answer_makes_no_row(forgets):
    first, answer, *rest = ROW["messages"]
    assert shown(forgets, {"messages": [first, answer | {"train": False}, *rest]}) == [SECOND]
    assert shown(forgets, ROW | {"train": False}) == [SECOND.replace("[", "").replace("]", "")]


def test_a_whole_row_that_trains_nothing_is_left_out(forgets):
    *first, question, answer = ROW["messages"]
    assert shown(forgets, {"messages": [*first, question, answer | {"train": False}]}) == [FIRST]


def test_every_token_is_trained_once_where_all_are(forgets):
    whole = SECOND.replace("[", "").replace("]", "")
    assert shown(forgets, ROW, train_on="all") == [f"[{whole}]"]
    first, answer, *rest = ROW["messages"]
    part = [{"begin_offset": 0, "end_offset": 0, "train": False}]
    for mark in ({"train": False}, {"train_detail": part}):
        with pytest.raises(DataError, match=r"shows messages\[1\] otherwise later, so it cannot be left out"):
            forgets.contexts({"messages": [first, answer | mark, *rest]}, "all")


def test_an_answer_that_does_not_follow_its_prompt_is_refused_in_one_line(forgets):
    loud = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    bad = encoder_with_prompt(forgets, "{% if messages|length > 2 %}bot:{% else %}assistant:{% endif %}")
    assert len(bad.contexts(loud)) == 1
    with pytest.raises(DataError, match=r"shows …'.*bot:' before messages\[3\] when it is served"):
        bad.contexts(ROW)


def encoder_with_prompt(encoder: Encoder, prompt: str) -> Encoder:
    """The same with another prompt of serving."""
    return Encoder(encoder.tokenizer, FORGETS.replace("assistant:{% endif %}", prompt + "{% endif %}"))
