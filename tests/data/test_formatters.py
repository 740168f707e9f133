import doctest
import json
import subprocess
import sys
from collections import UserDict

import pytest
from datasets import Dataset

from sft_recipes.data import detection, fields, formatters, messages
from sft_recipes.data.formatters import (
    FORMATTERS,
    alpaca,
    chatml,
    oasst,
    prompt_completion,
    sharegpt,
    text,
)
from sft_recipes.data.messages import drop_nulls
from sft_recipes.errors import DataError
from support.paths import ROOT
from support.rows import rows_of

HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
HELLO_SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]
KNOWN_ROLES = [
    *("system", "developer", "user", "human", "prompter", "assistant", "gpt", "chatgpt", "bing", "bard", "bot"),
    *("model", "tool", "observation", "function", "function_response", "ipython", "function_call", "tool_call"),
]
WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}


def fault(formatter, row, **columns):
    with pytest.raises(DataError) as caught:
        formatter(row, **columns)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# alpaca


def test_alpaca_with_input_joins_both_and_keeps_them_apart():
    assert alpaca({"instruction": "Add.", "input": "1 + 1", "output": "2"}) == {
        "messages": [
            {"role": "user", "content": "Add.\n\n1 + 1", "instruction": "Add.", "input": "1 + 1"},
            {"role": "assistant", "content": "2"},
        ]
    }


@pytest.mark.parametrize("row", [{}, {"input": None}, {"input": ""}, {"input": " \n"}])
def test_alpaca_without_input_is_the_bare_instruction(row):
    assert alpaca({"instruction": "Hi", "output": "Hello!", **row}) == {"messages": HELLO}


def test_alpaca_ignores_a_stray_text_column():
    assert alpaca({"instruction": "Hi", "output": "Hello!", "text": "### Instruction: Hi"}) == {"messages": HELLO}


def test_alpaca_puts_a_system_column_in_front():
    row = {"instruction": "Hi", "output": "Hello!", "system": "Be kind."}
    assert alpaca(row) == {"messages": [{"role": "system", "content": "Be kind."}, *HELLO]}


@pytest.mark.parametrize("system", [None, "", "  "])
def test_alpaca_takes_a_blank_system_column_as_none(system):
    assert alpaca({"instruction": "Hi", "output": "Hello!", "system": system}) == {"messages": HELLO}


def test_alpaca_reads_the_columns_it_is_given():
    row = {"question": "Who?", "context": "Ada wrote it.", "response": "Ada", "input": "not this", "rule": "Be brief."}
    assert alpaca(row, instruction="question", input="context", output="response", system="rule") == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Who?\n\nAda wrote it.", "instruction": "Who?", "input": "Ada wrote it."},
            {"role": "assistant", "content": "Ada"},
        ]
    }


def test_alpaca_refuses_a_mapped_column_that_is_not_there():
    row = {"instruction": "Who?", "context": "Ada wrote it.", "output": "Ada"}
    expected = "the formatter needs 'contxt', the row has instruction, context, output."
    assert fault(alpaca, row, input="contxt") == expected


def test_alpaca_keeps_every_byte():
    row = {"instruction": " a\r\n", "input": "\tb ", "output": "    return é\r\n\n"}
    assert alpaca(row) == {
        "messages": [
            {"role": "user", "content": " a\r\n\n\n\tb ", "instruction": " a\r\n", "input": "\tb "},
            {"role": "assistant", "content": "    return é\r\n\n"},
        ]
    }


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"output": ""}, "output is blank."),
        ({"output": " \n"}, "output is blank."),
        ({"output": None}, "output should be text, not None."),
        ({"output": 42}, "output should be text, not 42."),
        ({"instruction": None}, "instruction should be text, not None."),
        ({"instruction": ["Hi"]}, "instruction should be text, not ['Hi']."),
        ({"input": 7}, "input should be text, not 7."),
        ({"system": False}, "system should be text, not False."),
    ],
)
def test_alpaca_names_the_field_that_is_wrong(change, expected):
    assert fault(alpaca, {"instruction": "Hi", "output": "Hello!"} | change) == expected


# sharegpt


def test_sharegpt_maps_human_and_gpt():
    assert sharegpt({"conversations": HELLO_SHAREGPT}) == {"messages": HELLO}


def test_sharegpt_reads_roles_in_any_case():
    turns = [{"from": "Human", "value": "Hi"}, {"from": "GPT", "value": "Hello!"}]
    assert sharegpt({"conversations": turns}) == {"messages": HELLO}


