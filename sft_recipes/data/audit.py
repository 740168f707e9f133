"""The supervision ledger: what encoding found in every row, counted, with what is done about it."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from datasets import Dataset

from sft_recipes.config.options import CheckPolicy
from sft_recipes.data.formatters import Conversation
from sft_recipes.data.token_rows import flat_values, row_arrays
from sft_recipes.encoding.encoder import IGNORE_INDEX, Encoder, iterate_strings
from sft_recipes.errors import ConfigError, DataError

log = logging.getLogger(__name__)
ISSUES = [field.name for field in fields(CheckPolicy)]
ISSUE_BIT = {name: 1 << place for place, name in enumerate(ISSUES)}


def find_issues(
    encoder: Encoder, conversations: Sequence[Conversation], encoded: Mapping[str, list], train_on: str
) -> np.ndarray:
    """One int64 a row, a bit set for each of PROBLEMS that it has by itself."""
    ids, labels = encoded["input_ids"], encoded["labels"]
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    row_of = np.repeat(np.arange(len(ids)), lengths)
    flat, carries = np.concatenate(ids), np.concatenate(labels) != IGNORE_INDEX
    last = np.zeros(len(flat), dtype=bool)
    last[np.cumsum(lengths) - 1] = True
    found = np.zeros(len(ids), dtype=np.int64)
    found[np.bincount(row_of[carries], minlength=len(ids)) == 0] |= ISSUE_BIT["nothing_supervised"]
    ends = {encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id} - {None}
    double = np.flatnonzero((flat[1:] == flat[:-1]) & np.isin(flat[1:], list(ends)) & ~last[:-1])
    found[row_of[double]] |= ISSUE_BIT["double_bos_or_eos"]
    if train_on != "all":
        stop = encoder.tokenizer.convert_tokens_to_ids(encoder.stop)
        finish = np.flatnonzero(carries & np.append(~carries[1:] | last[:-1], True))
        bare = finish[(flat[finish] != stop) & (flat[np.maximum(finish - 1, 0)] != stop)]
        chats = np.array(["messages" in conversation for conversation in conversations])
        found[row_of[bare]] |= ISSUE_BIT["stop_not_supervised"] * chats[row_of[bare]]
    for row, (conversation, text) in enumerate(zip(conversations, encoded["text"], strict=True)):
        if "messages" not in conversation:
            continue
        if find_missing_text(conversation, text):
            found[row] |= ISSUE_BIT["content_missing"]
        if not ROLE_ORDER.fullmatch("".join(message["role"][0] for message in conversation["messages"])):
            found[row] |= ISSUE_BIT["roles_out_of_order"]
        if encoded["typed"][row]:
            found[row] |= ISSUE_BIT["typed_control_token"]
    return found


# s(ystem) first if at all, then u(ser) and a(ssistant) in turn; t(ool) messages stand between two of the assistant's
ROLE_ORDER = re.compile(r"s?(ua(t+a)*)+")


def find_missing_text(conversation: Conversation, text: str) -> str:
    """The first string of the conversation that does not stand in the rendered text, verbatim and in order, or ''."""
    place = 0
    for message in conversation["messages"]:
        for said in message_texts(message):
            place = text.find(said, place)
            if place < 0:
                return said
            place += len(said)
    return next((tool for tool in tool_names(conversation.get("tools")) if tool not in text), "")


def message_texts(message: Mapping[str, Any]) -> Iterator[str]:
    """What a message says, in the order a template writes it."""
    if message.get("reasoning_content"):
        yield message["reasoning_content"]
    if message.get("input"):
        yield from (message["instruction"], message["input"])
    else:
        yield message["content"]
    for call in message.get("tool_calls", []):
        yield call["function"]["name"]


def tool_names(tools: Sequence[Mapping[str, Any]] | None) -> Iterator[str]:
    """The names of a row's tools, wrapped as OpenAI's are or bare."""
    for tool in tools or []:
        name = tool.get("function", tool).get("name")
        if isinstance(name, str):
            yield name


def apply_policy(name: str, rows: Dataset, policy: CheckPolicy) -> tuple[Dataset, dict[str, Any]]:
    """The rows that the policy keeps, and the count and first twenty row numbers of every problem that was found.

    Raises DataError for the first problem whose policy is `raise`.
    """
    found, numbers = flat_values(rows, "problems"), flat_values(rows, "row")
    record, gone = {}, np.zeros(len(rows), dtype=bool)
    for problem in ISSUES:
        hit = (found & ISSUE_BIT[problem]) > 0
        if not hit.any():
            continue
        action = getattr(policy, problem)
        record[problem] = {"rows": int(hit.sum()), "policy": action, "first": numbers[hit][:20].tolist()}
        listed = ", ".join(map(str, record[problem]["first"][:5]))
        if action == "raise":
            raise DataError(
                f"data.{name}: {hit.sum()} of {len(rows)} rows have {problem} (row {listed}…): "
                f"{ISSUE_DESCRIPTIONS[problem]}. Fix them, or write data_checks.{problem}=drop (or keep)."
            )
        if action == "drop":
            gone |= hit
    return (rows.select(np.flatnonzero(~gone)) if gone.any() else rows), record


ISSUE_DESCRIPTIONS = {
    "nothing_supervised": "no token of them carries loss",
    "stop_not_supervised": "an answer ends without its stop token, so the model would not learn to stop; it should "
    "stand within the chat template's {% generation %} block",
    "content_missing": "the chat template leaves out something that they say",
    "roles_out_of_order": "their turns do not alternate",
    "typed_control_token": "they spell out a special token",
    "double_bos_or_eos": "BOS or EOS stands twice in a row",
    "duplicate": "they repeat an earlier row token for token",
    "in_held_out": "they are also held out",
    "truncated": "they are longer than trainer.max_length",
    "fully_truncated": "nothing supervised is left of them",
}


def log_issues(name: str, problems: Mapping[str, Mapping[str, Any]]) -> None:
    """Says in the log which rows are dropped or cut."""
    for problem, found in problems.items():
        if found["policy"] == "drop" or problem == "truncated":
            action = "dropped" if found["policy"] == "drop" else "cut, their stop tokens gone"
            listed = ", ".join(map(str, found["first"][:5]))
            log.warning(
                "data.%s: %d rows (%s: %s) are %s (row %s…).",
                name, found["rows"], problem, ISSUE_DESCRIPTIONS[problem], action, listed,
            )  # fmt: skip


def row_hashes(rows: Dataset) -> set[int]:
    """The rows' token ids as one number each, by which repeats are found."""
    return {hash(row.tobytes()) for row in row_arrays(rows, "input_ids")} if len(rows) else set()


