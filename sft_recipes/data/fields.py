"""Which keys of a row are read, which are known to be metadata, and which are neither, so that they are said aloud."""

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sft_recipes.data.messages import (
    CALL_FIELDS,
    CALLING_ROLES,
    MESSAGE_FIELDS,
    PART_FIELDS,
    REASONING,
    ROLES,
    SPEECH,
    TOOL_CALLS,
    TRAIN_FLAGS,
    drop_nulls,
    has_value,
    holds_thoughts,
    is_arrow_row,
    question_parts,
    read_json,
    read_tool_calls,
)

# What may stand beside a text without a word in the report: no one would train on it
METADATA = frozenset((
    "id", "_id", "idx", "index", "uid", "uuid", "guid", "hash", "md5", "sha", "sha256", "row_id", "example_id",
    "question_id", "answer_id", "prompt_id", "message_id", "parent_id", "message_tree_id", "tree_state",
    "conversation_id", "conv_id", "thread_id", "session_id", "user_id", "worker_id", "annotator_id",
    "annotator", "author", "username", "source", "sources", "source_id", "dataset", "dataset_name", "origin",
    "subset", "split", "dump", "file", "file_path", "filename", "path", "url", "uri", "link", "license",
    "licence", "category", "categories", "subcategory", "topic", "topics", "domain", "genre", "type",
    "task_type", "task_name", "tag", "tags", "keywords", "language", "language_score", "lang", "locale",
    "country", "created", "created_at", "updated", "updated_at", "date", "time", "timestamp", "year", "version",
    "score", "scores", "int_score", "rating", "ratings", "rank", "reward", "quality", "difficulty", "votes",
    "upvotes", "likes", "views", "num_turns", "length", "num_tokens", "token_count", "model", "model_name",
    "model_id", "temperature", "finish_reason", "stop_reason", "usage", "meta", "metadata", "refusal",
    "annotations", "cache_control", "created_date",
))  # fmt: skip
ALIASES = {
    "system": ["system_prompt"],
    "tools": ["functions"],
    "reasoning": REASONING,
}  # read as well, where the column has its usual name
# The formatters' parameters for texts, in the order in which templates render them
IN_ORDER = ("history", "instruction", "input", "conversations", "messages", "prompt", "completion", "output", "text")
Said = tuple[str, str, bool]  # the name of a field, a text of it, whether it comes behind the text before it
LEVELS = (MESSAGE_FIELDS, PART_FIELDS | CALL_FIELDS, CALL_FIELDS)  # in a message, in its parts or calls, in a function
# In every message of a tree of OpenAssistant's
TREE_LEVELS = (frozenset((
    "role", "text", "replies", "rank", "deleted", "labels", "emojis", "detoxify", "review_count", "review_result",
    "synthetic",
)),)  # fmt: skip


