"""What becomes of whole rows as people have them: trained, context, counted by name, or refused."""

import re
import sys
from functools import partial

import numpy as np
import pytest

from sft_recipes.data.fields import RowFields
from sft_recipes.data.formatters import FORMATTERS
from sft_recipes.data.prepare import TrainingData, load_data
from sft_recipes.encoding.encoder import IGNORE_INDEX, Encoder
from sft_recipes.errors import DataError
from support.base_tokenizers import encoder_with_template
from support.configs import data_config
from support.rows import write_jsonl


@pytest.fixture(scope="module")
def encoder(chat_tokenizer):
    tokenizer, template, _ = chat_tokenizer("tiny", "chatml")
    return Encoder(tokenizer, template)


def ask(question: str, answer: str, **flags) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **flags}]


def share(question: str, answer: str, **flags) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer, **flags}]


def read_rows(encoder: Encoder, tmp_path, *rows: dict, **source) -> TrainingData:
    """What a run with these rows trains on."""
    file = {"data_files": write_jsonl(tmp_path / "rows.jsonl", rows)} | source
    return load_data(data_config(file=file, held_out=0), encoder, 512)


def trained_texts(encoder: Encoder, data: TrainingData) -> dict[int, list[str]]:
    """By row: the texts with loss, without their stop tokens."""
    found = {}
    for row in data.train:
        ids, carries = np.array(row["input_ids"]), np.array(row["labels"]) != IGNORE_INDEX
        cuts = np.flatnonzero(np.diff(carries.astype(int))) + 1
        parts = [encoder.tokenizer.decode(part) for part in np.split(ids, cuts)[not carries[0] :: 2]]
        found[row["row"]] = [part.removesuffix(encoder.stop) for part in parts]
    return found


def rendered_texts(encoder: Encoder, data: TrainingData) -> list[str]:
    return [encoder.tokenizer.decode(row["input_ids"]) for row in sorted(data.train, key=lambda row: row["row"])]


TREE = {"role": "prompter", "text": "Hi", "replies": [{"role": "assistant", "text": "Yo", "rank": 0, "replies": []}]}
ROWS = {  # rows, and by row the texts that are trained on
    "loss: false": ([{"conversations": share("Go", "BAD", loss=False) + share("On", "GOOD", loss=True)}], [["GOOD"]]),
    "training": ([{"messages": ask("Go", "BAD", training=False) + ask("On", "GOOD", training=True)}], [["GOOD"]]),
    "part": (
        [{"messages": ask("Go", [{"type": "text", "text": "Hm. ", "train": False}, {"type": "text", "text": "Yes."}])}],
        [["Yes."]],
    ),
    "history": (
        [{"instruction": "And of Spain?", "output": "Madrid.", "history": [["Of France?", "Paris."]]}],
        [["Paris.", "Madrid."]],
    ),
    "system beside messages": ([{"messages": ask("Hi", "Yo"), "system": "You are a pirate."}], [["Yo"]]),
    "chatgpt": ([{"conversations": [{"from": "user", "value": "Hi"}, {"from": "chatgpt", "value": "Yo"}]}], [["Yo"]]),
    "developer": ([{"messages": [{"role": "developer", "content": "Brief."}, *ask("Hi", "Yo")]}], [["Yo"]]),
    "instruction, response": ([{"instruction": "Hi", "response": "Yo"}], [["Yo"]]),
    "question, answer": ([{"question": "Hi", "answer": "Yo"}], [["Yo"]]),
    "inputs, targets": ([{"inputs": "Hi", "targets": "Yo"}], [["Yo"]]),
    "system, user, assistant": ([{"system": "Brief.", "user": "Hi", "assistant": "Yo"}], [["Yo"]]),
    "Dolly's": (
        [{"instruction": "Sum up.", "context": "A text.", "response": "Short.", "category": "x"}],
        [["Short."]],
    ),
    "JSON text": (
        [{"messages": '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]'}],
        [["Yo"]],
    ),
    "tree": ([{"message_tree_id": "1", "tree_state": "ready", "prompt": TREE}], [["Yo"]]),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_of_other_tools_are_trained_as_they_say(encoder, tmp_path, case):
    rows, expected = ROWS[case]
    data = read_rows(encoder, tmp_path, *rows)
    assert trained_texts(encoder, data) == dict(enumerate(expected))
    assert data.audit["file"]["problems"] == {}


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("loss: false", "user\nGo<|im_end|>\n<|im_start|>assistant\nBAD<|im_end|>"),
        ("part", "assistant\nHm. Yes.<|im_end|>"),
        (
            "history",
            "user\nOf France?<|im_end|>\n<|im_start|>assistant\nParis.<|im_end|>\n<|im_start|>user\nAnd of Spain?",
        ),
        ("system beside messages", "<|im_start|>system\nYou are a pirate.<|im_end|>\n<|im_start|>user\nHi"),
        ("developer", "<|im_start|>system\nBrief.<|im_end|>\n<|im_start|>user\nHi"),
        ("system, user, assistant", "<|im_start|>system\nBrief.<|im_end|>\n<|im_start|>user\nHi"),
        ("Dolly's", "user\nSum up.\n\nA text.<|im_end|>"),
    ],
)
def test_what_is_not_trained_stands_in_the_context(encoder, tmp_path, case, expected):
    (text,) = rendered_texts(encoder, read_rows(encoder, tmp_path, *ROWS[case][0]))
    assert expected in text