def mark_duplicates(train: Dataset, held_out: set[int], seen: set[int]) -> Dataset:
    """The training rows with `duplicate` and `in_held_out` set in their `problems`; `seen` grows by their keys."""
    problems = flat_values(train, "problems").copy()
    for index, row in enumerate(row_arrays(train, "input_ids")):
        key = hash(row.tobytes())
        problems[index] |= ISSUE_BIT["duplicate"] * (key in seen) | ISSUE_BIT["in_held_out"] * (key in held_out)
        seen.add(key)
    return train.remove_columns("problems").add_column("problems", problems)


def check_train_serve_parity(encoder: Encoder, conversations: Sequence[Conversation]) -> None:
    """Raises ConfigError where training shows another context before an answer than serving would.

    The saved tokenizer renders the history with its own template. Before a first answer the ids have to be equal,
    before a last one the text: an earlier answer is encoded by itself when it is trained, and with the line break
    before it when it is history. Rows with typed special tokens are the exception, as serving would take them for real
    ones; rows whose turns do not alternate are served in no other way than they are written.
    """
    for conversation in conversations:
        if "text" in conversation or any(map(encoder.has_typed_token, iterate_strings(conversation))):
            continue
        messages, tools = conversation["messages"], conversation.get("tools") or None
        if not ROLE_ORDER.fullmatch("".join(message["role"][0] for message in messages)):
            continue
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        for turn in {answers[0], answers[-1]}:
            said = [
                {key: value for key, value in message.items() if key != "train"} for message in messages[: turn + 1]
            ]
            row = encoder.encode([{"messages": said, "tools": tools}])
            ids, carries = row["input_ids"][0], row["labels"][0] != IGNORE_INDEX
            start = np.flatnonzero(carries & ~np.append(False, carries[:-1]))[-1]
            trained = ids[:start].tolist()
            served = encoder.tokenizer.apply_chat_template(
                messages[:turn], tools=tools, add_generation_prompt=True, return_dict=False
            )
            texts = [encoder.tokenizer.decode(some) for some in (trained, served)]
            if texts[0] != texts[1] or (turn == answers[0] and trained != served):
                raise ConfigError(
                    f"model.chat_template: training shows …{texts[0][-40:]!r} before an answer, serving "
                    f"…{texts[1][-40:]!r}. The text up to an answer should be what the template gives for the messages "
                    "before it with add_generation_prompt."
                )