def test_sharegpt_reads_role_and_content_too():
    assert sharegpt({"conversations": HELLO}) == {"messages": HELLO}


def test_sharegpt_alternates_bare_strings_as_in_lima():
    assert sharegpt({"conversations": ["Hi", "Hello!", "Bye", "See you."], "source": "stackexchange"}) == {
        "messages": [*HELLO, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you."}]
    }


def test_sharegpt_reads_the_column_it_is_given():
    assert sharegpt({"messages": HELLO_SHAREGPT}, conversations="messages") == {"messages": HELLO}


def test_sharegpt_puts_the_system_field_in_front():
    row = {"system": "Be kind.", "conversations": HELLO_SHAREGPT}
    assert sharegpt(row) == {"messages": [{"role": "system", "content": "Be kind."}, *HELLO]}


def test_sharegpt_keeps_a_system_turn_and_its_empty_text():
    turns = [{"from": "system", "value": ""}, *HELLO_SHAREGPT]
    assert sharegpt({"conversations": turns, "system": ""}) == {"messages": [{"role": "system", "content": ""}, *HELLO]}


def test_sharegpt_refuses_two_system_prompts():
    row = {"system": "Be kind.", "conversations": [{"from": "system", "value": "Be brief."}, *HELLO_SHAREGPT]}
    expected = "system and conversations[0] are both system prompts, and differ: one of them has to go."
    assert fault(sharegpt, row) == expected


CALLING = [
    {"from": "human", "value": "Weather?"},
    {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bonn"}}'},
    {"from": "observation", "value": '{"sky": "grey"}'},
    {"from": "gpt", "value": "Grey."},
]
CALLED = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [WEATHER]},
    {"role": "tool", "content": '{"sky": "grey"}'},
    {"role": "assistant", "content": "Grey."},
]


def test_sharegpt_turns_a_function_call_into_a_tool_call():
    assert sharegpt({"conversations": CALLING}) == {"messages": CALLED}


@pytest.mark.parametrize(
    "value",
    [
        '{"name": "weather", "arguments": "{\\"city\\": \\"Bonn\\"}"}',
        '[{"name": "weather", "arguments": {"city": "Bonn"}}]',
        '{"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}',
    ],
    ids=["arguments as JSON", "list of calls", "OpenAI's nesting"],
)
def test_sharegpt_reads_the_usual_ways_to_write_a_call(value):
    turns = [{"from": "human", "value": "Weather?"}, {"from": "function_call", "value": value}]
    assert sharegpt({"conversations": turns}) == {"messages": CALLED[:2]}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            "weather(Bonn)",
            "conversations[1].value is not JSON (Expecting value: line 1 column 1 (char 0)): 'weather(Bonn)'.",
        ),
        (
            '{"name": "weather"}',
            'conversations[1].value: a call is {"name": "…", "arguments": {…}}, not {\'name\': \'weather\'}.',
        ),
        ("[42]", 'conversations[1].value: a call is {"name": "…", "arguments": {…}}, not 42.'),
        ("[]", "conversations[1].value is blank."),
        ("", "conversations[1].value is blank."),
        (None, "conversations[1].value is blank."),
    ],
)
def test_sharegpt_refuses_a_call_it_cannot_read(value, expected):
    turns = [{"from": "human", "value": "Weather?"}, {"from": "function_call", "value": value}]
    assert fault(sharegpt, {"conversations": turns}) == expected


@pytest.mark.parametrize("tools", ['[{"name": "weather"}]', [{"name": "weather"}]])
def test_sharegpt_reads_tools_as_json_or_list(tools):
    row = {"conversations": HELLO_SHAREGPT, "tools": tools}
    assert sharegpt(row) == {"messages": HELLO, "tools": [{"name": "weather"}]}


