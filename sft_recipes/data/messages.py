"""One message, whichever tool wrote it: its role, content, calls, thoughts, and the flags that keep it untrained."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from reprlib import repr as short
from typing import Any

from sft_recipes.data.json_document import DECODER
from sft_recipes.errors import DataError

Message = dict[str, Any]

# By the names of OpenAI, ShareGPT and its copies, Gemma (model), Llama 3 (ipython) and OpenAssistant (prompter)
ROLES = {"system": "system", "developer": "system"}
ROLES |= dict.fromkeys(("user", "human", "prompter"), "user")
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "model"), "assistant")
ROLES |= dict.fromkeys(("tool", "observation", "function", "function_response", "ipython"), "tool")
CALLING_ROLES = ("function_call", "tool_call")  # what such a turn says is the call itself
ROLES |= dict.fromkeys(CALLING_ROLES, "assistant")
SPEAKER, SPEECH = ("role", "from"), ("content", "value")
TOOL_CALLS = ("tool_calls", "function_call", "function_calls")
REASONING = ("reasoning_content", "thinking", "reasoning")
SWITCHES = ("on", "off", "true", "false", "yes", "no")  # whether to think, as a column of such a name may also say
# On a row, a message or a part of its content: whether it is trained on
TRAIN_FLAGS = ("train", "trainable", "training", "loss", "loss_mask", "weight")
# A csv has them as text
FLAG_VALUES = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
MEDIA = frozenset(("image", "images", "image_url", "video", "videos", "audio", "audios", "input_audio"))
MESSAGE_FIELDS = frozenset(
    (*SPEAKER, *SPEECH, *TOOL_CALLS, *REASONING, *TRAIN_FLAGS, "train_detail", "name", "tool_call_id")
)
PART_FIELDS = frozenset(("type", "text", *TRAIN_FLAGS))
CALL_FIELDS = frozenset(("id", "type", "function", "name", "arguments", "parameters"))


class ArrowRow(dict):
    """A row of `datasets`, which Arrow has filled with nulls for every key of other rows, at any depth."""


def read_messages(turns: Any, field: str) -> list[Message]:
    """A list of messages, or the JSON text of one."""
    turns = read_json(turns, field)
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{field} should be a list of messages, not {short(turns)}.")
    return [read_message(turn, f"{field}[{index}]") for index, turn in enumerate(turns)]


def read_message(turn: Any, field: str) -> Message:
    """One message; `train: False` where a flag keeps it untrained, `train_detail` where it is trained in part.

    >>> read_message({"from": "gpt", "value": "Hi", "loss": False}, "turn")
    {'role': 'assistant', 'content': 'Hi', 'train': False}
    """
    if not isinstance(turn, Mapping):
        raise DataError(f"{field} should be a message, not {short(turn)}.")
    turn = {key: value for key, value in turn.items() if value is not None}
    who = next((key for key in SPEAKER if key in turn), None)
    if who is None:
        raise DataError(f"{field} needs 'role' or 'from', it has {', '.join(turn) or 'nothing'}.")
    speaker = str(turn[who]).lower()
    if speaker not in ROLES:
        raise DataError(f"{field}.{who}: unknown role {short(turn[who])}, known are {', '.join(ROLES)}.")
    if who == "role" and ROLES.get(str(turn.get("from", speaker)).lower()) != ROLES[speaker]:
        raise DataError(f"{field} has role and from, which differ: one of them has to go.")
    refuse_media(turn, f"{field}.")
    what = only_key(turn, SPEECH, field) or ("value" if who == "from" else "content")
    source = what if speaker in CALLING_ROLES else only_key(turn, TOOL_CALLS, field)
    calls = read_tool_calls(turn.get(source), f"{field}.{source}")
    unsaid = source == what or (calls and what not in turn)  # the value is the call itself, or null beside a call
    content, trained = ("", []) if unsaid else read_content(turn.get(what), f"{field}.{what}")
    message = {"role": ROLES[speaker], "content": content}
    if thoughts := only_key(turn, REASONING, field):
        message["reasoning_content"] = read_text(turn[thoughts], f"{field}.{thoughts}")
    message |= question_parts(turn)
    for key in ("name", "tool_call_id"):
        if key in turn:
            message[key] = read_text(turn[key], f"{field}.{key}")
    if calls and message["role"] != "assistant":
        raise DataError(f"{field}.{source}: only the assistant calls tools, not {turn[who]}.")
    if calls:
        message["tool_calls"] = calls
    elif message["role"] == "assistant":
        read_filled(content, f"{field}.{what}")
    if "train_detail" in turn:
        detail = read_train_detail(turn["train_detail"], content, f"{field}.train_detail")
        trained = [span and part for span, part in zip(detail, trained or detail, strict=True)]
    if not is_trained(turn, f"{field}.") or (trained and not any(trained) and not calls and not thoughts):
        message["train"] = False
    elif not all(trained):
        message["train_detail"] = to_train_detail(trained)
    return message


def question_parts(turn: Mapping[str, Any]) -> dict[str, str]:
    """The `instruction` and the `input` that alpaca has put into a question's content, where both stand beside it."""
    parts = {key: turn[key] for key in ("instruction", "input") if isinstance(turn.get(key), str)}
    return parts if len(parts) == 2 and turn.get("content") == "\n\n".join(parts.values()) else {}


