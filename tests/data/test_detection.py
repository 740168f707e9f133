"""What `formatter=auto` takes, and the line that it proposes where it takes nothing."""

import re

import pytest

from sft_recipes.data.detection import detect_formatter
from sft_recipes.data.sources import find_formatter
from sft_recipes.errors import DataError
from support.configs import data_config

ALPACA, PAIRS = {"name": "alpaca"}, {"name": "prompt_completion"}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["messages"], {"name": "chatml"}),
        (["prompt", "prompt_id", "messages"], {"name": "chatml"}),
        (["conversations", "source"], {"name": "sharegpt"}),
        (["id", "items"], {"name": "sharegpt", "conversations": "items"}),
        (["instruction", "input", "output", "text"], ALPACA),
        (["instruction", "response"], ALPACA | {"output": "response"}),
        (["instruction", "context", "response"], ALPACA | {"output": "response", "input": "context"}),
        (["question", "answer"], ALPACA | {"instruction": "question", "output": "answer"}),
        (["prompt", "completion"], PAIRS),
        (["prompt", "response"], PAIRS | {"completion": "response"}),
        (["inputs", "targets"], PAIRS | {"prompt": "inputs", "completion": "targets"}),
        (["system", "user", "assistant"], PAIRS | {"prompt": "user", "completion": "assistant"}),
        (["message_tree_id", "tree_state", "prompt"], {"name": "oasst"}),
        (["text", "url"], {"name": "text"}),
    ],
)
def test_auto_takes_the_formatter_whose_columns_are_there(columns, expected):
    assert detect_formatter(iter(columns)) == expected


@pytest.mark.parametrize(
    ("columns", "proposed"),
    [
        (["query", "reply"], "formatter='{name: alpaca, instruction: query, output: reply}'"),
        (["Problem", "Solution", "level"], "formatter='{name: alpaca, instruction: Problem, output: Solution}'"),
        (["input", "output"], "formatter='{name: alpaca, instruction: input, output: output}'"),
        (["id", "dialog"], "formatter='{name: sharegpt, conversations: dialog}'"),
        (["a", "b"], "formatter='{name: alpaca, instruction: question, output: answer}'"),
    ],
)
def test_auto_proposes_a_line_for_columns_that_it_does_not_take(columns, proposed):
    with pytest.raises(DataError) as caught:
        detect_formatter(columns)
    listed = f"the columns {', '.join(columns)}"
    assert str(caught.value) == f"no formatter reads {listed}. Name one with its own, such as {proposed}."


@pytest.mark.parametrize("columns", [["text", "role"], ["message_id", "parent_id", "text", "role", "rank"]])
def test_auto_never_takes_a_message_of_a_tree_for_raw_text(columns):
    with pytest.raises(DataError, match="one message a row.*formatter=oasst reads OpenAssistant's trees"):
        detect_formatter(columns)


@pytest.mark.parametrize("label", ["label", "labels", "label_text", "class", "target"])
def test_auto_never_takes_a_labelled_text_for_raw_text(label):
    line = f"formatter='{{name: prompt_completion, prompt: text, completion: {label}}}' to train the label, or formatter=text"
    with pytest.raises(DataError) as caught:
        detect_formatter(["text", label])
    assert line in str(caught.value)


@pytest.mark.parametrize(
    ("column", "way"),
    [
        ("frage;antwort", """write "data.NAME.sep=';'\""""),  # in both quotes: a shell and Hydra each take some off
        ("a|b", """write "data.NAME.sep='|'\""""),
        ("data", "are read by data.NAME.field=data"),
    ],
)
def test_one_column_alone_is_another_separator_or_the_key_above_the_rows(column, way):
    with pytest.raises(DataError, match=re.escape(way)):
        detect_formatter([column])


def test_a_file_of_raw_text_alone_is_not_read_as_conversations():
    config = data_config("chatml", file={"data_files": "rows.jsonl"})
    with pytest.raises(DataError, match="^data.file: formatter chatml needs 'messages', the rows have text."):
        find_formatter("file", config.sources["file"], config.formatter, ["text"])
    beside = find_formatter("file", config.sources["file"], config.formatter, ["text", "messages"])
    assert beside({"text": "Once."}) == {"text": "Once."}