@pytest.mark.parametrize("tools", ["", "[]", [], None])
def test_sharegpt_without_tools_overwrites_their_column_with_an_empty_list(tools):
    assert sharegpt({"conversations": HELLO_SHAREGPT, "tools": tools}) == {"messages": HELLO, "tools": []}


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        (
            "[{",
            "tools is not JSON (Expecting property name enclosed in double quotes: line 1 column 3 (char 2)): '[{'.",
        ),
        ('{"name": "weather"}', "tools should be a list of tools, not {'name': 'weather'}."),
        ('["weather"]', "tools should be a list of tools, not ['weather']."),
    ],
)
def test_sharegpt_refuses_tools_it_cannot_read(tools, expected):
    assert fault(sharegpt, {"conversations": HELLO_SHAREGPT, "tools": tools}) == expected


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([], "conversations should be a list of messages, not []."),
        (None, "conversations should be a list of messages, not None."),
        ([*HELLO_SHAREGPT, None], "conversations[2] should be a message, not None."),
        ([{"speaker": "gpt", "value": "Hi"}], "conversations[0] needs 'role' or 'from', it has speaker, value."),
        ([{}], "conversations[0] needs 'role' or 'from', it has nothing."),
        (
            [*HELLO_SHAREGPT, {"from": "narrator", "value": "Later."}],
            f"conversations[2].from: unknown role 'narrator', known are {', '.join(KNOWN_ROLES)}.",
        ),
        (
            [{"role": "assistant", "from": "human", "value": "Hi"}],
            "conversations[0] has role and from, which differ: one of them has to go.",
        ),
        ([{"from": "gpt", "value": None}], "conversations[0].value should be text, not None."),
        ([{"from": "human", "value": 42}], "conversations[0].value should be text, not 42."),
        ([{"from": "gpt", "value": " "}], "conversations[0].value is blank."),
        (["Hi", ""], "conversations[1].value is blank."),
        (["Hi", None], "conversations[1].value should be text, not None."),
        (["Hi"], "conversations: nothing to train on, no assistant turn."),
    ],
)
def test_sharegpt_names_the_field_that_is_wrong(turns, expected):
    assert fault(sharegpt, {"conversations": turns}) == expected


# chatml


def test_chatml_keeps_messages_as_they_are():
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": " \r\n"}, *HELLO]
    assert chatml({"messages": messages}) == {"messages": messages}


def test_chatml_leaves_the_row_alone():
    row = {"messages": [HELLO[0], {"role": "assistant", "content": "Hello!", "weight": 1, "name": None}]}
    before = json.dumps(row)
    chatml(row)
    assert json.dumps(row) == before


def test_chatml_joins_text_parts():
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": " you\n", "image_url": None}]
    assert chatml({"messages": [{"role": "user", "content": parts}, HELLO[1]]}) == {
        "messages": [{"role": "user", "content": "Hi you\n"}, HELLO[1]]
    }


def test_chatml_parses_the_arguments_of_a_call_and_keeps_its_id():
    sent = {
        "id": "c1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Bonn", "at": null}'},
    }
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [sent]},
        {"role": "tool", "content": "grey", "tool_call_id": "c1", "name": "weather"},
        {"role": "assistant", "content": "Grey.", "reasoning_content": "It says grey."},
    ]
    parsed = {
        "id": "c1",
        "type": "function",
        "function": {"name": "weather", "arguments": {"city": "Bonn", "at": None}},
    }
    assert chatml({"messages": messages}) == {
        "messages": [messages[0], {"role": "assistant", "content": "", "tool_calls": [parsed]}, *messages[2:]]
    }


def test_chatml_keeps_what_is_said_beside_a_call():
    messages = [{"role": "assistant", "content": "I look.", "tool_calls": [WEATHER]}]
    assert chatml({"messages": messages}) == {"messages": messages}


NULL_CALL = {
    "id": None,
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Bonn", "zip": None}},
}
NULLS = {"content": None, "tool_calls": None, "name": None, "tool_call_id": None, "train": None, "weight": None}
ROW_WITH_NULLS = {
    "messages": [NULLS | HELLO[0], NULLS | {"role": "assistant", "tool_calls": [NULL_CALL]}, NULLS | HELLO[1]],
    "tools": [{"name": "weather", "parameters": {"city": {"type": "string", "enum": None}, "query": None}}],
}


def test_chatml_keeps_the_nulls_that_the_author_of_a_row_wrote():
    call = WEATHER | {"function": {"name": "weather", "arguments": {"city": "Bonn", "zip": None}}}
    assert chatml(ROW_WITH_NULLS) == {
        "messages": [HELLO[0], {"role": "assistant", "content": "", "tool_calls": [call]}, HELLO[1]],
        "tools": ROW_WITH_NULLS["tools"],
    }


def test_chatml_removes_the_nulls_that_arrow_fills_in():
    # `Dataset.map` gives a formatter rows that are mappings, but no dicts
    assert (
        chatml(UserDict(ROW_WITH_NULLS))
        == chatml(drop_nulls(ROW_WITH_NULLS))
        == {
            "messages": [HELLO[0], {"role": "assistant", "content": "", "tool_calls": [WEATHER]}, HELLO[1]],
            "tools": [{"name": "weather", "parameters": {"city": {"type": "string"}}}],
        }
    )


