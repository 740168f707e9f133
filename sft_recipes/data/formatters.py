"""Formatters turn one row of a dataset format into one conversation: `dataset.map(alpaca)`.

`Dataset.map` settles the types on its first 1,000 rows: where tool calls, inputs or `train` turn up only after them, it
raises until it is given `writer_batch_size=len(dataset)`. Rows taken out of a Dataset by hand have the nulls with which
Arrow fills its structs: `chatml(drop_nulls(row))`, from `data.messages`.
"""

from collections.abc import Callable, Mapping
from reprlib import repr as short
from typing import Any

from sft_recipes.data.messages import (
    REASONING,
    Message,
    has_value,
    holds_thoughts,
    is_arrow_row,
    is_trained,
    only_key,
    read_column,
    read_filled,
    read_json,
    read_messages,
    read_text,
    refuse_media,
)
from sft_recipes.errors import DataError

# {"messages": [{"role", "content", and where they apply "tool_calls", "reasoning_content", "name", "tool_call_id",
# "train": False, "train_detail"}], and where the row has them "tools": [...], "chat_template_kwargs": {...}}, or
# {"text"} where every token is trained on
Conversation = dict[str, Any]
Row = Mapping[str, Any]
CONTEXT = {"train": False}
# Columns that a row may lack, where the user has not named others
USUAL = ("input", "history", "system", "system_prompt", "tools", "reasoning", "chat_template_kwargs")
# Arguments of the rendering that no row may set as a variable of its template
RENDERING = frozenset(("messages", "tools", "documents", "chat_template", "add_generation_prompt"))


def alpaca(
    row: Row,
    /,
    instruction: str = "instruction",
    input: str = "input",
    output: str = "output",
    system: str = "system",
    history: str = "history",
    tools: str = "tools",
    reasoning: str = "reasoning",
) -> Conversation:
    """One turn: the instruction, then its input if there is one, then the answer; before it the turns of `history`.

    With an input the question also carries both apart, since Stanford's prompt has a block for each. What is in
    `reasoning` (also `thinking`, `reasoning_content`) are the answer's thoughts.

    >>> alpaca({"instruction": "Add.", "input": "1 + 1", "output": "2"})["messages"][0]
    {'role': 'user', 'content': 'Add.\\n\\n1 + 1', 'instruction': 'Add.', 'input': '1 + 1'}
    >>> [turn["content"] for turn in alpaca({"instruction": "c", "output": "d", "history": [["a", "b"]]})["messages"]]
    ['a', 'b', 'c', 'd']
    """
    task = read_text(read_column(row, instruction, "alpaca"), instruction)
    question = {"role": "user", "content": task}
    if given := _optional_text(row, input):
        question |= {"content": f"{task}\n\n{given}", "instruction": task, "input": given}
    answer = {"role": "assistant", "content": read_filled(read_column(row, output, "alpaca"), output)}
    messages = [*_history(row, history), question, answer | _thoughts(row, reasoning, answer)]
    return _conversation(row, messages, system, tools, instruction, input, output, history)


def sharegpt(
    row: Row, /, conversations: str = "conversations", system: str = "system", tools: str = "tools"
) -> Conversation:
    """Turns of `from` and `value` (or `role` and `content`), or bare strings that alternate as in LIMA.

    >>> sharegpt({"conversations": ["Hi", "Hello!"]})
    {'messages': [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello!'}]}
    """
    turns = read_json(read_column(row, conversations, "sharegpt"), conversations)
    if isinstance(turns, list) and turns and isinstance(turns[0], str):
        turns = [{"from": ("human", "gpt")[index % 2], "value": turn} for index, turn in enumerate(turns)]
    return _conversation(row, _answered(turns, conversations), system, tools, conversations)