def test_of_a_history_the_last_answer_alone_is_trained_with_train_on_last(encoder, tmp_path):
    data = read_rows(encoder, tmp_path, *ROWS["history"][0], train_on="last")
    assert trained_texts(encoder, data) == {0: ["Madrid."]}


@pytest.mark.parametrize("flag", ["weight", "train", "loss"])
def test_rows_that_say_so_are_not_trained_on_and_counted(encoder, tmp_path, flag):
    rows = ({"instruction": "Go", "output": word, flag: value} for word, value in (("BAD", 0), ("GOOD", 1)))
    data = read_rows(encoder, tmp_path, *rows)
    assert trained_texts(encoder, data) == {1: ["GOOD"]}
    assert data.audit["file"]["problems"] == {"marked_untrained": {"rows": 1, "policy": "drop", "first": [0]}}


CALLING = {
    "messages": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "I look.", "function_call": {"name": "sky", "arguments": '{"city": "Bonn"}'}},
        {"role": "function", "name": "sky", "content": "sunny"},
        {"role": "assistant", "content": "Sunny."},
    ],
    "functions": [{"name": "sky", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}],
}


def test_legacy_calls_are_trained_and_their_functions_shown(encoder, tmp_path):
    data = read_rows(encoder, tmp_path, CALLING)
    call = '<tool_call>\n{"name": "sky", "arguments": {"city": "Bonn"}}\n</tool_call>'
    assert [text.replace("I look.\n", "I look.") for text in trained_texts(encoder, data)[0]] == [
        f"I look.{call}",
        "Sunny.",
    ]
    assert '"name": "sky", "parameters"' in rendered_texts(encoder, data)[0]
    assert data.audit["file"]["problems"] == {}


def test_a_call_without_arguments_is_trained(encoder, tmp_path):
    call = {"type": "function", "function": {"name": "now", "arguments": ""}}
    data = read_rows(encoder, tmp_path, {"messages": ask("Time?", "", tool_calls=[call])})
    assert '{"name": "now", "arguments": {}}' in trained_texts(encoder, data)[0][0]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": ask("Hi", "Yo", weight=0.5)}, r"weight should be 0 or 1 .*not 0\.5"),
        ({"messages": ask("Hi", "Yo"), "images": ["cat.png"]}, r"images: \['cat.png'\] cannot be read"),
        ({"text": "Yo", "role": "assistant", "parent_id": "1"}, "formatter=oasst reads"),
        ({"text": "Yo", "label": "glad"}, "texts with a label"),
        ({"query": "Hi", "reply": "Yo"}, re.escape("formatter='{name: alpaca, instruction: query, output: reply}'")),
    ],
)
def test_what_cannot_be_trained_as_it_says_is_refused(encoder, tmp_path, row, expected):
    with pytest.raises(DataError, match=expected):
        read_rows(encoder, tmp_path, row)