def test_chatml_reads_back_what_it_wrote():
    once = chatml({"messages": CALLED, "tools": '[{"name": "weather"}]'})
    assert chatml(once) == once


def test_chatml_needs_its_column():
    expected = "chatml needs 'messages', the row has instruction, input, output."
    assert fault(chatml, {"instruction": "Hi", "input": "", "output": "Hello!"}) == expected


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "messages should be a list of messages, not []."),
        ("Hi", "messages is not JSON (Expecting value: line 1 column 1 (char 0)): 'Hi'."),
        (["Hi"], "messages[0] should be a message, not 'Hi'."),
        ([{"role": None, "content": "Hi"}], "messages[0] needs 'role' or 'from', it has content."),
        ([{"role": 1, "content": "Hi"}], f"messages[0].role: unknown role 1, known are {', '.join(KNOWN_ROLES)}."),
        ([*HELLO, {"role": "user", "content": None}], "messages[2].content should be text, not None."),
        ([*HELLO, {"role": "assistant", "content": None}], "messages[2].content should be text, not None."),
        (
            [*HELLO, {"role": "tool", "content": {"sky": "grey"}}],
            "messages[2].content should be text, not {'sky': 'grey'}.",
        ),
        ([{"role": "assistant", "content": ""}], "messages[0].content is blank."),
        ([{"role": "assistant", "content": []}], "messages[0].content is blank."),
        ([{"role": "assistant", "content": "\n", "tool_calls": []}], "messages[0].content is blank."),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}],
            "messages[0].content[0] should be a text part, not {'image_url': 'u', 'type': 'image_url'}.",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text should be text, not None."),
        ([HELLO[0]], "messages: nothing to train on, no assistant turn."),
        (
            [{"role": "user", "content": None, "tool_calls": [WEATHER]}],
            "messages[0].tool_calls: only the assistant calls tools, not user.",
        ),
        (
            [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
            'messages[0].tool_calls: a call is {"name": "…", "arguments": {…}}, '
            "not {'function': {'arguments': '[1]', 'name': 'f'}}.",
        ),
        (
            [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}],
            "messages[0].tool_calls: arguments is not JSON (Expecting value: line 1 column 1 (char 0)): 'x'.",
        ),
        ([HELLO[0] | {"name": 3}, HELLO[1]], "messages[0].name should be text, not 3."),
    ],
)
def test_chatml_names_the_field_that_is_wrong(messages, expected):
    assert fault(chatml, {"messages": messages}) == expected


# which messages are trained on

BAD = {"role": "assistant", "content": "Go away."}


@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}, {"weight": 0.0}, {"train": True, "weight": 0}])
def test_an_answer_marked_as_not_trained_keeps_its_mark(mark):
    expected = {"messages": [HELLO[0], BAD | {"train": False}, *HELLO]}
    assert chatml({"messages": [HELLO[0], BAD | mark, *HELLO]}) == expected
    bad = {"from": "gpt", "value": "Go away."} | mark
    assert sharegpt({"conversations": [HELLO_SHAREGPT[0], bad, *HELLO_SHAREGPT]}) == expected


@pytest.mark.parametrize("mark", [{"train": True}, {"weight": 1}, {"weight": 1.0}, {"train": None, "weight": None}])
def test_an_answer_marked_as_trained_needs_no_mark(mark):
    assert chatml({"messages": [HELLO[0], HELLO[1] | mark]}) == {"messages": HELLO}


MARKS = ("train", "trainable", "training", "loss", "loss_mask", "weight")


@pytest.mark.parametrize("name", MARKS)
@pytest.mark.parametrize("no", [False, 0, 0.0, "false", "0"])
def test_every_tools_word_for_untrained_is_obeyed(name, no):
    expected = {"messages": [HELLO[0], HELLO[1] | {"train": False}]}
    assert chatml({"messages": [HELLO[0], HELLO[1] | {name: no}]}) == expected
    assert sharegpt({"conversations": [HELLO_SHAREGPT[0], HELLO_SHAREGPT[1] | {name: no}]}) == expected


