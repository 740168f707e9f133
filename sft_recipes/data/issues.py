"""What is wrong with an encoded row, seen beside the row as it was read: a bit for each issue, and fields by name."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import chain
from typing import Any

import numpy as np

from sft_recipes.config.options import CheckPolicy
from sft_recipes.data.fields import RowFields, Said
from sft_recipes.data.formatters import Conversation, chatml
from sft_recipes.encoding.encoder import IGNORE_INDEX, Context, Encoder
from sft_recipes.encoding.served_contexts import choose_answers

ISSUES = [field.name for field in fields(CheckPolicy)]
# What is done with what rendering shows, beside the issues that have a policy
NOTES = {"template_inserted": "mask", "unrolled": "auto", "history_differs": "keep"}
ISSUE_BIT = {name: 1 << place for place, name in enumerate([*ISSUES, "truncated", "cut_into_pieces", *NOTES])}
THINKS_BIT = 1 << 62  # no issue: an answer of the row has thoughts
FIELD_ISSUES = ("unread_field", "content_missing", "whitespace_trimmed")  # which are about fields, told by name
CONVERSATION_FIELDS = RowFields(chatml)  # of rows whose own formatter does not say what it reads


def find_issues(
    encoder: Encoder,
    fields: RowFields,
    rows: Sequence[Mapping[str, Any]],
    contexts: Sequence[Context],
    encoded: Mapping[str, list],
    train_on: str,
) -> tuple[np.ndarray, list[str]]:
    """One int64 a row, a bit set for each issue that it has by itself; and the fields that FIELD_ISSUES are about, as
    JSON by issue: all that are not read, and the one that is not rendered, or not whole."""
    found = find_token_issues(encoder, [context.conversation for context in contexts], encoded, train_on)
    names = []
    for row, (raw, context) in enumerate(zip(rows, contexts, strict=True)):
        raw = fields.parse(raw)
        unread = fields.unread(raw)
        about, bits = {"unread_field": unread} if unread else {}, THINKS_BIT * context.thinks
        if messages := context.conversation.get("messages"):
            texts = fields.texts(raw) if fields.said else CONVERSATION_FIELDS.texts(context.conversation)
            issue, field = find_missing_text(texts, context.text)
            about |= {issue: [field]} if issue else {}
            in_order = ROLE_ORDER.fullmatch("".join([message["role"][0] for message in messages]))
            blank = any(message["role"] == "user" and not message["content"].strip() for message in messages)
            bits |= ISSUE_BIT["roles_out_of_order"] * (not in_order) | ISSUE_BIT["blank_question"] * blank
            bits |= ISSUE_BIT["typed_control_token"] * encoded["typed"][row]
        found[row] |= bits | sum(map(ISSUE_BIT.get, (*about, *context.notes)))
        names.append(json.dumps(about) if about else "{}")  # most rows have nothing
    return found, names


def find_token_issues(
    encoder: Encoder, conversations: Sequence[Conversation], encoded: Mapping[str, list], train_on: str
) -> np.ndarray:
    """One int64 a row, a bit set for each issue that its tokens and labels show."""
    ids, labels = encoded["input_ids"], encoded["labels"]
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    row_of = np.repeat(np.arange(len(ids)), lengths)
    flat, carries = np.concatenate(ids), np.concatenate(labels) != IGNORE_INDEX
    last = np.zeros(len(flat), dtype=bool)
    last[np.cumsum(lengths) - 1] = True
    found = np.zeros(len(ids), dtype=np.int64)
    for row in np.flatnonzero(np.bincount(row_of[carries], minlength=len(ids)) == 0):
        answers = choose_answers(conversations[row].get("messages", []), train_on)
        marked = conversations[row].get("train") is False or (answers and not any(answers.values()))
        found[row] |= ISSUE_BIT["marked_untrained" if marked else "nothing_supervised"]
    ends = {encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id} - {None}
    double = np.flatnonzero((flat[1:] == flat[:-1]) & np.isin(flat[1:], list(ends)) & ~last[:-1])
    found[row_of[double]] |= ISSUE_BIT["double_bos_or_eos"]
    if train_on == "all":
        return found
    stops = np.isin(flat, encoder.stop_ids)
    finish = np.flatnonzero(carries & np.append(~carries[1:] | last[:-1], True))
    bare = finish[~stops[finish] & ~stops[np.maximum(finish - 1, 0)]]  # a line break may be trained behind the stop
    for row, ends in zip(*np.unique(row_of[bare], return_counts=True), strict=True):
        messages = conversations[row].get("messages", [])
        spans = [span for message in messages for span in message.get("train_detail", [])]
        cuts = sum(not span["train"] and span["begin_offset"] > 0 for span in spans)  # there the row ends the loss
        found[row] |= ISSUE_BIT["stop_not_supervised"] * bool(messages and ends > cuts)
    return found


# s(ystem) first if at all, then u(ser) and a(ssistant) in turn; t(ool) messages stand between two of the assistant's
ROLE_ORDER = re.compile(r"s?(ua(t+a)*)+")


def find_missing_text(texts: Iterable[Said], text: str) -> tuple[str, str]:
    """The issue with a rendered text and the field it is about: `content_missing` where something that a row says does
    not stand in it, verbatim or as JSON writes it; `whitespace_trimmed` where only spaces and line breaks around it are
    gone; else twice ''.

    >>> find_missing_text([("user", "Hi ", True), ("gpt", "Yo", True)], "user: Hi model: Yo")
    ('', '')
    >>> find_missing_text([("user", "Hi  ", True), ("gpt", "Yo", True)], "user: Hi model: Yo")
    ('whitespace_trimmed', 'user')
    """
    place, issue = 0, ("", "")
    for field, said, in_order in texts:
        if not (bare := said.strip()):
            continue
        begin = place if in_order else 0
        form, start = said, text.find(said, begin)
        if start < 0:
            written = (json.dumps(said, ensure_ascii=plain)[1:-1] for plain in (False, True))
            found = ((form, start) for form in chain(written, [bare]) if (start := text.find(form, begin)) >= 0)
            form, start = next(found, ("", -1))
        if start < 0:
            return "content_missing", field
        if form != said and form == bare:
            issue = issue if issue[0] else ("whitespace_trimmed", field)
        place = start + len(form) if in_order else place
    return issue