def only_key(turn: Mapping[str, Any], keys: Sequence[str], field: str) -> str | None:
    """Which of the keys has a value; raises DataError where two have different ones."""
    found = [key for key in keys if key in turn and has_value(turn[key])]
    if len(found) > 1 and any(turn[key] != turn[found[0]] for key in found):
        raise DataError(f"{field} has {' and '.join(found)}, which differ: one of them has to go.")
    return found[0] if found else None


def read_content(value: Any, field: str) -> tuple[str, list[bool]]:
    """A content's text, and for each character whether it is trained on; none where no part has a flag."""
    if not isinstance(value, list):
        return read_text(value, field), []
    texts, trained = [], []
    for index, part in enumerate(value):
        if not isinstance(part, Mapping) or part.get("type") not in ("text", "input_text", "output_text"):
            raise DataError(f"{field}[{index}] should be a text part, not {short(part)}.")
        texts.append(read_text(part.get("text"), f"{field}[{index}].text"))
        trained += [is_trained(part, f"{field}[{index}].")] * len(texts[-1])
    return "".join(texts), [] if all(trained) else trained


def read_train_detail(spans: Any, content: str, field: str) -> list[bool]:
    """For each character of the content whether Axolotl's `train_detail` trains it: its spans end with `end_offset`,
    and what no span holds is not trained on.

    >>> read_train_detail([{"begin_offset": 1, "end_offset": 2, "train": True}], "abcd", "train_detail")
    [False, True, True, False]
    """
    on, off = set(), set()
    for span in spans if isinstance(spans := read_json(spans, field), list) else [spans]:
        match span:
            case {"begin_offset": int(begin), "end_offset": int(end)} if 0 <= begin <= end < len(content):
                (on if is_trained(span, f"{field}.") else off).update(range(begin, end + 1))
            case _:
                raise DataError(
                    f"{field}: a span has begin_offset, end_offset (its last character, {len(content) - 1} at most) "
                    f"and train, not {short(span)}."
                )
    on -= off
    return [place in on for place in range(len(content))]


def to_train_detail(trained: Iterable[bool]) -> list[dict[str, Any]]:
    """The same as runs of characters, in Axolotl's words.

    >>> to_train_detail([False, True, True])[1]
    {'begin_offset': 1, 'end_offset': 2, 'train': True}
    """
    spans, end = [], 0
    for train, some in groupby(trained):
        begin, end = end, end + len(list(some))
        spans.append({"begin_offset": begin, "end_offset": end - 1, "train": train})
    return spans