@pytest.mark.parametrize("name", MARKS)
@pytest.mark.parametrize("yes", [True, 1, 1.0, "true", "1", None])
def test_every_tools_word_for_trained_is_read(name, yes):
    assert chatml({"messages": [HELLO[0], HELLO[1] | {name: yes}]}) == {"messages": HELLO}


@pytest.mark.parametrize("value", [0.5, 2, -1, "no", [1, 0]])
def test_a_weight_in_between_is_refused(value):
    wrong = f"should be 0 or 1 (false or true), not {value!r}: a text is trained on or it is not. "
    wrong += "Another meaning needs another name."
    assert fault(chatml, {"messages": [HELLO[0], HELLO[1] | {"weight": value}]}) == f"messages[1].weight {wrong}"
    assert fault(alpaca, {"instruction": "Hi", "output": "Hello!", "weight": value}) == f"weight {wrong}"


@pytest.mark.parametrize("name", MARKS)
def test_a_row_marked_as_untrained_trains_none_of_its_answers(name):
    untrained = {"messages": [HELLO[0], HELLO[1] | {"train": False}], "train": False}
    assert alpaca({"instruction": "Hi", "output": "Hello!", name: 0}) == untrained
    assert chatml({"messages": HELLO, name: 0}) == untrained
    assert prompt_completion({"prompt": "Hi", "completion": "Hello!", name: 0}) == untrained
    assert text({"text": "Once", name: 0}) == {"text": "Once", "train": False}
    assert text({"text": "Once", name: 1}) == {"text": "Once"}


def test_a_part_marked_as_untrained_is_marked_by_its_characters():
    parts = [{"type": "text", "text": "Hm. ", "train": False}, {"type": "text", "text": "Yes.", "train": True}]
    spans = [
        {"begin_offset": 0, "end_offset": 3, "train": False},
        {"begin_offset": 4, "end_offset": 7, "train": True},
    ]
    assert chatml({"messages": [HELLO[0], {"role": "assistant", "content": parts}]})["messages"][1] == {
        "role": "assistant",
        "content": "Hm. Yes.",
        "train_detail": spans,
    }


def test_an_answer_whose_parts_are_all_untrained_is_untrained():
    parts = [{"type": "text", "text": "Hm.", "weight": 0}]
    untrained = {"role": "assistant", "content": "Hm.", "train": False}
    assert chatml({"messages": [HELLO[0], {"role": "assistant", "content": parts}]})["messages"][1] == untrained


def test_train_detail_trains_what_its_spans_hold():
    # Axolotl's offsets count characters, and the last one is in the span
    detail = [{"begin_offset": 1, "end_offset": 2, "train": True}, {"begin_offset": 3, "end_offset": 3, "train": False}]
    row = {"messages": [HELLO[0], {"role": "assistant", "content": "abcde", "train_detail": detail}]}
    assert chatml(row)["messages"][1]["train_detail"] == [
        {"begin_offset": 0, "end_offset": 0, "train": False},
        {"begin_offset": 1, "end_offset": 2, "train": True},
        {"begin_offset": 3, "end_offset": 4, "train": False},
    ]


def test_the_flag_of_a_part_holds_within_a_span_that_is_trained():
    parts = [{"type": "text", "text": "ab", "train": False}, {"type": "text", "text": "cd"}]
    detail = [{"begin_offset": 1, "end_offset": 2, "train": True}]
    row = {"messages": [HELLO[0], {"role": "assistant", "content": parts, "train_detail": detail}]}
    trained = [span for span in chatml(row)["messages"][1]["train_detail"] if span["train"]]
    assert trained == [{"begin_offset": 2, "end_offset": 2, "train": True}]


@pytest.mark.parametrize("span", [{}, {"begin_offset": 0, "end_offset": 6}, {"begin_offset": 3, "end_offset": 2}, None])
def test_a_span_beyond_the_answer_is_refused(span):
    row = {"messages": [HELLO[0], HELLO[1] | {"train_detail": [span]}]}
    assert fault(chatml, row).startswith("messages[1].train_detail: a span has begin_offset, end_offset (its last")


# what the other tools write


@pytest.mark.parametrize(("role", "same"), [("developer", "system"), ("ipython", "tool"), ("function", "tool")])
def test_roles_of_openai_and_llama_3_are_read(role, same):
    turns = [HELLO[0], {"role": role, "content": "so"}, HELLO[1]]
    assert chatml({"messages": turns})["messages"][1] == {"role": same, "content": "so"}