@pytest.mark.parametrize("key", ["thinking", "reasoning", "reasoning_content"])
def test_thoughts_are_trained_or_the_template_that_has_no_place_for_them_is_refused(
    encoder, tmp_path, chat_tokenizer, key
):
    row = {"messages": ask("2+2?", "4", **{key: "two and two"})}
    thought = "<think>\ntwo and two\n</think>\n\n4"
    assert trained_texts(encoder, read_rows(encoder, tmp_path, row)) == {0: [thought]}
    tokenizer, template, _ = chat_tokenizer("llama3", "llama3")
    line = f"data.file: 1 of 1 row has content_missing {key} (row 0…): the chat template leaves out something"
    with pytest.raises(DataError, match=re.escape(line)):
        read_rows(Encoder(tokenizer, template), tmp_path, row)


@pytest.mark.parametrize("key", ["thinking", "reasoning", "reasoning_content"])
@pytest.mark.parametrize("columns", [("instruction", "output"), ("prompt", "completion"), ("question", "answer")])
def test_thoughts_beside_an_answer_are_its_thoughts(encoder, tmp_path, columns, key):
    row = dict(zip(columns, ("2+2?", "4"), strict=True)) | {key: "two and two"}
    data = read_rows(encoder, tmp_path, row)
    assert trained_texts(encoder, data) == {0: ["<think>\ntwo and two\n</think>\n\n4"]}
    assert "unread_field" not in data.audit["file"]["problems"]


@pytest.mark.parametrize("value", ["on", "Off", True, 3, {"effort": "low"}])
def test_a_switch_named_as_thoughts_are_is_counted_and_not_trained(encoder, tmp_path, value):
    data = read_rows(encoder, tmp_path, {"instruction": "2+2?", "output": "4", "reasoning": value})
    assert trained_texts(encoder, data) == {0: ["4"]}
    assert data.audit["file"]["problems"]["unread_field"]["fields"] == {"reasoning": 1}


def test_thoughts_that_stand_in_the_answer_already_are_trained_once(encoder, tmp_path):
    thought = "<think>\ntwo and two\n</think>\n\n4"
    data = read_rows(encoder, tmp_path, {"instruction": "2+2?", "output": thought, "thinking": "two and two"})
    assert trained_texts(encoder, data) == {0: [thought]}
    assert "unread_field" not in data.audit["file"]["problems"]


def test_thoughts_beside_a_completion_of_one_message_are_its_thoughts(encoder, tmp_path):
    row = {"prompt": "2+2?", "completion": [{"role": "assistant", "content": "4"}], "thinking": "two and two"}
    data = read_rows(encoder, tmp_path, row)
    assert trained_texts(encoder, data) == {0: ["<think>\ntwo and two\n</think>\n\n4"]}


@pytest.mark.parametrize("prompt", ["And you?", [{"role": "user", "content": "And you?"}]])
def test_earlier_turns_beside_a_prompt_are_its_context(encoder, tmp_path, prompt):
    row = {"prompt": prompt, "response": "Fine.", "history": [["Hi", "Hello"]]}
    data = read_rows(encoder, tmp_path, row)
    assert trained_texts(encoder, data) == {0: ["Fine."]}
    text = encoder.tokenizer.decode(data.train[0]["input_ids"])
    assert text.index("Hi") < text.index("Hello") < text.index("And you?") < text.index("Fine.")


def test_earlier_turns_stand_behind_the_system_message_of_a_prompt(encoder, tmp_path):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "And you?"}]
    data = read_rows(encoder, tmp_path, {"prompt": prompt, "response": "Fine.", "history": [["Hi", "Hello"]]})
    text = encoder.tokenizer.decode(data.train[0]["input_ids"])
    assert text.index("Be brief.") < text.index("Hi") < text.index("Hello") < text.index("And you?")


