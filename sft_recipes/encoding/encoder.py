"""Conversations become `input_ids` and `labels`: the loss is on the answers and their stop tokens and nothing else."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import mark_control_tokens

from sft_recipes.encoding.answer_spans import describe_answers, has_thoughts
from sft_recipes.encoding.conversation_shapes import ShapeCache
from sft_recipes.encoding.rendering import list_strings, render_template, special_tokens
from sft_recipes.encoding.served_contexts import Row, choose_answers, cut_row, do_markers_suffice, render_rows
from sft_recipes.encoding.tokenizer_backend import TOKEN_END, TOKEN_START, encode_batch, without_dummy_prefix
from sft_recipes.errors import ConfigError, DataError

IGNORE_INDEX = -100  # the label of a token without loss, torch.nn.CrossEntropyLoss's default
UNMARKED = str.maketrans("", "", TOKEN_START + TOKEN_END)
TYPED = re.compile(f"{TOKEN_START}([^{TOKEN_START}{TOKEN_END}]*){TOKEN_END}|[{TOKEN_START}{TOKEN_END}]")
TRAIN_ON = ("assistant", "last", "all")
Piece = tuple[str, str, bool]  # the place it is encoded for, its text, whether the loss is taken on it
Encodings = dict[tuple[str, str], Encoding]  # by place and text


class Context(NamedTuple):
    """One row to train on: a conversation, or its beginning up to an answer, as it is served before each answer."""

    conversation: Mapping[str, Any]  # with the settings that its thoughts need
    pieces: list[Piece]
    answers: list[int]  # the pieces with which the trained answers begin; what stands before one is its prompt
    text: str  # all that is shown of the conversation in any context, for the checks of what a template leaves out
    notes: frozenset[str] = frozenset()  # issues that rendering shows, see data/issues.py
    thinks: bool = False  # whether a trained answer has thoughts


class Encoder:
    """Turns conversations into token ids and labels for one fast tokenizer and one chat template.

    A rendered conversation is cut where its answers begin and end, and every piece is encoded by itself, so that no
    token spans the border of prompt and answer: the ids before an answer are those that
    `tokenizer.apply_chat_template(history, add_generation_prompt=True)` gives when the model is served. An answer is
    what rendering it adds to that prompt, or what the template's `{% generation %}` markers say where history renders
    as the present turn does (and `check_train_serve_parity` compares them).
    Special tokens typed inside a message are encoded as text, as with transformers' `sanitize_control_tokens=True`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, chat_template: str, train_empty_thoughts: bool = False):
        if not tokenizer.is_fast:
            raise ConfigError(f"{type(tokenizer).__name__} is a slow tokenizer; encoding needs a fast one.")
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.train_empty_thoughts = train_empty_thoughts
        self.answers = describe_answers(tokenizer, chat_template)
        self.render = partial(render_template, tokenizer, chat_template)  # of messages, tools and settings
        self.markers_suffice = "endgeneration" in chat_template and do_markers_suffice(self.render, self.answers)
        self.stop, self.stop_ids = self.answers.stops[0], tokenizer.convert_tokens_to_ids(list(self.answers.stops))
        self.special = special_tokens(tokenizer)
        self.typed = re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) or "(?!)")
        self.openings = sorted({token[:2] for token in self.special})  # two finds are faster than one big pattern
        self.inner = without_dummy_prefix(tokenizer.backend_tokenizer)
        self.inner_ends = re.compile("(?!)") if self.inner is tokenizer.backend_tokenizer else self.typed
        self.shapes = ShapeCache(chat_template, self.answers, self.special, self.render_contexts)

    def encode(
        self, conversations: Sequence[Mapping[str, Any]], train_on: str = "assistant", unroll: str = "auto"
    ) -> dict[str, list]:
        """For each row of `contexts` `input_ids` and `labels` (int32 arrays, -100 where no loss is taken), its rendered
        `text`, and whether special tokens are `typed` in it.

        A conversation is `{"messages": […], "tools": […], "chat_template_kwargs": {…}}` or `{"text": …}`, which is
        trained on every token and ends with eos. `train_on` is `assistant` (every assistant message), `last` (the final
        one) or `all` (every token); in each case nothing with `train: False` is trained on, and of a message with
        `train_detail` the parts that it marks. Raises DataError for one that the template refuses, or
        whose parts cannot be told apart.
        """
        contexts = (context for each in conversations for context in self.contexts(each, train_on, unroll))
        rows = [context.pieces for context in contexts]
        return self.tokenized(rows) | {"text": ["".join(text for _, text, _ in row) for row in rows]}

    def encode_batches(self, batches: Iterable[list[list[Piece]]]) -> Iterator[dict[str, list]]:
        """`encode` for one batch of rendered rows after another; while one is tokenized, its neighbours are made and
        read, here and not in the tokenizer's thread, which would wait for Python's lock before it takes the next one.
        """
        with ThreadPoolExecutor(max_workers=1) as pool:
            before: tuple[list[list[Piece]], Future] | None = None
            for rows in batches:
                last, before = before, (rows, pool.submit(self.encodings, list(chain.from_iterable(rows))))
                if last:
                    yield self.tokenized(last[0], last[1].result())
            if before:
                yield self.tokenized(before[0], before[1].result())

    def tokenized(self, rows: list[list[Piece]], encodings: Encodings | None = None) -> dict[str, list]:
        """The pieces as columns of token ids, labels, and whether special tokens are typed in them."""
        columns = join_pieces(rows, self.ids(list(chain.from_iterable(rows)), encodings))
        return columns | {"typed": [any(place == "typed" for place, _, _ in row) for row in rows]}

    def contexts(
        self, conversation: Mapping[str, Any], train_on: str = "assistant", unroll: str = "auto"
    ) -> list[Context]:
        """The rows that a conversation becomes, cut into pieces: one, or with `unroll` one for each answer that the
        whole conversation shows in another context than serving would.

        Raises DataError where the template refuses it.
        """
        if train_on not in TRAIN_ON:
            raise ConfigError(f"train_on should be {', '.join(TRAIN_ON)}, not {train_on!r}.")
        if "text" in conversation:
            check_unicode(conversation["text"])
            is_trained = conversation.get("train") is not False
            return [Context(conversation, [("raw", conversation["text"], is_trained)], [], conversation["text"])]
        if row := self.shapes.fill(conversation, train_on, unroll, self.has_typed_token):
            check_unicode(row.text)
            return [row]
        return self.render_contexts(conversation, train_on, unroll)

    def render_contexts(self, conversation: Mapping[str, Any], train_on: str, unroll: str) -> list[Context]:
        """`contexts` for messages, each of which is rendered."""
        is_trained = conversation.get("train") is not False
        given = [conversation["messages"], conversation.get("tools"), conversation.get("chat_template_kwargs") or {}]
        if marked := any(map(self.has_typed_token, list_strings(given))):
            if any("train_detail" in message for message in given[0]):
                raise DataError("it spells out a special token, and an answer is trained in part: one has to go")
            given = mark_control_tokens(given, self.typed)
        train_on = train_on if is_trained else "assistant"
        wanted = choose_answers(given[0], train_on)
        wanted = wanted if is_trained else dict.fromkeys(wanted, False)
        rows = None
        if self.markers_suffice:
            text, spans = self.render(*given)
            if len(spans) == len(wanted):
                each = {i: (*span, given[0][i] if wanted[i] else None) for i, span in zip(wanted, spans, strict=True)}
                each = {i: span for i, span in each.items() if span[2] or train_on == "all"}
                rows, whole = [Row(len(given[0]), text, given[2], each)], text
        if rows is None:
            rows, whole = render_rows(self.render, self.answers, given, wanted, train_on, unroll)
            for row in rows if self.markers_suffice else ():  # an answer that the template does not mark is context
                row.spans = {i: span for i, span in row.spans.items() if any(map(partial(overlaps, span), spans))}
        check_unicode(whole)
        whole = whole.translate(UNMARKED) if marked else whole
        return [
            self.to_context(conversation, row, train_on, marked, whole, unrolled=row is not rows[-1]) for row in rows
        ]

    def to_context(
        self, conversation: Mapping[str, Any], row: Row, train_on: str, marked: bool, whole: str, unrolled: bool
    ) -> Context:
        """One rendered row of a conversation, whose rows are `whole` together."""
        pieces, answers, notes, before = [], [], {*row.notes, *["unrolled"] * unrolled}, ""
        for text, loss, what in cut_row(row, self.answers, train_on, self.train_empty_thoughts):
            if what:
                answers.append(len(pieces))
                notes.add(what)
            if text:
                pieces += self.to_pieces(text, loss, before, marked)
                before = text
        given = conversation.get("chat_template_kwargs") or {}
        shown = conversation["messages"][: row.length]
        if len(shown) < len(conversation["messages"]) or row.settings.keys() != given.keys():
            conversation = {**conversation, "messages": shown, "chat_template_kwargs": {**row.settings, **given}}
        thinks = any(message and has_thoughts(message) for *_, message in row.spans.values())
        return Context(conversation, pieces, answers, whole, frozenset(notes - {"answer"}), thinks)

    def to_pieces(self, text: str, loss: bool, before: str, marked: bool) -> Iterator[Piece]:
        """A part of a row as pieces, for the `start` of a text, `inside` it or `after` a special token; special tokens
        that a `marked` row spells out, around which transformers' marks stand, are pieces of their own. A template that
        splits a text may leave one of two marks, which is dropped. In other rows such a character is text.

        A dummy prefix has no place in the middle of a text. Some SentencePiece tokenizers put one behind every special
        token, too: that one is serving's, and stays.
        """
        anchor = self.stop if before.endswith(self.stop) else next(filter(before.endswith, self.special), "")
        place = "start" if not before else f"after {anchor}" if anchor else "inside"
        for number, part in enumerate(TYPED.split(text) if marked else [text]):
            if part and number % 2:
                yield "typed", part, loss
            elif part and place == "inside" and (token := self.inner_ends.search(part)):
                yield from ((place, part[: token.start()], loss), ("start", part[token.start() :], loss))
            elif part:
                yield place, part, loss
            place = "inside" if part else place

    def has_typed_token(self, text: str) -> bool:
        """Whether a special token is spelled out in a row's text."""
        return any(opening in text for opening in self.openings) and self.typed.search(text) is not None

    def ids(self, pieces: list[Piece], encodings: Encodings | None = None) -> list[list[int]]:
        """The token ids of each piece."""
        encodings = self.encodings(pieces) if encodings is None else encodings
        found = {(place, text): self.read_ids(place, encoding) for (place, text), encoding in encodings.items()}
        return [found[place, text] for place, text, _ in pieces]

    def encodings(self, pieces: list[Piece]) -> Encodings:
        """What the tokenizer makes of the pieces: of equal ones once, in few calls, and of what stands after a special
        token together with it, as serving does."""
        backend, calls, found = self.tokenizer.backend_tokenizer, {}, {}
        ways = {"raw": (backend, True, True), "typed": (self.inner, False, True), "inside": (self.inner, False, False)}
        for place, text in dict.fromkeys((place, text) for place, text, _ in pieces):
            kind, _, anchor = place.partition(" ")
            calls.setdefault(ways.get(kind, (backend, False, False)), {})[place, text] = anchor + text
        for (tokenizer, *how), texts in calls.items():
            found.update(zip(texts, encode_batch(tokenizer, list(texts.values()), *how), strict=True))
        return found

    def read_ids(self, place: str, encoding: Encoding) -> list[int]:
        """The ids of one piece: without the special token before it, and of raw text with eos."""
        ids = encoding.ids
        if place == "raw":
            eos = self.tokenizer.eos_token_id
            return ids if ids[-1:] == [eos] else [*ids, eos]
        return ids[1:] if place.startswith("after") else ids


def overlaps(one: Sequence, other: Sequence) -> bool:
    """Whether two spans, which begin with their start and end, have a character in common."""
    return one[0] < other[1] and other[0] < one[1]


def check_unicode(text: str) -> None:
    """Raises DataError for half of a surrogate pair, which JSON can spell out and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start : error.end]
        raise DataError(f"the text has a lone surrogate, {half!r}, half a character. Remove or replace it.") from error


def join_pieces(rows: list[list[Piece]], ids: list[list[int]]) -> dict[str, list[np.ndarray]]:
    """Each row's pieces put together again, as ids and labels."""
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    flat = np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=int(lengths.sum()))
    supervised = np.fromiter((train for row in rows for _, _, train in row), dtype=bool, count=len(ids))
    columns = {"input_ids": flat, "labels": np.where(np.repeat(supervised, lengths), flat, np.int32(IGNORE_INDEX))}
    ends = np.concatenate([[0], lengths.cumsum()])[np.cumsum([0, *map(len, rows)])].tolist()
    return {key: [all_rows[start:end] for start, end in pairwise(ends)] for key, all_rows in columns.items()}