class RowFields:
    """What one formatter reads of its rows: the texts that have to be rendered, and the keys that are left.

    Our formatters declare their columns by parameters with defaults. A user's own is watched while it reads a row, and
    its texts, as those of `oasst`, are those of the conversation that came of the row.

    >>> from functools import partial
    >>> from sft_recipes.data.formatters import alpaca
    >>> fields = RowFields(partial(alpaca, output="response"))
    >>> row = {"instruction": "Hi", "response": "Yo", "output": "not this", "source": "forum"}
    >>> fields.unread(row), [text for _, text, _ in fields.texts(row)]
    (['output'], ['Hi', 'Yo'])
    """

    def __init__(self, formatter: Callable[..., Any]):
        self.own = getattr(formatter, "own", None)
        parameters = {} if self.own else inspect.signature(formatter).parameters
        given = {name: each.default for name, each in parameters.items() if isinstance(each.default, str)}
        self.tree = given.get("tree")
        self.said = [given[name] for name in IN_ORDER if name in given]
        self.parsed = [given[name] for name in ("history", "conversations", "messages") if name in given]
        self.system, self.tools, self.thoughts = (
            dict.fromkeys([given[name], *(ALIASES[name] if given[name] == name else [])]) if name in given else []
            for name in ALIASES
        )
        beside = (*self.system, *self.tools, *TRAIN_FLAGS, "chat_template_kwargs")
        self.known = METADATA.union(given.values(), beside).difference(self.thoughts)  # read where they are texts

    def parse(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with lists where it has the JSON text of one, and without the nulls of Arrow."""
        row = drop_nulls(row) if is_arrow_row(row) else row
        return row | {
            key: read_json(row[key], key) for key in self.parsed if row.get(key) and isinstance(row[key], str)
        }

    def texts(self, row: Mapping[str, Any]) -> Iterator[Said]:
        """Everything that a row says: its field, the text, and whether it is rendered behind what came before it. A
        system prompt, a tool, a call, a thought stand where the template has its place for them."""
        for column in self.said:
            value = row.get(column)
            if isinstance(value, str):  # as most are
                yield column, value, True
            else:
                for item in value if isinstance(value, list) else [value] if value else []:
                    yield from said_by(item, column)
        yield from ((column, row[column], False) for column in self.system if row.get(column))
        yield from ((column, row[column], False) for column in self.thoughts if holds_thoughts(row.get(column)))
        for column in self.tools:
            for tool in read_json(row.get(column) or [], column):
                if isinstance(name := tool.get("function", tool).get("name"), str):
                    yield column, name, False

    def unread(self, row: Mapping[str, Any]) -> list[str]:
        """The names of the keys with a value, at any level, that are neither read nor metadata.

        A text that repeats one that is read, or holds them all as Alpaca's rendered `text` does, is not lost.
        """
        if self.own:
            return list(dict.fromkeys(watch_reading(self.own, row)))
        names = [key for key in row if key not in self.known and has_value(row[key])]
        if names and self.said:
            said = [text for _, text, _ in self.texts(row)]
            names = [
                key
                for key in names
                if row[key] not in said and not (isinstance(row[key], str) and all(text in row[key] for text in said))
            ]
        for column in self.said:
            if isinstance(row.get(column), list):
                names += left_over(row[column], LEVELS)
        if self.tree:
            names += left_over(row.get(self.tree), TREE_LEVELS)
        return list(dict.fromkeys(names))


class WatchedRow(dict):
    """A row that knows which of its keys were asked for, as do all within it; going over it asks for all of them.

    What it lacks is null.
    """

    def __init__(self, row: Mapping[str, Any]):
        super().__init__({key: watched(value) for key, value in row.items()})
        self.seen: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)

    __getitem__ = pop = get

    def __iter__(self) -> Iterator[str]:
        self.seen.update(super().keys())
        return super().__iter__()

    keys, items, values = Mapping.keys, Mapping.items, Mapping.values  # a dict's own would not ask


def watched(value: Any) -> Any:
    """The value with a WatchedRow in the place of every mapping."""
    if isinstance(value, list):
        return [watched(item) for item in value]
    return WatchedRow(value) if isinstance(value, Mapping) else value


def watch_reading(own: Callable[..., Any], row: Mapping[str, Any]) -> Iterator[str]:
    """The keys with a value, at any level, that a user's formatter does not ask for and that are not metadata."""
    row = watched(row)
    try:
        messages = own(row).get("messages", [])
    except Exception:  # it has read the row itself, and may expect just that: then nothing is known of its reading
        return
    handed_on = set(map(id, messages))
    row.seen.add("")  # a row of which nothing is read is not handed on as a whole, as a message may be
    yield from unseen(row, handed_on)
    yield from left_over(messages, LEVELS)


def unseen(value: Any, handed_on: set[int]) -> Iterator[str]:
    """The keys with a value that were not asked for, of the mappings of which something was."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, WatchedRow) and item.seen and id(item) not in handed_on:
            for key, inner in dict.items(item):
                if key in item.seen:
                    yield from unseen(inner, handed_on)
                elif key not in METADATA and has_value(inner):
                    yield key


def left_over(values: Any, levels: Sequence[frozenset[str]]) -> Iterator[str]:
    """The keys with a value in messages, their parts and calls that are neither read there nor metadata."""
    for item in values if isinstance(values, list) else [values]:
        for key, value in item.items() if isinstance(item, Mapping) else []:
            if key not in levels[0]:
                known = key in METADATA or key in question_parts(item)
                yield from [key] if not known and has_value(value) else []
            elif isinstance(value, list | Mapping) and key in (*SPEECH, *TOOL_CALLS, "function", "replies"):
                yield from left_over(value, levels[1:] or levels)


def said_by(turn: Any, column: str) -> Iterator[Said]:
    """What a message says; of a bare text, or a question with its answer, all of it."""
    if not isinstance(turn, Mapping):
        yield from ((column, text, True) for text in ([turn] if isinstance(turn, str) else turn))
        return
    speaker = str(turn.get("role") or turn.get("from")).lower()
    for key, value in turn.items():
        if key in TOOL_CALLS or (key in SPEECH and speaker in CALLING_ROLES):
            calls = [call["function"] for call in read_tool_calls(value, key)]
            yield from ((key, text, False) for call in calls for text in (call["name"], *leaves(call["arguments"])))
        elif key in SPEECH or key in REASONING:
            parts = [value] if isinstance(value, str) else [part["text"] for part in value or []]
            parts = list(question_parts(turn).values()) or parts if key in SPEECH else parts
            field, in_order = (f"{speaker} {key}", ROLES.get(speaker) != "system") if key in SPEECH else (key, False)
            yield from ((field, text, in_order) for text in parts)


def leaves(value: Any) -> Iterator[str]:
    """Every name, text and number within the arguments of a call, as JSON writes them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)
    elif isinstance(value, list | Mapping):
        for item in value.items() if isinstance(value, Mapping) else value:
            yield from leaves(list(item) if isinstance(item, tuple) else item)