def test_an_empty_cell_under_a_flag_of_a_csv_says_nothing(encoder, tmp_path):
    (tmp_path / "rows.csv").write_text("instruction,output,weight\nHi,Yo,\nHi,BAD,0\nHo,Ho,1\n")
    file = {"data_files": str(tmp_path / "rows.csv")}
    data = load_data(data_config(file=file, held_out=0), encoder, 512)
    assert trained_texts(encoder, data) == {0: ["Yo"], 2: ["Ho"]}


# unread fields


OWN = {  # what a formatter of one's own does with the row, and which of its keys are then left over
    "row['q'], row.get('a')": ["hint", "weight"],
    "row['q'], row['a'] + str('hint' in row)": ["hint", "weight"],
    "row['q'], row.pop('a')": ["hint", "weight"],
    "(lambda q, a, **rest: (q, a))(**row)": [],
    "dict(row)['q'], row['a']": [],
    "row['q'], [value for key, value in row.items() if key == 'a'][0]": [],
    "[*row.values()][:2]": [],
    "row['q'], row['a'] if row.keys() & {'a'} else ''": ["hint", "weight"],
}


@pytest.mark.parametrize("code", OWN)
def test_what_a_formatter_of_ones_own_does_not_read_is_counted(encoder, tmp_path, monkeypatch, code):
    (tmp_path / "own_rows.py").write_text(
        f"def talk(row):\n    q, a = {code}\n"
        "    return {'messages': [{'role': 'user', 'content': q}, {'role': 'assistant', 'content': a}]}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_rows", raising=False)
    rows = [{"q": "Hi", "a": "Yo", "source": "forum", "hint": "wave", "weight": 1}, {"q": "So", "a": "No"}]
    data = read_rows(encoder, tmp_path, *rows, formatter="own_rows.talk")
    counted = data.audit["file"]["problems"].get("unread_field", {"fields": {}})["fields"]
    assert list(counted) == OWN[code] and len(data.train) == 2


TURNS = {
    "mine": [{"who": "user", "said": "Hi", "mood": "glad", "id": 3}],
    "theirs": [{"role": "user", "content": [{"type": "text", "text": "Hi", "style": "loud"}], "mood": "glad"}],
}


@pytest.mark.parametrize(
    ("talk", "unread"),
    [
        (lambda row: [{"role": turn["who"], "content": turn["said"]} for turn in row["mine"]], ["mood", "theirs"]),
        (lambda row: [turn for turn in row["theirs"] if turn["role"] == "user"], ["mine", "style", "mood"]),
        (lambda row: [turn | {"name": "Ann"} for turn in row["theirs"]], ["mine", "style", "mood"]),
        (lambda row: [dict(turn) for turn in row["mine"]] and row["theirs"], ["style", "mood"]),
    ],
)
def test_what_a_formatter_of_ones_own_leaves_of_a_turn_or_a_part_is_named(talk, unread):
    formatter = partial(FORMATTERS["chatml"])
    formatter.own = lambda row: {"messages": talk(row)}
    assert RowFields(formatter).unread(TURNS) == unread


def test_what_goes_wrong_in_a_formatter_is_a_fault_of_its_row(encoder, tmp_path, monkeypatch):
    (tmp_path / "own_rows.py").write_text("def talk(row):\n    return {'text': row['a'] + 'b'}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_rows", raising=False)
    line = r"row 1 \(.*rows.jsonl, line 2\): own_rows.talk cannot read it: TypeError: .* \(own_rows.py, line 2\)"
    with pytest.raises(DataError, match=line):
        read_rows(encoder, tmp_path, {"a": "Hi"}, {"a": 1}, formatter="own_rows.talk")
    assert (
        len(read_rows(encoder, tmp_path, {"a": "Hi"}, {"a": 1}, formatter="own_rows.talk", on_error="drop").train) == 1
    )


