"""Any conversation, in any writing, comes out of every formatter as it went in."""

import json

from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from sft_recipes.data.formatters import alpaca, chatml, prompt_completion, sharegpt, text
from sft_recipes.data.messages import drop_nulls

TEXT = st.text(max_size=40)  # every code point but lone surrogates, which are no text
ANSWER = TEXT.filter(str.strip)
NAME = st.text("abc_", min_size=1, max_size=6)
VALUES = st.recursive(
    st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAME, inner, max_size=3),
    max_leaves=5,
)
CALL = st.fixed_dictionaries({"name": NAME, "arguments": st.dictionaries(NAME, VALUES, max_size=3)})


@st.composite
def conversations(draw) -> list[dict]:
    """Messages as a formatter gives them back: perhaps a system message, then turns with answers, calls and observations."""
    messages = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(TEXT)})
        if draw(st.booleans()):
            call = {"type": "function", "function": draw(CALL)}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "content": draw(TEXT)})
        messages.append({"role": "assistant", "content": draw(ANSWER)})
    return messages


def as_sharegpt(messages: list[dict]) -> list[dict]:
    """The same turns as ShareGPT's files have them, calls as JSON."""
    roles = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
    turns = []
    for message in messages:
        if "tool_calls" in message:
            turns.append({"from": "function_call", "value": json.dumps(message["tool_calls"][0]["function"])})
        else:
            turns.append({"from": roles[message["role"]], "value": message["content"]})
    return turns


@given(conversations())
def test_chatml_gives_back_a_conversation_as_it_is(messages):
    assert chatml({"messages": messages}) == {"messages": messages}
    assert chatml(json.loads(json.dumps({"messages": messages}))) == {"messages": messages}


@given(conversations())
def test_sharegpt_gives_the_conversation_that_was_written_as_sharegpt(messages):
    assert sharegpt({"conversations": as_sharegpt(messages)}) == {"messages": messages}


@given(st.lists(st.tuples(TEXT, ANSWER), min_size=1, max_size=4))
def test_bare_strings_alternate(pairs):
    found = sharegpt({"conversations": [side for pair in pairs for side in pair]})["messages"]
    assert [(found[n]["content"], found[n + 1]["content"]) for n in range(0, len(found), 2)] == pairs
    assert {message["role"] for message in found[::2]} == {"user"}


@given(TEXT, TEXT | st.none(), ANSWER, TEXT | st.none())
def test_alpaca_keeps_question_input_answer_and_system(instruction, given_input, answer, system):
    row = {"instruction": instruction, "input": given_input, "output": answer, "system": system}
    *front, question, last = alpaca(row)["messages"]
    assert last == {"role": "assistant", "content": answer}
    if given_input and given_input.strip():
        assert question["content"] == f"{instruction}\n\n{given_input}"
        assert (question["instruction"], question["input"]) == (instruction, given_input)
    else:
        assert question == {"role": "user", "content": instruction}
    assert front == ([{"role": "system", "content": system}] if system and system.strip() else [])


@given(TEXT, ANSWER)
def test_prompt_completion_and_text_keep_every_character(prompt, answer):
    asked = {"role": "user", "content": prompt}
    assert prompt_completion({"prompt": prompt, "completion": answer})["messages"] == [
        asked, {"role": "assistant", "content": answer}
    ]  # fmt: skip
    assert text({"text": answer}) == {"text": answer}


@given(st.lists(conversations(), min_size=1, max_size=3))
def test_a_conversation_outlives_a_dataset(rows):
    texts = [[{key: message[key] for key in ("role", "content")} for message in messages] for messages in rows]
    texts = [[message for message in messages if message["content"].strip()] for messages in texts]
    stored = Dataset.from_list([{"messages": messages} for messages in texts])
    assert [chatml(row)["messages"] for row in stored] == texts


@given(VALUES)
def test_without_nulls_nothing_is_dropped(value):
    assert drop_nulls(value) == value
