"""The loss mask, against a slow reference that renders turn by turn with the saved tokenizer."""

import json
from collections.abc import Callable

import numpy as np
import pytest

from sft_recipes.data.formatters import alpaca, sharegpt
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.errors import ConfigError, DataError
from support.base_tokenizers import KINDS, REAL_KINDS
from support.paths import TEMPLATES, TINY_MODEL
from support.rows import rows_of

ANSWERS = {
    "plain": "Paris.",
    "leading space": " Paris.",
    "trailing spaces": "Paris.  ",
    "leading newlines": "\n\nParis.",
    "trailing newline": "Paris.\n",
    "indented code": "    def f():\n        return 1\n",
    "punctuation first": "(a) [b]: c",
    "crlf": "one\r\ntwo\r\n",
    "unicode": "日本語 naïve 🙂🏽 Ünïcödé",
    "tabs": "\t\tx\t",
    "template words": "### Response: USER: [INST] <|user|>",
}


def ask(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def runs(labels: np.ndarray) -> list[tuple[int, int]]:
    """Where the supervised stretches begin and end."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], labels != -100, [False]]).astype(int)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def text_of(tokenizer, ids, start: int, end: int) -> str:
    """The text that these tokens add to what stands before them."""
    before, after = tokenizer.decode(ids[:start]), tokenizer.decode(ids[:end])
    assert after.startswith(before)
    return after[len(before) :]


def served(tokenizer, history: list[dict]) -> list[int]:
    return tokenizer.apply_chat_template(history, add_generation_prompt=True, return_dict=False)


# What the published templates make of an answer: most cut the whitespace around it, Mistral's writes a space before it
SAYS = dict.fromkeys(("llama2", "llama3", "gemma"), str.strip) | {"mistral": " {}".format}
# All but Qwen 3's, whose answers begin with a thought: test_trl_templates.py has it
PLAIN = [name for name in TEMPLATES if name != "qwen3"]


def check_one_answer(tokenizer, encoder: Encoder, answer: str, says: Callable = str) -> None:
    """The loss is on the answer and one stop token, behind the prompt that serving shows."""
    messages = ask("Which city?", answer)
    row = encoder.encode([{"messages": messages}])
    ids, labels = row["input_ids"][0], row["labels"][0]
    ((start, end),) = runs(labels)
    assert text_of(tokenizer, ids, start, end) == says(answer) + encoder.stop
    assert ids[start:end].tolist() == labels[start:end].tolist()
    assert ids[end - 1] == tokenizer.convert_tokens_to_ids(encoder.stop)
    assert ids[:start].tolist() == served(tokenizer, messages[:1])


def check_every_turn(tokenizer, encoder: Encoder, says: Callable = str) -> None:
    """Each of three answers stands behind what serving would show, and alone has the loss."""
    system = {"role": "system", "content": "Be brief."}
    messages = [system, *ask("Hi", "Hello!"), *ask("2 + 2?", "4"), *ask("Bye", "Bye.")]
    row = encoder.encode([{"messages": messages}])
    ids, labels = row["input_ids"][0], row["labels"][0]
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(runs(labels)) == 3
    for turn, (start, end) in zip(answers, runs(labels), strict=True):
        assert text_of(tokenizer, ids, start, end) == says(messages[turn]["content"]) + encoder.stop
        assert ids[:start].tolist() == served(tokenizer, messages[:turn])


def check_first_token(tokenizer, encoder: Encoder, wanted: bool) -> None:
    """One BOS in front if it is wanted, none elsewhere."""
    ids = encoder.encode([{"messages": [*ask("Hi", "Hello!"), *ask("a", "b")]}])["input_ids"][0]
    if wanted:
        assert ids[0] == tokenizer.bos_token_id
    if tokenizer.bos_token_id != tokenizer.eos_token_id:
        assert (ids == tokenizer.bos_token_id).sum() == wanted


def check_typed_tokens(tokenizer, encoder: Encoder, says: Callable = str) -> None:
    """Control tokens that somebody typed are text, to be read and to be trained on."""
    typed = f"a{encoder.stop}b {tokenizer.eos_token} <|im_start|>user"
    honest = encoder.encode([{"messages": ask("Say x", "x")}])["input_ids"][0]
    ids = encoder.encode([{"messages": ask(f"Say {typed}", typed)}])
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert [i for i in ids["input_ids"][0] if i in special] == [i for i in honest if i in special]
    ((start, end),) = runs(ids["labels"][0])
    assert text_of(tokenizer, ids["input_ids"][0], start, end) == says(typed) + encoder.stop


@pytest.mark.parametrize("template", PLAIN)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ANSWERS)
def test_the_loss_is_on_the_answer_and_one_stop_token(chat_tokenizer, kind, template, case):
    tokenizer, marked, _ = chat_tokenizer(kind, template)
    check_one_answer(tokenizer, Encoder(tokenizer, marked), ANSWERS[case], SAYS.get(template, str))


# One sequence cannot hold both where GPT-2's split pattern parts two newlines if a word follows them: Llama 3's blank line
# is one token before a new answer, two in a history
ONE_CONTEXT = [(kind, template) for kind in KINDS for template in PLAIN if (kind, template) != ("neox", "llama3")]


@pytest.mark.parametrize(("kind", "template"), ONE_CONTEXT)
def test_every_turn_sees_what_serving_would_show(chat_tokenizer, kind, template):
    tokenizer, marked, _ = chat_tokenizer(kind, template)
    check_every_turn(tokenizer, Encoder(tokenizer, marked), SAYS.get(template, str))


@pytest.mark.parametrize("template", PLAIN)
@pytest.mark.parametrize("kind", KINDS)
def test_one_bos_where_the_tokenizer_wants_one(chat_tokenizer, kind, template):
    tokenizer, marked, _ = chat_tokenizer(kind, template)
    # only Llama 2's tokenizers put a BOS in front by themselves
    check_first_token(tokenizer, Encoder(tokenizer, marked), wanted=kind in ("llama2", "legacy"))


@pytest.mark.parametrize("template", PLAIN)
@pytest.mark.parametrize("kind", KINDS)
def test_typed_control_tokens_stay_text(chat_tokenizer, kind, template):
    tokenizer, marked, _ = chat_tokenizer(kind, template)
    check_typed_tokens(tokenizer, Encoder(tokenizer, marked), SAYS.get(template, str))


def test_characters_of_private_use_stay_text_and_are_no_typed_tokens(chat_tokenizer):
    """Icon fonts have U+F0000 and U+F0001, which transformers puts around a typed control token."""
    tokenizer, marked, _ = chat_tokenizer("tiny", "chatml")
    encoder, answer = Encoder(tokenizer, marked), "an \U000f0001 icon, \U000f0000two\U000f0001"
    check_one_answer(tokenizer, encoder, answer)
    assert encoder.encode([{"messages": ask("Say x", answer)}])["typed"] == [False]


@pytest.mark.parametrize("template", PLAIN)
@pytest.mark.parametrize("kind", REAL_KINDS)
def test_all_of_this_holds_with_a_real_vocabulary(chat_tokenizer, kind, template):
    tokenizer, marked, _ = chat_tokenizer(kind, template)
    encoder, says = Encoder(tokenizer, marked), SAYS.get(template, str)
    for answer in ANSWERS.values():
        check_one_answer(tokenizer, encoder, answer, says)
    if (kind, template) != ("real neox", "llama3"):
        check_every_turn(tokenizer, encoder, says)
    check_first_token(tokenizer, encoder, wanted=kind != "real neox")
    check_typed_tokens(tokenizer, encoder, says)


def test_supervise_last_trains_the_final_turn_alone_and_its_context_is_what_serving_shows(chat_tokenizer):
    tokenizer, marked, _ = chat_tokenizer("tiny", "chatml")
    messages = [*ask("Hi", "\n Hello!"), *ask("Bye", "Bye.")]
    row = Encoder(tokenizer, marked).encode([{"messages": messages}], train_on="last")
    ((start, end),) = runs(row["labels"][0])
    assert tokenizer.decode(row["input_ids"][0][start:end]) == "Bye.<|im_end|>"
    assert row["input_ids"][0][:start].tolist() == served(tokenizer, messages[:3])


def test_supervise_all_trains_every_token(chat_tokenizer):
    tokenizer, marked, _ = chat_tokenizer("tiny", "chatml")
    row = Encoder(tokenizer, marked).encode([{"messages": ask("Hi", "Hello!")}], train_on="all")
    assert row["labels"][0].tolist() == row["input_ids"][0].tolist()


def test_a_message_with_train_false_is_context(chat_tokenizer):
    tokenizer, marked, _ = chat_tokenizer("tiny", "chatml")
    messages = [*ask("Hi", "Hello!"), *ask("Bye", "Bye.")]
    messages[1]["train"] = False
    row = Encoder(tokenizer, marked).encode([{"messages": messages}])
    ((start, end),) = runs(row["labels"][0])
    assert tokenizer.decode(row["input_ids"][0][start:end]) == "Bye.<|im_end|>"


def detail(*parts: tuple[str, bool]) -> dict:
    """An answer in parts, each trained or not, as the formatters give it."""
    spans, begin = [], 0
    for text, train in parts:
        spans.append({"begin_offset": begin, "end_offset": begin + len(text) - 1, "train": train})
        begin += len(text)
    return {"role": "assistant", "content": "".join(text for text, _ in parts), "train_detail": spans}


@pytest.mark.parametrize("kind", ["tiny", "llama3"])
@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([("Hm. ", False), ("Yes.", True)], ["Yes.<|im_end|>"]),
        ([("Yes", True), (" or no", False), (".", True)], ["Yes", ".<|im_end|>"]),
        ([("Yes.", True), (" Or no.", False)], ["Yes.", "<|im_end|>"]),
    ],
)
def test_parts_of_an_answer_that_are_not_trained_are_context(chat_tokenizer, kind, parts, expected):
    tokenizer, marked, _ = chat_tokenizer(kind, "chatml")
    messages = [{"role": "user", "content": "Yes?"}, detail(*parts)]
    row = Encoder(tokenizer, marked).encode([{"messages": messages}])
    ids, labels = row["input_ids"][0], row["labels"][0]
    assert [text_of(tokenizer, ids, start, end) for start, end in runs(labels)] == expected
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_parts_are_told_apart_where_the_template_trims_the_answer(chat_tokenizer):
    tokenizer, marked, _ = chat_tokenizer("llama3", "llama3")
    messages = [{"role": "user", "content": "Yes?"}, detail(("  Hm. ", False), ("Yes. \n", True))]
    row = Encoder(tokenizer, marked).encode([{"messages": messages}])
    ((start, end),) = runs(row["labels"][0])
    assert text_of(tokenizer, row["input_ids"][0], start, end) in ("Yes.<|eot_id|>", "Yes. \n<|eot_id|>")


def test_an_untrained_part_leaves_other_answers_and_other_policies_as_they_are(chat_tokenizer):
    tokenizer, marked, _ = chat_tokenizer("tiny", "chatml")
    first, last = {"role": "user", "content": "Yes?"}, {"role": "assistant", "content": "Bye."}
    row = {"messages": [first, detail(("Hm. ", False), ("Yes.", True)), first, last]}

    def trained(train_on: str) -> list[str]:
        found = Encoder(tokenizer, marked).encode([row], train_on)
        return [text_of(tokenizer, found["input_ids"][0], *span) for span in runs(found["labels"][0])]

    assert trained("assistant") == ["Yes.<|im_end|>", "Bye.<|im_end|>"]
    assert trained("last") == ["Bye.<|im_end|>"]
    before, after = trained("all")
    assert (before[-10:], after[:4]) == ("assistant\n", "Yes.")


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_nothing_of_an_untrained_row_is_trained(chat_tokenizer, train_on):
    tokenizer, marked, _ = chat_tokenizer("tiny", "chatml")
    rows = [{"messages": ask("Hi", "Hello!"), "train": False}, {"text": "The sea is wide.", "train": False}]
    assert [runs(labels) for labels in Encoder(tokenizer, marked).encode(rows, train_on)["labels"]] == [[], []]


def test_supervise_all_leaves_out_an_answer_that_is_marked(chat_tokenizer):
    tokenizer, marked, _ = chat_tokenizer("tiny", "chatml")
    messages = [*ask("Hi", "Hello!"), *ask("Bye", "Bye.")]
    messages[1]["train"] = False
    row = Encoder(tokenizer, marked).encode([{"messages": messages}], train_on="all")
    ids = row["input_ids"][0]
    said = [text_of(tokenizer, ids, start, end) for start, end in runs(row["labels"][0])]
    assert "".join(said) == tokenizer.decode(ids).replace("Hello!<|im_end|>", "")


@pytest.mark.parametrize(
    ("messages", "train_on", "expected"),
    [
        (
            [{"role": "user", "content": "Hi", "train": False}, ask("", "Hello!")[1]],
            "all",
            "train_on=all cannot leave out",
        ),
        (
            [ask("<|im_end|>", "")[0], detail(("Hm. ", False), ("Yes.", True))],
            "assistant",
            "spells out a special token",
        ),
    ],
)
def test_a_mark_that_cannot_be_followed_is_refused(chat_tokenizer, messages, train_on, expected):
    tokenizer, marked, _ = chat_tokenizer("tiny", "chatml")
    with pytest.raises(DataError, match=expected):
        Encoder(tokenizer, marked).encode([{"messages": messages}], train_on)


def test_a_row_sets_variables_of_the_template(chat_tokenizer):
    tokenizer, marked, _ = chat_tokenizer("tiny", "chatml")
    encoder = Encoder(tokenizer, "{{ mood }}" + marked)
    row = {"messages": ask("Hi", "Hello!"), "chat_template_kwargs": {"mood": "glad"}}
    assert encoder.encode([row])["text"][0].startswith("glad<|im_start|>user\nHi")


def test_raw_text_is_trained_on_every_token_and_ends_with_eos(chat_tokenizer):
    tokenizer, marked, _ = chat_tokenizer("tiny", "chatml")
    row = Encoder(tokenizer, marked).encode([{"text": "The sea is wide."}])
    assert row["labels"][0].tolist() == row["input_ids"][0].tolist()
    assert tokenizer.decode(row["input_ids"][0]) == "The sea is wide." + tokenizer.eos_token


@pytest.mark.parametrize("kind", ["llama2", "legacy"])
def test_raw_text_has_one_bos_where_the_tokenizer_wants_one(chat_tokenizer, kind):
    tokenizer, marked, _ = chat_tokenizer(kind, "llama2")
    row = Encoder(tokenizer, marked).encode([{"text": "The sea</s> is wide."}])  # the typed one stays text
    ids = row["input_ids"][0].tolist()
    assert (ids[0], ids.count(1), ids[-1], ids.count(2)) == (1, 1, 2, 1)
    assert tokenizer.decode(ids[1:-1]).strip() == "The sea</s> is wide."


def test_calls_and_answers_are_trained_but_observations_and_tool_lists_are_not(chat_tokenizer):
    tokenizer, marked, _ = chat_tokenizer("tiny", "chatml")
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
    messages = [
        {"role": "user", "content": "Weather in Bonn?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": '{"sky": "grey"}'},
        {"role": "assistant", "content": "Grey."},
    ]
    row = Encoder(tokenizer, marked).encode([{"messages": messages, "tools": tools}])
    said = [tokenizer.decode(row["input_ids"][0][start:end]) for start, end in runs(row["labels"][0])]
    assert said == [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call><|im_end|>',
        "Grey.<|im_end|>",
    ]


def test_rows_do_not_touch_each_other(chat_tokenizer):
    tokenizer, marked, _ = chat_tokenizer("tiny", "chatml")
    encoder = Encoder(tokenizer, marked)
    conversations = [{"messages": ask(f"Question {n}", f"Answer {n}")} for n in range(5)] + [{"text": "prose"}]
    together = encoder.encode(conversations)["input_ids"]
    apart = [encoder.encode([conversation])["input_ids"][0] for conversation in conversations]
    assert [row.tolist() for row in together] == [row.tolist() for row in apart]


@pytest.mark.parametrize("template", [name for name in PLAIN if name != "chatml"])
def test_a_template_without_tools_refuses_them_rather_than_dropping_them(chat_tokenizer, template):
    tokenizer, marked, _ = chat_tokenizer("tiny", template)
    messages = [*ask("Hi", "Hello!"), {"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]
    with pytest.raises(DataError, match="no place for"):
        Encoder(tokenizer, marked).encode([{"messages": ask("a", "b")}, {"messages": messages}])


def test_an_unknown_supervise_is_refused(chat_tokenizer):
    tokenizer, marked, _ = chat_tokenizer("tiny", "chatml")
    with pytest.raises(ConfigError, match="train_on should be assistant, last, all"):
        Encoder(tokenizer, marked).encode([{"messages": ask("a", "b")}], train_on="first")


def check_whole_answers(tokenizer, encoder: Encoder, conversations: list[dict], says: Callable = str) -> None:
    """Each row has its answer, as the tokenizer's normalizer leaves it, and its stop token in the loss, and nothing else."""
    encoded = encoder.encode(conversations)
    normal = tokenizer.backend_tokenizer.normalizer
    for conversation, ids, labels in zip(conversations, encoded["input_ids"], encoded["labels"], strict=True):
        ((start, end),) = runs(labels)
        answer = says(conversation["messages"][-1]["content"])
        answer = normal.normalize_str(answer) if normal else answer
        assert text_of(tokenizer, ids, start, end) == answer + encoder.stop
        assert ids[:start].tolist() == served(tokenizer, conversation["messages"][:-1])


@pytest.mark.parametrize("template", ["chatml", "alpaca", "llama2", "vicuna"])
@pytest.mark.parametrize("kind", ["neox", "llama2", "llama3"])
def test_rows_of_the_tiny_world_keep_their_answers(chat_tokenizer, kind, template):
    tokenizer, marked, _ = chat_tokenizer(kind, template)
    lines = (TINY_MODEL.parent / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()[::9]
    rows = [json.loads(line) for line in lines]
    check_whole_answers(tokenizer, Encoder(tokenizer, marked), [alpaca(row) for row in rows], SAYS.get(template, str))


@pytest.mark.parametrize("template", ["chatml", "alpaca", "llama2", "vicuna"])
@pytest.mark.parametrize("kind", ["real neox", "real llama2", "llama3"])
def test_real_rows_keep_their_answers(chat_tokenizer, kind, template):
    tokenizer, marked, _ = chat_tokenizer(kind, template)
    rows = [*rows_of("alpaca_en_demo.json")[::7], *rows_of("gpteacher_roleplay.json")[::23]]
    rows += rows_of("gsm8k_train.json")[::53]
    check_whole_answers(tokenizer, Encoder(tokenizer, marked), [alpaca(row) for row in rows], SAYS.get(template, str))


@pytest.mark.parametrize(
    ("kind", "name"), [("neox", "tool_calls.jsonl"), ("real neox", "glaive_toolcall_en_demo.json")]
)
def test_tool_rows_keep_every_turn(chat_tokenizer, kind, name):
    tokenizer, marked, _ = chat_tokenizer(kind, "chatml")
    encoder = Encoder(tokenizer, marked)
    for row in rows_of(name)[:60]:
        conversation = sharegpt(row)
        encoded = encoder.encode([conversation])
        answers = [message for message in conversation["messages"] if message["role"] == "assistant"]
        spans = runs(encoded["labels"][0])
        assert len(spans) == len(answers)
        for answer, (start, end) in zip(answers, spans, strict=True):
            said = text_of(tokenizer, encoded["input_ids"][0], start, end)
            assert said.endswith("<|im_end|>") and answer["content"] in said
            for call in answer.get("tool_calls", []):
                assert call["function"]["name"] in said