DEEP = "[" * 5000 + "]" * 5000


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": DEEP}, "messages is not JSON .maximum recursion depth"),
        ({"messages": ask("Hi", "Yo"), "tools": [{"function": "f"}]}, "tools should be a list of tools, not"),
        (
            {"messages": ask("Hi", "", tool_calls=[{"name": "f", "arguments": '{"a": 1, "a": 2}'}])},
            "key 'a' stands twice",
        ),
        ({"messages": ask("Hi", "", tool_calls=[{"name": "f", "arguments": '{"a": 1e999}'}])}, "1e999 is too large"),
        ({"instruction": "Hi", "output": "Yo", "history": 5}, "should be a question and its answer, not 5"),
        ({"prompt": TREE | {"replies": ["Yo"]}, "message_tree_id": "1"}, "oasst cannot read it: AttributeError"),
    ],
)
def test_a_row_of_a_shape_that_no_formatter_knows_is_one_line(encoder, tmp_path, row, expected):
    with pytest.raises(DataError, match=f"data.file row 0 .*{expected}"):
        read_rows(encoder, tmp_path, row)


def unread_of(name: str, row: dict) -> list[str]:
    fields = RowFields(FORMATTERS[name])
    return fields.unread(fields.parse(row))


def test_unread_fields_are_counted_by_name_and_kept(encoder, tmp_path, caplog):
    rows = [{"messages": ask("Hi", word, rewritten_content="Hello"), "source": "forum", "note": note}
            for word, note in (("Yo", None), ("Hey", "why"), ("Ho", ""))]  # fmt: skip
    data = read_rows(encoder, tmp_path, *rows)
    assert len(data.train) == 3
    assert data.audit["file"]["problems"] == {
        "unread_field": {
            "rows": 3, "policy": "keep", "first": [0, 1, 2], "fields": {"rewritten_content": 3, "note": 1}
        }
    }  # fmt: skip
    assert caplog.messages[-1] == (
        "data.file: fields that are neither read nor known to be metadata: rewritten_content in 3 rows, note in 1 row."
    )


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("alpaca", {"instruction": "Hi", "output": "Yo", "id": 1, "source": "x", "score": 0.5, "weight": 1}, []),
        ("alpaca", {"instruction": "Hi", "output": "Yo", "hint": "", "notes": None, "marks": [], "more": {}}, []),
        ("alpaca", {"instruction": "Hi", "output": "Yo", "hint": "wave"}, ["hint"]),
        ("alpaca", {"instruction": "Hi", "output": "Yo", "text": "### Hi ### Yo"}, []),
        ("alpaca", {"instruction": "Hi", "output": "Yo", "text": "### Hi ###"}, ["text"]),
        ("alpaca", {"instruction": "Hi", "output": "Yo", "rejected": "Yo"}, []),
        ("alpaca", {"instruction": "Hi", "output": "Yo", "flag": False, "number": 0}, ["flag", "number"]),
        ("chatml", {"messages": ask("Hi", "Yo"), "prompt": "Hi", "prompt_id": "1"}, []),
        ("chatml", {"messages": ask("Hi", "Yo"), "prompt": "Other"}, ["prompt"]),
        ("chatml", {"messages": ask("Hi", "Yo", audio_note="x", id="m1")}, ["audio_note"]),
        ("chatml", {"messages": ask("Hi", [{"type": "text", "text": "Yo", "style": "loud"}])}, ["style"]),
        ("chatml", {"messages": ask("Hi", "Yo", tool_calls=[{"id": "c", "name": "f", "arguments": {"x": 1}}])}, []),
        ("chatml", {"messages": ask("Hi", "Yo", tool_calls=[{"name": "f", "arguments": {}, "why": "x"}])}, ["why"]),
        (
            "chatml",
            {"messages": ask("Hi", "", tool_calls=[{"function": {"name": "f", "arguments": {}, "strict": True}}])},
            ["strict"],
        ),
        ("sharegpt", {"conversations": share("Hi", "Yo", markdown="*Yo*")}, ["markdown"]),
        ("oasst", {"prompt": TREE | {"lang": "en", "labels": {"spam": 0}}, "message_tree_id": "1"}, []),
        ("oasst", {"prompt": TREE | {"replies": [TREE["replies"][0] | {"thought": "Hm."}]}}, ["thought"]),
        ("text", {"text": "Once", "url": "u", "title": "Tale"}, ["title"]),
        ("oasst", {"message_tree_id": "1", "prompt": TREE, "note": "x"}, ["note"]),
    ],
)
def test_a_key_with_a_value_is_read_metadata_or_named(name, row, expected):
    assert unread_of(name, row) == expected


