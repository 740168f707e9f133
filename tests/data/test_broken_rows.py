"""Rows broken in any way are trained on or named in one line, with every formatter: no other exception reaches a user."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_recipes.data.formatters import FORMATTERS
from sft_recipes.data.prepare import encode_rows
from sft_recipes.data.sources import find_formatter
from sft_recipes.encoding.encoder import Encoder
from support.configs import data_config

ASKED, SAID = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "name": "x", "weight": 1}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, {"b": null}]}'}}
PARTS = [{"type": "text", "text": "Well, "}, {"type": "text", "text": "hi.", "train": False}]
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
}
CHAT = [
    {"role": "system", "content": "Be brief."}, ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "3"}, {"role": "assistant", "content": PARTS}, ASKED,
    {"role": "assistant", "content": "Yo", "reasoning_content": "Hm.", "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": True}]},
]  # fmt: skip
SPOKEN = [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
          {"from": "observation", "value": "3"}, {"from": "gpt", "value": "Yo"}]  # fmt: skip
REPLIES = [
    {"role": "assistant", "text": "Yo", "rank": 1, "replies": []},
    {"role": "assistant", "text": "No", "rank": 0, "deleted": True},
]
# Rows that are right, with all that a formatter reads
ROWS = {
    "alpaca": [{"instruction": "Add.", "input": "1 + 1", "output": "2", "system": "Count.", "history": [["a", "b"]], "tools": [TOOL]}],
    "sharegpt": [{"conversations": SPOKEN, "system": "Be brief.", "tools": json.dumps([TOOL])}, {"conversations": ["Hi", "Yo"]}],
    "chatml": [{"messages": CHAT, "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}, "train": True},
               {"messages": json.dumps([ASKED, SAID]), "functions": [TOOL["function"]]}],
    "prompt_completion": [{"prompt": [ASKED], "completion": [SAID], "tools": [TOOL]}, {"prompt": "1 + 1 =", "completion": " 2"}],
    "oasst": [{"prompt": {"role": "prompter", "text": "Hi", "replies": REPLIES, "emojis": {"+1": 3}}, "message_tree_id": "1"}],
    "text": [{"text": "Once.", "label": "story", "weight": 0}],
}  # fmt: skip
WORDS = ["role", "content", "from", "value", "text", "type", "train", "loss", "tool_calls", "function", "name", "arguments", "tools",
         "functions", "history", "system", "messages", "image", "replies", "rank", "chat_template_kwargs", "thinking", "assistant", "user"]  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3)
SCALARS |= st.sampled_from(
    [*WORDS, "", " ", "[]", "{}", "[1]", "null", '{"a": 1}', "<|im_end|>", "\ud800", "x" * 3000, 10**30]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3),
    max_leaves=4,
)


def places(value, path: tuple = ()) -> list[tuple]:
    """The way to every value within a row."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [found for key, inner in items for found in ((*path, key), *places(inner, (*path, key)))]


@st.composite
def broken_rows(draw, formatter: str) -> dict:
    """A right row of a formatter's after one to three changes: a value replaced, taken out, wrapped, written as JSON, or added."""
    row = copy.deepcopy(draw(st.sampled_from(ROWS[formatter])))
    for _ in range(draw(st.integers(1, 3))):
        if not (every := places(row)):
            break
        *way, last = draw(st.sampled_from(every))
        holder = row
        for key in way:
            holder = holder[key]
        change = draw(st.sampled_from(["replace", "replace", "remove", "wrap", "write", "rename", "add"]))
        if change == "replace":
            holder[last] = draw(VALUES)
        elif change == "wrap":
            holder[last] = draw(st.sampled_from([[holder[last]], {"text": holder[last]}, [holder[last]] * 2]))
        elif change == "write":
            holder[last] = json.dumps(holder[last])
        elif change == "remove":
            del holder[last]
        elif isinstance(holder, dict):
            holder[draw(st.sampled_from(WORDS))] = draw(VALUES) if change == "add" else holder.pop(last)
        else:
            holder.insert(last, draw(VALUES))
    return row


@pytest.fixture(scope="module")
def encoder(chat_tokenizer):
    tokenizer, template, _ = chat_tokenizer("tiny", "chatml")
    return Encoder(tokenizer, template)


@pytest.mark.parametrize("formatter", FORMATTERS)
@given(data=st.data())
def test_a_broken_row_is_trained_on_or_named(encoder, formatter, data):
    row = data.draw(broken_rows(formatter))
    config = data_config(formatter, file={"data_files": "rows.jsonl"})
    read = find_formatter("file", config.sources["file"], config.formatter, [*row, "id", "messages"])
    rows, talks, faults = encode_rows("file", config, read, encoder, [(7, row, "rows.jsonl, line 8")], 1, 1)
    assert len(talks) + len(faults) == 1
    for number, line in faults:
        assert number == 7 and line.startswith("row 7 (rows.jsonl, line 8): ") and "\n" not in line