@pytest.mark.parametrize("name", ["gpt", "chatgpt", "bing", "bard", "bot", "model", "assistant"])
@pytest.mark.parametrize("asker", ["human", "user", "prompter"])
def test_roles_of_sharegpt_and_its_copies_are_read(name, asker):
    turns = [{"from": asker, "value": "Hi"}, {"from": name, "value": "Hello!"}]
    assert sharegpt({"conversations": turns}) == chatml({"messages": turns}) == {"messages": HELLO}


def test_history_is_earlier_turns():
    row = {"instruction": "Of Spain?", "output": "Madrid.", "history": [["Capital of France?", "Paris."]]}
    expected = [
        ("user", "Capital of France?"),
        ("assistant", "Paris."),
        ("user", "Of Spain?"),
        ("assistant", "Madrid."),
    ]
    assert [(turn["role"], turn["content"]) for turn in alpaca(row)["messages"]] == expected
    assert alpaca(row | {"history": json.dumps(row["history"])}) == alpaca(row)
    assert alpaca(row | {"history": []}) == alpaca(row | {"history": None})
    assert fault(alpaca, row | {"history": [["a"]]}) == "history[0] should be a question and its answer, not ['a']."
    assert fault(alpaca, row | {"history": [["a", " "]]}) == "history[0][1] is blank."


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_prompt_beside_the_turns_comes_first(name):
    expected = {"messages": [{"role": "system", "content": "Be kind."}, *HELLO]}
    assert chatml({"messages": HELLO, name: "Be kind."}) == expected
    assert sharegpt({"conversations": HELLO_SHAREGPT, name: "Be kind."}) == expected
    assert prompt_completion({"prompt": "Hi", "completion": "Hello!", name: "Be kind."}) == expected
    assert alpaca({"instruction": "Hi", "output": "Hello!", name: "Be kind."}) == expected
    assert chatml(expected | {name: "Be kind."}) == expected


def test_two_system_prompts_that_differ_are_refused():
    row = {"messages": HELLO, "system": "Be kind.", "system_prompt": "Be brief."}
    assert fault(chatml, row) == "system and system_prompt are both system prompts, and differ: one of them has to go."


@pytest.mark.parametrize("key", ["function_call", "function_calls", "tool_calls"])
def test_older_names_of_calls_and_tools_are_read(key):
    turns = [
        HELLO[0],
        {"role": "assistant", "content": "I look.", key: {"name": "weather", "arguments": '{"city": "Bonn"}'}},
        {"role": "function", "name": "weather", "content": "grey"},
    ]
    assert chatml({"messages": turns, "functions": [{"name": "weather"}]}) == {
        "messages": [
            HELLO[0],
            {"role": "assistant", "content": "I look.", "tool_calls": [WEATHER]},
            {"role": "tool", "content": "grey", "name": "weather"},
        ],
        "tools": [{"type": "function", "function": {"name": "weather"}}],
    }


@pytest.mark.parametrize("arguments", [{"arguments": ""}, {"arguments": None}, {"arguments": {}}, {"parameters": {}}])
def test_a_call_without_arguments_is_read(arguments):
    call = {"type": "function", "function": {"name": "now"} | arguments}
    found = chatml({"messages": [HELLO[0], {"role": "assistant", "content": "", "tool_calls": [call]}]})
    expected = {"type": "function", "function": {"name": "now", "arguments": {}}}
    assert found["messages"][1]["tool_calls"] == [expected]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_are_read(key):
    thought = {"role": "assistant", "content": "4", "reasoning_content": "two and two"}
    turns = [HELLO[0], {"role": "assistant", "content": "4", key: "two and two"}]
    assert chatml({"messages": turns}) == {"messages": [HELLO[0], thought]}


def test_two_thoughts_that_differ_are_refused():
    row = {"messages": [HELLO[0], HELLO[1] | {"reasoning": "a", "thinking": "b"}]}
    expected = "messages[1] has thinking and reasoning, which differ: one of them has to go."
    assert fault(chatml, row) == expected


def test_messages_may_be_the_json_text_of_a_list():
    assert chatml({"messages": json.dumps(HELLO)}) == {"messages": HELLO}
    assert sharegpt({"conversations": json.dumps(HELLO_SHAREGPT)}) == {"messages": HELLO}


def test_variables_of_the_template_stay_with_the_row():
    row = {"messages": HELLO, "chat_template_kwargs": {"enable_thinking": False}}
    assert chatml(row) == row
    refused = "chat_template_kwargs should name variables of the chat template, not {'tools': []}."
    assert fault(chatml, row | {"chat_template_kwargs": {"tools": []}}) == refused


