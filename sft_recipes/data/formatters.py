"""Formatters turn one row of a dataset format into one conversation: `dataset.map(alpaca)`.

`Dataset.map` settles the types on its first 1,000 rows: where tool calls, inputs or `train` turn up only after them, it
raises until it is given `writer_batch_size=len(dataset)`.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from reprlib import repr as short
from typing import Any

from sft_recipes.errors import DataError

# {"messages": [{"role", "content", and where they apply "tool_calls", "reasoning_content", "name", "tool_call_id",
# "train": False}], "tools": [...] where the row has that column}, or {"text"} where every token is trained on
Conversation = dict[str, Any]
Message = dict[str, Any]
Row = Mapping[str, Any]

CHATML_ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
SHAREGPT_ROLES = CHATML_ROLES | {"human": "user", "gpt": "assistant"}
SHAREGPT_ROLES |= {"function_call": "assistant", "observation": "tool"}


def alpaca(
    row: Row, /, instruction: str = "instruction", input: str = "input", output: str = "output", system: str = "system"
) -> Conversation:
    """One turn: the instruction, then its input if there is one, then the answer.

    With an input the question also carries both apart, since Stanford's prompt has a block for each.

    >>> alpaca({"instruction": "Add.", "input": "1 + 1", "output": "2"})["messages"][0]
    {'role': 'user', 'content': 'Add.\\n\\n1 + 1', 'instruction': 'Add.', 'input': '1 + 1'}
    """
    task = _text(_column(row, instruction, "alpaca"), instruction)
    question = {"role": "user", "content": task}
    if given := _optional_text(row, input, "input", "alpaca"):
        question |= {"content": f"{task}\n\n{given}", "instruction": task, "input": given}
    answer = {"role": "assistant", "content": _filled(_column(row, output, "alpaca"), output)}
    return {"messages": [*_system(row, system, "alpaca"), question, answer]}


def sharegpt(
    row: Row, /, conversations: str = "conversations", system: str = "system", tools: str = "tools"
) -> Conversation:
    """Turns of `from` and `value` (or `role` and `content`), or bare strings that alternate as in LIMA.

    >>> sharegpt({"conversations": ["Hi", "Hello!"]})
    {'messages': [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello!'}]}
    """
    turns = _column(row, conversations, "sharegpt")
    if isinstance(turns, list) and turns and isinstance(turns[0], str):
        turns = [{"from": ("human", "gpt")[index % 2], "value": turn} for index, turn in enumerate(turns)]
    front = _system(row, system, "sharegpt")
    messages = _answered(_messages(turns, conversations, SHAREGPT_ROLES), conversations)
    if front and messages[0]["role"] == "system":
        raise DataError(f"{system} is set and {conversations}[0] is a system turn as well, one of them has to go.")
    return {"messages": front + messages} | _tools(row, tools, "sharegpt")


def chatml(row: Row, /, messages: str = "messages", tools: str = "tools") -> Conversation:
    """OpenAI's messages, with text parts joined, arguments of calls parsed, and Arrow's nulls removed.

    >>> chatml({"messages": [{"role": "assistant", "content": [{"type": "text", "text": "Hi"}], "tool_calls": None}]})
    {'messages': [{'role': 'assistant', 'content': 'Hi'}]}
    """
    turns = _messages(_column(row, messages, "chatml"), messages, CHATML_ROLES)
    return {"messages": _answered(turns, messages)} | _tools(row, tools, "chatml")


def prompt_completion(
    row: Row, /, prompt: str = "prompt", completion: str = "completion", tools: str = "tools"
) -> Conversation:
    """The prompt, then the completion, each a text or a list of messages; only the completion is trained on.

    >>> prompt_completion({"prompt": "1 + 1 =", "completion": " 2"})
    {'messages': [{'role': 'user', 'content': '1 + 1 ='}, {'role': 'assistant', 'content': ' 2'}]}
    """
    history = _turns(_column(row, prompt, "prompt_completion"), prompt, "user")
    history = [turn | {"train": False} if turn["role"] == "assistant" else turn for turn in history]
    answer = _answered(_turns(_column(row, completion, "prompt_completion"), completion, "assistant"), completion)
    return {"messages": history + answer} | _tools(row, tools, "prompt_completion")


def text(row: Row, /, text: str = "text") -> Conversation:
    """Raw text, trained on every token."""
    return {"text": _filled(_column(row, text, "text"), text)}


FORMATTERS: dict[str, Callable[..., Conversation]] = {
    formatter.__name__: formatter for formatter in (alpaca, sharegpt, chatml, prompt_completion, text)
}


def detect_formatter(columns: Iterable[str]) -> str:
    """The name of the formatter whose columns are there.

    >>> detect_formatter(["instruction", "input", "output", "text"])
    'alpaca'
    """
    columns = list(columns)
    needs = {  # the first that fits: alpaca rows often bring their rendered text, chat rows a prompt
        "chatml": {"messages"},
        "sharegpt": {"conversations"},
        "alpaca": {"instruction", "output"},
        "prompt_completion": {"prompt", "completion"},
        "text": {"text"},
    }
    for name, needed in needs.items():
        if needed.issubset(columns):
            return name
    example = "{name: alpaca, instruction: question, output: answer}"
    raise DataError(f"no formatter reads the columns {', '.join(columns)}. Name one with its own, such as {example}.")


def drop_nulls(value: Any) -> Any:
    """The value without the keys that are null, at any depth: Arrow fills a struct with every key of the column.

    >>> drop_nulls({"name": "f", "arguments": {"city": "Bonn", "zip": None}, "id": None})
    {'name': 'f', 'arguments': {'city': 'Bonn'}}
    """
    if isinstance(value, Mapping):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    return [drop_nulls(item) for item in value] if isinstance(value, list) else value


def _turns(said: Any, field: str, role: str) -> list[Message]:
    if isinstance(said, list):
        return _messages(said, field, CHATML_ROLES)
    return [{"role": role, "content": _filled(said, field) if role == "assistant" else _text(said, field)}]


def _messages(turns: Any, field: str, roles: Mapping[str, str]) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{field} should be a list of messages, not {short(turns)}.")
    return [_message(turn, f"{field}[{index}]", roles) for index, turn in enumerate(turns)]


def _message(turn: Any, field: str, roles: Mapping[str, str]) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"{field} should be a message, not {short(turn)}.")
    turn = drop_nulls(turn)
    who, what = ("from", "value") if roles is SHAREGPT_ROLES and "role" not in turn else ("role", "content")
    speaker = str(_column(turn, who, field, "it")).lower()
    if speaker not in roles:
        raise DataError(f"{field}.{who}: unknown role {short(turn[who])}, known are {', '.join(roles)}.")
    source = what if speaker == "function_call" else "tool_calls"
    calls = _tool_calls(turn.get(source), f"{field}.{source}")
    unsaid = source == what or (calls and what not in turn)  # the value is the call itself, or null beside a call
    content = "" if unsaid else _content(turn.get(what), f"{field}.{what}")
    message = {"role": roles[speaker], "content": content}
    for key in ("reasoning_content", "name", "tool_call_id"):
        if key in turn:
            message[key] = _text(turn[key], f"{field}.{key}")
    if calls and message["role"] != "assistant":
        raise DataError(f"{field}.{source}: only the assistant calls tools, not {turn[who]}.")
    if calls:
        message["tool_calls"] = calls
    elif message["role"] == "assistant":
        _filled(content, f"{field}.{what}")
    if not _trained(turn, field):
        message["train"] = False
    return message


def _content(value: Any, field: str) -> str:
    if not isinstance(value, list):
        return _text(value, field)
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise DataError(f"{field}[{index}] should be a text part, not {short(part)}.")
    return "".join(_text(part.get("text"), f"{field}[{index}].text") for index, part in enumerate(value))


def _tool_calls(calls: Any, field: str) -> list[Message]:
    calls = _json(calls, field) if calls else []
    return [_tool_call(call, field) for call in (calls if isinstance(calls, list) else [calls])]


def _tool_call(call: Any, field: str) -> dict[str, Any]:
    match call:
        case {"function": {"name": str(name), "arguments": given}} | {"name": str(name), "arguments": given}:
            if isinstance(arguments := _json(given, f"{field}: arguments"), dict):
                number = {"id": call["id"]} if "id" in call else {}
                return number | {"type": "function", "function": {"name": name, "arguments": arguments}}
    raise DataError(f'{field}: a call is {{"name": "…", "arguments": {{…}}}}, not {short(call)}.')


def _trained(turn: Message, field: str) -> bool:
    train, weight = turn.get("train", True), turn.get("weight", 1)
    if not isinstance(train, bool):
        raise DataError(f"{field}.train should be true or false, not {short(train)}.")
    if weight not in (0, 1):
        raise DataError(f"{field}.weight should be 0 or 1, not {short(weight)}.")
    return train and weight == 1


def _answered(messages: list[Message], field: str) -> list[Message]:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise DataError(f"{field}: nothing to train on, no assistant turn.")
    if not any(answer.get("train", True) for answer in answers):
        raise DataError(f"{field}: nothing to train on, every assistant turn has train: false or weight: 0.")
    return messages


def _system(row: Row, column: str, formatter: str) -> list[Message]:
    content = _optional_text(row, column, "system", formatter)
    return [{"role": "system", "content": content}] if content else []


def _tools(row: Row, column: str, formatter: str) -> Conversation:
    if column == "tools" and column not in row:
        return {}
    # an empty list, not nothing: `Dataset.map` would keep the row's own text, and a column of both is an error
    tools = _json(drop_nulls(_column(row, column, formatter)) or [], column)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{column} should be a list of tools, not {short(tools)}.")
    return {"tools": tools}


def _optional_text(row: Row, column: str, default: str, formatter: str) -> str:
    """The column's text, or '' where it is null, blank, or absent; a column that the user named has to be there."""
    value = row.get(column) if column == default else _column(row, column, formatter)
    return value if value is not None and _text(value, column).strip() else ""


def _column(row: Row, column: str, needing: str, having: str = "the row") -> Any:
    if column not in row:
        raise DataError(f"{needing} needs {column!r}, {having} has {', '.join(row) or 'nothing'}.")
    return row[column]


def _filled(value: Any, field: str) -> str:
    if not _text(value, field).strip():
        raise DataError(f"{field} is blank.")
    return value


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{field} should be text, not {short(value)}.")
    return value


def _json(value: Any, field: str) -> Any:
    """The value that a JSON text holds; nulls written there are the author's and stay."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise DataError(f"{field} is not JSON ({error}): {short(value)}.") from None