def chatml(row: Row, /, messages: str = "messages", tools: str = "tools", system: str = "system") -> Conversation:
    """OpenAI's messages, or their JSON text: parts joined, arguments of calls parsed, older names of fields read.

    A row of `text` alone is raw text, as mode=curate writes both into one file.

    >>> chatml({"messages": [{"role": "assistant", "content": [{"type": "text", "text": "Hi"}], "tool_calls": None}]})
    {'messages': [{'role': 'assistant', 'content': 'Hi'}]}
    """
    if row.get(messages) is None:
        said = {key for key, value in row.items() if value is not None or not is_arrow_row(row)}
        if {"text"} <= said <= {"text", "train"}:
            return text(row)
    turns = read_column(row, messages, "chatml")
    return _conversation(row, _answered(turns, messages), system, tools, messages)


def prompt_completion(
    row: Row,
    /,
    prompt: str = "prompt",
    completion: str = "completion",
    tools: str = "tools",
    system: str = "system",
    history: str = "history",
    reasoning: str = "reasoning",
) -> Conversation:
    """The prompt, then the completion, each a text or a list of messages; only the completion is trained on.

    Before the question stand the turns of `history`; a completion of one message has the thoughts in `reasoning`, as in
    alpaca.

    >>> prompt_completion({"prompt": "1 + 1 =", "completion": " 2"})
    {'messages': [{'role': 'user', 'content': '1 + 1 ='}, {'role': 'assistant', 'content': ' 2'}]}
    """
    asked, answer = (read_column(row, column, "prompt_completion") for column in (prompt, completion))
    if isinstance(asked, list):
        past = [turn | CONTEXT if turn["role"] == "assistant" else turn for turn in read_messages(asked, prompt)]
    else:
        past = [{"role": "user", "content": read_text(asked, prompt)}]
    behind = past[0]["role"] == "system"
    past[behind:behind] = [turn | CONTEXT if turn["role"] == "assistant" else turn for turn in _history(row, history)]
    if isinstance(answer, list):
        answer = _answered(answer, completion)
    else:
        answer = [{"role": "assistant", "content": read_filled(answer, completion)}]
    if len(answer) == 1:
        answer[0] = _thoughts(row, reasoning, answer[0]) | answer[0]
    return _conversation(row, past + answer, system, tools, prompt, completion, history)


def oasst(row: Row, /, tree: str = "prompt") -> Conversation:
    """A tree of OpenAssistant's as one conversation: the best-ranked reply to every message, as Guanaco chose them.

    >>> replies = [{"role": "assistant", "text": text, "rank": rank} for text, rank in (("Bah", 1), ("Yo", 0))]
    >>> oasst({"prompt": {"role": "prompter", "text": "Hi", "replies": replies}})["messages"][1]["content"]
    'Yo'
    """
    node, turns = read_column(row, tree, "oasst"), []
    while node:
        if not isinstance(node, Mapping):
            raise DataError(f"{tree} should be a tree of messages with role, text and replies, not {short(node)}.")
        turns.append({"role": node.get("role"), "content": node.get("text")})
        replies = [reply for reply in node.get("replies") or [] if not reply.get("deleted")]
        node = min(replies, key=lambda reply: (reply.get("rank") is None, reply.get("rank")), default=None)
    while len(turns) > 1 and turns[-1]["role"] != "assistant":
        turns.pop()  # a question that nobody has answered
    return _conversation(row, _answered(turns, tree), "system", "tools", tree)


def text(row: Row, /, text: str = "text") -> Conversation:
    """Raw text, trained on every token."""
    beside = {key: value for key, value in row.items() if key != text}
    refuse_media(beside)
    raw_text = {"text": read_filled(read_column(row, text, "text"), text)}
    return raw_text if is_trained(beside) else raw_text | CONTEXT


FORMATTERS: dict[str, Callable[..., Conversation]] = {
    formatter.__name__: formatter for formatter in (alpaca, sharegpt, chatml, prompt_completion, oasst, text)
}