@pytest.mark.parametrize("key", ["image", "images", "audio", "audios", "video", "videos"])
def test_what_is_seen_or_heard_is_refused(key):
    refused = f"{key}: ['cat.png'] cannot be read, only text is trained on."
    assert fault(chatml, {"messages": HELLO, key: ["cat.png"]}) == refused
    assert fault(alpaca, {"instruction": "Hi", "output": "Hello!", key: ["cat.png"]}) == refused
    assert fault(text, {"text": "Once", key: ["cat.png"]}) == refused
    assert fault(chatml, {"messages": [HELLO[0] | {key: ["cat.png"]}, HELLO[1]]}) == f"messages[0].{refused}"
    assert chatml({"messages": HELLO, key: []}) == {"messages": HELLO}


# oasst

TREE = {
    "role": "prompter",
    "text": "Hi",
    "replies": [
        {"role": "assistant", "text": "unranked", "rank": None, "replies": []},
        {"role": "assistant", "text": "second", "rank": 1, "replies": []},
        {"role": "assistant", "text": "gone", "rank": 0, "deleted": True, "replies": []},
        {
            "role": "assistant",
            "text": "Hello!",
            "rank": 0,
            "replies": [{"role": "prompter", "text": "and then?", "rank": None, "replies": []}],
        },
    ],
}


def test_oasst_takes_the_best_ranked_reply_and_ends_with_an_answer():
    assert oasst({"message_tree_id": "1", "prompt": TREE}) == {"messages": HELLO}


def test_oasst_refuses_a_question_without_a_reply():
    assert fault(oasst, {"prompt": TREE | {"replies": []}}) == "prompt: nothing to train on, no assistant turn."
    wrong = "prompt should be a tree of messages with role, text and replies, not 'Hi'."
    assert fault(oasst, {"prompt": "Hi"}) == wrong


# prompt_completion and text


def test_prompt_completion_of_two_texts_is_one_turn():
    assert prompt_completion({"prompt": "Hi", "completion": "Hello!"}) == {"messages": HELLO}


def test_prompt_completion_of_messages_trains_the_completion_only():
    row = {
        "prompt": [*HELLO, {"role": "user", "content": "Bye"}],
        "completion": [{"role": "assistant", "content": "See you."}],
    }
    assert prompt_completion(row) == {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello!", "train": False},
            {"role": "user", "content": "Bye"},
            {"role": "assistant", "content": "See you."},
        ]
    }


def test_prompt_completion_mixes_messages_and_text():
    assert prompt_completion({"prompt": [HELLO[0]], "completion": "Hello!"}) == {"messages": HELLO}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Hi"}, "prompt_completion needs 'completion', the row has prompt."),
        ({"prompt": None, "completion": "Hello!"}, "prompt should be text, not None."),
        ({"prompt": "Hi", "completion": " "}, "completion is blank."),
        ({"prompt": "Hi", "completion": 42}, "completion should be text, not 42."),
        ({"prompt": [], "completion": "Hello!"}, "prompt should be a list of messages, not []."),
        ({"prompt": HELLO, "completion": [HELLO[0]]}, "completion: nothing to train on, no assistant turn."),
    ],
)
def test_prompt_completion_names_the_field_that_is_wrong(row, expected):
    assert fault(prompt_completion, row) == expected


def test_text_stays_as_it_is():
    assert text({"text": "  Once upon a time\r\n"}) == {"text": "  Once upon a time\r\n"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": ""}, "text is blank."),
        ({"text": "\n"}, "text is blank."),
        ({"text": None}, "text should be text, not None."),
        ({"body": "Once"}, "text needs 'text', the row has body."),
    ],
)
def test_text_names_the_field_that_is_wrong(row, expected):
    assert fault(text, row) == expected


# by name


def test_formatters_are_found_by_name():
    assert list(FORMATTERS.items()) == [
        ("alpaca", alpaca),
        ("sharegpt", sharegpt),
        ("chatml", chatml),
        ("prompt_completion", prompt_completion),
        ("oasst", oasst),
        ("text", text),
    ]


# in a notebook

ROWS = {
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello!", "text": "### Instruction: Hi"},
    "sharegpt": {"conversations": HELLO_SHAREGPT},
    "chatml": {"messages": HELLO},
    "prompt_completion": {"prompt": "Hi", "completion": "Hello!"},
    "oasst": {"prompt": {"role": "prompter", "text": "Hi", "replies": [{"role": "assistant", "text": "Hello!"}]}},
    "text": {"text": "Once upon a time"},
}