def read_tool_calls(calls: Any, field: str) -> list[Message]:
    """A call, a list of them, or their JSON text, as OpenAI's `tool_calls` with the arguments parsed."""
    calls, found = read_json(calls, field) if calls else [], []
    for call in calls if isinstance(calls, list) else [calls]:
        arguments = None
        match call.get("function", call) if isinstance(call, Mapping) else None:
            case {"name": str(name), "arguments": given} | {"name": str(name), "parameters": given}:
                arguments = {} if given in (None, "") else read_json(given, f"{field}: arguments")
        if not isinstance(arguments, dict):
            raise DataError(f'{field}: a call is {{"name": "…", "arguments": {{…}}}}, not {short(call)}.')
        number = {"id": call["id"]} if call.get("id") is not None else {}
        found.append(number | {"type": "function", "function": {"name": name, "arguments": arguments}})
    return found


def is_trained(values: Mapping[str, Any], field: str = "") -> bool:
    """False where a flag of a row, a message or a part says not to train on it; raises DataError for one in between."""
    trained = True
    for name in TRAIN_FLAGS:
        if name in values and values[name] not in (None, ""):  # an empty cell of a csv says nothing
            flag = FLAG_VALUES.get(str(values[name]).strip().lower())
            if flag is None:
                found = f"{field}{name} should be 0 or 1 (false or true), not {short(values[name])}"
                raise DataError(f"{found}: a text is trained on or it is not. Another meaning needs another name.")
            trained = trained and flag
    return trained


def refuse_media(values: Mapping[str, Any], field: str = "") -> None:
    """Raises DataError where something beside a text is to be seen or heard."""
    if not MEDIA.isdisjoint(values):
        for key in values:
            if key in MEDIA and has_value(values[key]):
                raise DataError(f"{field}{key}: {short(values[key])} cannot be read, only text is trained on.")


def has_value(value: Any) -> bool:
    """Whether a key says anything: not null, and not an empty text, list or mapping."""
    return bool(value) or not (value is None or isinstance(value, (str, list, dict)))


def holds_thoughts(value: Any) -> bool:
    """Whether a column named as thoughts are holds some: a text that is neither blank nor a switch."""
    return isinstance(value, str) and value.strip().lower() not in ("", *SWITCHES)


def drop_nulls(value: Any) -> Any:
    """The value without the keys that are null, at any depth: Arrow fills a struct with every key of the column.

    >>> drop_nulls({"name": "f", "arguments": {"city": "Bonn", "zip": None}, "id": None})
    {'name': 'f', 'arguments': {'city': 'Bonn'}}
    """
    if isinstance(value, str):  # as most are, and to be told from a Mapping takes longer
        return value
    if isinstance(value, (dict, Mapping)):
        return {
            key: item if isinstance(item, str) else drop_nulls(item) for key, item in value.items() if item is not None
        }
    return [drop_nulls(item) for item in value] if isinstance(value, list) else value


def read_column(row: Mapping[str, Any], column: str, needing: str) -> Any:
    """A column's value; of a row of Arrow's without the nulls in it, at any depth."""
    if column not in row:
        raise DataError(f"{needing} needs {column!r}, the row has {', '.join(row) or 'nothing'}.")
    return drop_nulls(row[column]) if is_arrow_row(row) else row[column]


def is_arrow_row(row: Mapping[str, Any]) -> bool:
    """Whether Arrow has filled a row; those that `Dataset.map` hands over are no dict."""
    return isinstance(row, ArrowRow) or not isinstance(row, dict)


def read_filled(value: Any, field: str) -> str:
    """A text with something in it."""
    if not read_text(value, field).strip():
        raise DataError(f"{field} is blank.")
    return value


def read_text(value: Any, field: str) -> str:
    """A text as it stands."""
    if not isinstance(value, str):
        raise DataError(f"{field} should be text, not {short(value)}.")
    return value


def read_json(value: Any, field: str) -> Any:
    """The value that a JSON text holds; nulls written there are the author's and stay."""
    try:
        return DECODER.decode(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise DataError(f"{field} is not JSON ({error}): {short(value)}.") from None