def _conversation(row: Row, messages: list[Message], system: str, tools: str, *columns: str) -> Conversation:
    """The messages, and what stands beside them in the row: system prompt, tools, settings of the template, flags."""
    read = {*columns, system, tools}
    beside = {key: value for key, value in row.items() if key not in read}
    refuse_media(beside)
    messages = _system(row, system, messages, columns[0]) + messages
    conversation = {"messages": messages} | _tools(row, tools)
    if not is_trained(beside):
        messages = [message | CONTEXT if message["role"] == "assistant" else message for message in messages]
        conversation |= {"messages": messages} | CONTEXT
    if has_value(settings := _optional(row, "chat_template_kwargs")):
        settings = read_json(settings, "chat_template_kwargs")
        if not isinstance(settings, Mapping) or not RENDERING.isdisjoint(settings):
            raise DataError(f"chat_template_kwargs should name variables of the chat template, not {short(settings)}.")
        conversation["chat_template_kwargs"] = settings
    return conversation


def _history(row: Row, column: str) -> list[Message]:
    messages, pairs = [], read_json(_optional(row, column) or [], column)
    for index, pair in enumerate(pairs if isinstance(pairs, list) else [pairs]):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"{column}[{index}] should be a question and its answer, not {short(pair)}.")
        messages.append({"role": "user", "content": read_text(pair[0], f"{column}[{index}][0]")})
        messages.append({"role": "assistant", "content": read_filled(pair[1], f"{column}[{index}][1]")})
    return messages


def _thoughts(row: Row, column: str, answer: Message) -> Message:
    """The thoughts beside an answer; none where they stand within it already."""
    if column == "reasoning":
        column = only_key({key: row[key] for key in REASONING if holds_thoughts(row.get(key))}, REASONING, "the row")
    thoughts = _optional_text(row, column) if column else ""
    inside = thoughts.strip() in answer["content"].rpartition("</think>")[0]
    return {"reasoning_content": thoughts} if thoughts and not inside else {}


def _answered(turns: Any, field: str) -> list[Message]:
    messages = read_messages(turns, field)
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{field}: nothing to train on, no assistant turn.")
    return messages


def _system(row: Row, column: str, messages: list[Message], field: str) -> list[Message]:
    """The row's system prompt as a message, unless the first turn is the same one."""
    names = ("system", "system_prompt") if column == "system" else (column,)
    prompts = {name: found for name in names if (found := _optional_text(row, name))}
    if inside := messages[0]["role"] == "system":
        prompts[f"{field}[0]"] = messages[0]["content"]
    if len({*prompts.values()}) > 1:
        raise DataError(f"{' and '.join(prompts)} are both system prompts, and differ: one of them has to go.")
    return [] if inside else [{"role": "system", "content": found} for found in {*prompts.values()}]


def _tools(row: Row, column: str) -> Conversation:
    legacy = column == "tools" and has_value(row.get("functions"))
    if legacy and has_value(row.get(column)):
        raise DataError("tools and functions are both set: one of them has to go.")
    source = "functions" if legacy else column
    if source == "tools" and source not in row:
        return {}
    # an empty list, not nothing: `Dataset.map` would keep the row's own text, and a column of both is an error
    tools = read_json(_optional(row, source) or [], source)
    if not isinstance(tools, list) or not all(
        isinstance(tool, dict) and isinstance(tool.get("function", tool), dict) for tool in tools
    ):
        raise DataError(f"{source} should be a list of tools, not {short(tools)}.")
    return {"tools": [{"type": "function", "function": tool} for tool in tools] if legacy else tools}


def _optional(row: Row, column: str) -> Any:
    """The column's value, or None where a usual one is absent; a column that the user named has to be there."""
    return None if column in USUAL and column not in row else read_column(row, column, "the formatter")


def _optional_text(row: Row, column: str) -> str:
    """The column's text, or '' where it is null, blank or absent."""
    value = _optional(row, column)
    return value if value is not None and read_text(value, column).strip() else ""