@pytest.mark.parametrize("name", FORMATTERS)
def test_dataset_map_takes_every_formatter(name):
    dataset = Dataset.from_list([ROWS[name]] * 2).map(FORMATTERS[name])
    row = {"text": "Once upon a time"} if name == "text" else {"messages": HELLO}
    assert dataset.to_list() == [ROWS[name] | row] * 2


def test_dataset_map_keeps_rows_with_and_without_input_apart():
    rows = [{"instruction": "Hi", "input": None, "output": "Hello!"}, {"instruction": "a", "input": "b", "output": "c"}]
    assert Dataset.from_list(rows).map(alpaca)["messages"][:] == [
        HELLO,
        [
            {"role": "user", "content": "a\n\nb", "instruction": "a", "input": "b"},
            {"role": "assistant", "content": "c"},
        ],
    ]


def test_dataset_map_needs_a_large_writer_batch_where_an_input_comes_late():
    rows = [{"instruction": "Hi", "input": "", "output": "Hello!"}] * 1000
    dataset = Dataset.from_list([*rows, {"instruction": "a", "input": "b", "output": "c"}])
    assert dataset.map(alpaca, writer_batch_size=len(dataset))["messages"][:] == [
        *[HELLO] * 1000,
        [
            {"role": "user", "content": "a\n\nb", "instruction": "a", "input": "b"},
            {"role": "assistant", "content": "c"},
        ],
    ]


def test_dataset_map_overwrites_messages_of_another_type():
    parts = [[{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in HELLO]]
    assert Dataset.from_dict({"messages": parts}).map(chatml).to_list() == [{"messages": HELLO}]


def test_dataset_map_mixes_rows_with_and_without_tools():
    rows = [
        {"conversations": HELLO_SHAREGPT, "tools": "[]"},
        {"conversations": CALLING, "tools": '[{"name": "weather"}]'},
    ]
    dataset = Dataset.from_list(rows).map(sharegpt, remove_columns=["conversations"])
    assert dataset.to_list() == [
        {"messages": HELLO, "tools": []},
        {"messages": CALLED, "tools": [{"name": "weather"}]},
    ]


# whole files


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("alpaca.jsonl", 3),
        ("CodeAlpaca-20k.jsonl", 3),
        ("alpaca_en_demo.json", 999),
        ("gpteacher_roleplay.json", 3146),
        ("gsm8k_train.json", 7473),
    ],
)
def test_alpaca_rows_come_through_whole(name, count):
    rows = rows_of(name)
    assert len(rows) == count
    for row in rows:
        # these files have no row whose input is blank but not empty
        question = row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
        said = [(turn["role"], turn["content"]) for turn in alpaca(row)["messages"]]
        assert said == [("user", question), ("assistant", row["output"])]


TOOL_CALLS = [("tool_calls.jsonl", 3), ("glaive_toolcall_en_demo.json", 300)]


@pytest.mark.parametrize(("name", "count"), TOOL_CALLS)
def test_tool_calling_rows_come_through_whole(name, count):
    rows = rows_of(name)
    roles = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
    assert len(rows) == count
    for row in rows:
        expected = []
        for turn in row["conversations"]:
            message = {"role": roles[turn["from"]], "content": turn["value"]}
            if turn["from"] == "function_call":
                call = {"type": "function", "function": json.loads(turn["value"])}
                message |= {"content": "", "tool_calls": [call]}
            expected.append(message)
        assert sharegpt(row) == {"messages": expected, "tools": json.loads(row["tools"])}


@pytest.mark.parametrize(("name", "count"), TOOL_CALLS)
def test_tool_calling_rows_survive_a_dataset(name, count):
    rows = rows_of(name)
    mapped = Dataset.from_list(rows).map(sharegpt, remove_columns=["conversations"])
    # Arrow gives every tool the parameters of all tools, null
    assert [chatml(drop_nulls(row)) for row in mapped] == [drop_nulls(sharegpt(row)) for row in rows]


# the module


def test_the_examples_in_the_docstrings_hold():
    assert [doctest.testmod(module).failed for module in (formatters, messages, fields, detection)] == [0] * 4


def test_importing_the_formatters_loads_no_heavy_library():
    code = "import sys, sft_recipes.data.formatters; print({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"