def test_a_column_that_the_user_named_is_read():
    fields = RowFields(partial(FORMATTERS["alpaca"], instruction="task", system="rule"))
    assert fields.unread({"task": "Hi", "output": "Yo", "rule": "Brief.", "instruction": "not this"}) == ["instruction"]


# what is counted


TRIMS = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content | trim + eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content | trim }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_trimmed_space_is_counted_by_field_and_no_lost_sentence(encoder, tmp_path):
    rows = [{"messages": ask("\tHi", "Yo")}, {"messages": ask("Go", "On\n\n")}, {"messages": ask("A", "B")}]
    problems = read_rows(encoder_with_template(encoder, tmp_path / "trims.jinja", TRIMS), tmp_path, *rows).audit[
        "file"
    ]["problems"]
    assert problems == {
        "whitespace_trimmed": {
            "rows": 2, "policy": "keep", "first": [0, 1], "fields": {"user content": 1, "assistant content": 1}
        }
    }  # fmt: skip


def test_a_sentence_that_the_template_loses_is_named(encoder, tmp_path):
    loses = TRIMS.replace("in messages", "in messages if m.role != 'system'")
    row = {"messages": ask(" Hi", "Yo"), "system": "Be kind."}
    with pytest.raises(DataError, match="1 of 1 row has content_missing system "):
        read_rows(encoder_with_template(encoder, tmp_path / "loses.jinja", loses), tmp_path, row)


def test_what_json_writes_otherwise_is_not_missing(encoder, tmp_path):
    call = {"type": "function", "function": {"name": "say", "arguments": {"text": 'a "b"\n', "ä": 1.5}}}
    writes = TRIMS.replace("{{ m.content | trim }}", "{{ m.content | tojson }}").replace(
        "{{ m.content", "{{ m.tool_calls | tojson if m.tool_calls else '' }}{{ m.content"
    )
    row = {"messages": [*ask("Hi", "", tool_calls=[call]), {"role": "tool", "content": '{"x": "ü"}'}, *ask("Go", "Yo")]}
    problems = read_rows(encoder_with_template(encoder, tmp_path / "writes.jinja", writes), tmp_path, row).audit[
        "file"
    ]["problems"]
    assert set(problems) <= {"roles_out_of_order"}


def test_a_blank_question_is_counted_and_kept(encoder, tmp_path):
    data = read_rows(encoder, tmp_path, {"instruction": "", "input": "", "output": "Once upon a time."})
    assert trained_texts(encoder, data) == {0: ["Once upon a time."]}
    assert data.audit["file"]["problems"] == {"blank_question": {"rows": 1, "policy": "keep", "first": [0]}}


# questions


def test_an_untrained_answer_is_never_asked_for(encoder, tmp_path):
    from sft_recipes.evaluation.generation import is_answerable, split_last_answer

    rows = [
        {"messages": ask("Hi", "BAD", train=False), "train": True},
        {"messages": [*ask("Hi", "GOOD", train=True), *ask("Go", "BAD", train=False)], "train": True},
        {"messages": ask("Hi", "GOOD", train=True), "train": False},
        {"messages": ask("Train", "on", train=True), "train": True},
    ]
    files = {"train": write_jsonl(tmp_path / "a.jsonl", rows[3:]), "test": write_jsonl(tmp_path / "b.jsonl", rows[:3])}
    data = load_data(data_config(file={"data_files": files, "held_out_split": "test"}), encoder, 512)
    asked = [question["messages"] for question in data.questions if is_answerable(question["messages"])]
    assert [split_last_answer(messages)[1] for messages in asked] == ["GOOD"]
