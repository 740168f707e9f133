import doctest
import json
import subprocess
import sys

import pytest
from datasets import Dataset

from sft_recipes.data import formatters
from sft_recipes.data.formatters import (
    FORMATTERS,
    alpaca,
    chatml,
    detect_formatter,
    drop_nulls,
    prompt_completion,
    sharegpt,
    text,
)
from sft_recipes.errors import DataError
from support.paths import ROOT
from support.rows import rows_of

HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
HELLO_SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]
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
    expected = "alpaca needs 'contxt', the row has instruction, context, output."
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
    expected = "system is set and conversations[0] is a system turn as well, one of them has to go."
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
        ([{"speaker": "gpt", "value": "Hi"}], "conversations[0] needs 'from', it has speaker, value."),
        ([{}], "conversations[0] needs 'from', it has nothing."),
        (
            [*HELLO_SHAREGPT, {"from": "narrator", "value": "Later."}],
            "conversations[2].from: unknown role 'narrator', "
            "known are system, user, assistant, tool, human, gpt, function_call, observation.",
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


def test_chatml_removes_the_nulls_that_arrow_fills_in():
    call = {"id": None, "type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn", "zip": None}}}
    filled = {"content": None, "tool_calls": None, "name": None, "tool_call_id": None, "train": None, "weight": None}
    row = {
        "messages": [filled | HELLO[0], filled | {"role": "assistant", "tool_calls": [call]}, filled | HELLO[1]],
        "tools": [{"name": "weather", "parameters": {"city": {"type": "string", "enum": None}, "query": None}}],
    }
    assert chatml(row) == {
        "messages": [HELLO[0], {"role": "assistant", "content": "", "tool_calls": [WEATHER]}, HELLO[1]],
        "tools": [{"name": "weather", "parameters": {"city": {"type": "string"}}}],
    }


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
        ("Hi", "messages should be a list of messages, not 'Hi'."),
        (["Hi"], "messages[0] should be a message, not 'Hi'."),
        (HELLO_SHAREGPT, "messages[0] needs 'role', it has from, value."),
        ([{"role": None, "content": "Hi"}], "messages[0] needs 'role', it has content."),
        (
            [{"role": "human", "content": "Hi"}],
            "messages[0].role: unknown role 'human', known are system, user, assistant, tool.",
        ),
        (
            [{"role": 1, "content": "Hi"}],
            "messages[0].role: unknown role 1, known are system, user, assistant, tool.",
        ),
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


@pytest.mark.parametrize(
    ("mark", "expected"),
    [
        ({"weight": 0.5}, "messages[1].weight should be 0 or 1, not 0.5."),
        ({"weight": "0"}, "messages[1].weight should be 0 or 1, not '0'."),
        ({"train": "no"}, "messages[1].train should be true or false, not 'no'."),
        ({"train": 0}, "messages[1].train should be true or false, not 0."),
        ({"train": False}, "messages: nothing to train on, every assistant turn has train: false or weight: 0."),
    ],
)
def test_a_mark_that_cannot_be_followed_is_refused(mark, expected):
    assert fault(chatml, {"messages": [HELLO[0], HELLO[1] | mark]}) == expected


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


# choosing a formatter


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (["messages"], "chatml"),
        (["prompt", "prompt_id", "messages"], "chatml"),
        (["conversations", "source"], "sharegpt"),
        (["instruction", "input", "output", "text"], "alpaca"),
        (["prompt", "completion"], "prompt_completion"),
        (["text", "url"], "text"),
    ],
)
def test_auto_names_the_formatter_whose_columns_are_there(columns, name):
    assert detect_formatter(columns) == name


def test_auto_lists_the_columns_that_no_formatter_reads():
    assert fault(detect_formatter, iter(["question", "answer"])) == (
        "no formatter reads the columns question, answer. "
        "Name one with its own, such as {name: alpaca, instruction: question, output: answer}."
    )


def test_formatters_are_found_by_name():
    assert list(FORMATTERS.items()) == [
        ("alpaca", alpaca),
        ("sharegpt", sharegpt),
        ("chatml", chatml),
        ("prompt_completion", prompt_completion),
        ("text", text),
    ]


# in a notebook

ROWS = {
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello!", "text": "### Instruction: Hi"},
    "sharegpt": {"conversations": HELLO_SHAREGPT},
    "chatml": {"messages": HELLO},
    "prompt_completion": {"prompt": "Hi", "completion": "Hello!"},
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
    # Arrow gives every tool the parameters of all tools, null; reading the rows again removes them
    assert [chatml(row) for row in mapped] == [drop_nulls(sharegpt(row)) for row in rows]


# the module


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(formatters).failed == 0


def test_importing_the_formatters_loads_no_heavy_library():
    code = "import sys, sft_recipes.data.formatters; print({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"
