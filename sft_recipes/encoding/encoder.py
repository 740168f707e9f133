"""Conversations become `input_ids` and `labels`: the loss is on the answers and their stop tokens and nothing else."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import mark_control_tokens

from sft_recipes.encoding.chat_template import find_stop_token, render_template, special_tokens
from sft_recipes.encoding.tokenizer_backend import encode_batch, without_dummy_prefix
from sft_recipes.encoding.trained_spans import select_trained_spans
from sft_recipes.errors import ConfigError, DataError, one_line

IGNORE_INDEX = -100  # the label of a token without loss, torch.nn.CrossEntropyLoss's default
TOKEN_START, TOKEN_END = mark_control_tokens("x", re.compile("x")).split("x")  # the marks around a control token
UNMARKED = str.maketrans("", "", TOKEN_START + TOKEN_END)
TRAIN_ON = ("assistant", "last", "all")
Piece = tuple[str, str, bool]  # how it is encoded, its text, whether the loss is taken on it


class Encoder:
    """Turns conversations into token ids and labels for one fast tokenizer and one chat template with markers.

    A rendered conversation is cut where the template's `{% generation %}` blocks begin and end, and every piece is
    encoded by itself, so that no token spans the border of prompt and answer: the ids before an answer are those that
    `tokenizer.apply_chat_template(history, add_generation_prompt=True)` gives when the model is served.
    Special tokens typed inside a message are encoded as text, as with transformers' `sanitize_control_tokens=True`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, chat_template: str):
        if not tokenizer.is_fast:
            raise ConfigError(f"{type(tokenizer).__name__} is a slow tokenizer; encoding needs a fast one.")
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.stop = find_stop_token(tokenizer, chat_template)
        self.special = special_tokens(tokenizer)
        self.typed = re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) or "(?!)")
        self.openings = sorted({token[:2] for token in self.special})  # two finds are faster than one big pattern
        self.inner = without_dummy_prefix(tokenizer.backend_tokenizer)

    def encode(self, conversations: Sequence[Mapping[str, Any]], train_on: str = "assistant") -> dict[str, list]:
        """For each conversation `input_ids` and `labels` (int32 arrays, -100 where no loss is taken), its rendered
        `text`, and whether special tokens are `typed` in it.

        A conversation is `{"messages": […], "tools": […], "chat_template_kwargs": {…}}` or `{"text": …}`, which is
        trained on every token and ends with eos. `train_on` is `assistant` (every assistant message), `last` (the final
        one) or `all` (every token); in each case nothing with `train: False` is trained on, and of a message with
        `train_detail` the parts that it marks. Raises DataError for one that the template refuses, or
        whose parts cannot be told apart.
        """
        return self.tokenized([self.pieces(conversation, train_on) for conversation in conversations])

    def encode_batches(self, batches: Iterable[list[list[Piece]]]) -> Iterator[dict[str, list]]:
        """`encode` for one batch of rendered rows after another; while one is tokenized, the next one is made."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            waiting: Future | None = None
            for rows in batches:
                if waiting:
                    yield waiting.result()
                waiting = pool.submit(self.tokenized, rows)
            if waiting:
                yield waiting.result()

    def tokenized(self, rows: list[list[Piece]]) -> dict[str, list]:
        """The pieces as columns of token ids, labels, texts, and whether special tokens are typed in them."""
        columns = join_pieces(rows, self.ids([piece for row in rows for piece in row]))
        typed = [any(how.startswith("marked") for how, _, _ in row) for row in rows]
        texts = ["".join(text for _, text, _ in row) for row in rows]
        texts = [text.translate(UNMARKED) if is_typed else text for text, is_typed in zip(texts, typed, strict=True)]
        return columns | {"text": texts, "typed": typed}

    def pieces(self, conversation: Mapping[str, Any], train_on: str) -> list[Piece]:
        """The conversation as (how to encode, text, supervised): consecutive, together the whole rendered text.

        Raises DataError where the template refuses it.
        """
        if train_on not in TRAIN_ON:
            raise ConfigError(f"train_on should be {', '.join(TRAIN_ON)}, not {train_on!r}.")
        if "text" in conversation:
            check_unicode(conversation["text"])
            return [("raw", conversation["text"], conversation.get("train") is not False)]
        given = [conversation["messages"], conversation.get("tools"), conversation.get("chat_template_kwargs")]
        marked = any(map(self.has_typed_token, iterate_strings(given)))
        if marked:
            if any("train_detail" in message for message in given[0]):
                raise DataError("it spells out a special token, and an answer is trained in part: one has to go")
            given = mark_control_tokens(given, self.typed)
        text, spans = self.render(*given)
        check_unicode(text)
        row, pieces, end, everywhere = conversation.get("train") is not False, [], 0, train_on == "all"
        for start, stop, trained in select_trained_spans(text, spans, given[0], train_on) if row else []:
            pieces += [(text[end:start], everywhere), (text[start:stop], trained)]
            end = stop
        pieces.append((text[end:], everywhere))
        return [
            (self.method(before, marked), piece, supervised and row)
            for (piece, supervised), before in zip(pieces, chain([""], (p for p, _ in pieces)), strict=False)
            if piece
        ]

    def method(self, before: str, marked: bool) -> str:
        """How a piece is encoded: at the `start` of a text, `inside` it, `after` a special token, with typed ones."""
        anchor = self.stop if before.endswith(self.stop) else next(filter(before.endswith, self.special), "")
        place = "start" if not before else f"after {anchor}" if anchor else "inside"
        return f"marked {place}" if marked else place

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, chat_template_kwargs: Any = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The conversation's text, and the character spans that the template marks as the assistant's."""
        try:
            return render_template(self.tokenizer, self.chat_template, messages, tools, chat_template_kwargs)
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"the chat template refuses it: {one_line(error)}") from error

    def has_typed_token(self, text: str) -> bool:
        """Whether a special token is spelled out in a row's text."""
        return any(opening in text for opening in self.openings) and self.typed.search(text) is not None

    def ids(self, pieces: list[Piece]) -> list[list[int]]:
        """The token ids of each piece; equal pieces are encoded once."""
        wanted = list(dict.fromkeys((how, text) for how, text, _ in pieces))
        found = {}
        for method in {how for how, _ in wanted}:
            texts = [text for how, text in wanted if how == method]
            found.update(zip(((method, text) for text in texts), self.encode_as(method, texts), strict=True))
        return [found[how, text] for how, text, _ in pieces]

    def encode_as(self, method: str, texts: list[str]) -> list[list[int]]:
        """The ids of texts that stand in one kind of place."""
        tokenizer, (method, _, anchor) = self.tokenizer, method.partition(" ")
        if method == "inside":
            return self.encode_inside(texts)
        if method == "after":  # as serving does, which encodes a special token and what follows it together
            return [ids[1:] for ids in encode_batch(tokenizer.backend_tokenizer, [anchor + text for text in texts])]
        if method == "marked":
            return [self.with_typed_tokens(text, place=anchor) for text in texts]
        if method == "raw":
            rows = encode_batch(tokenizer.backend_tokenizer, texts, add_special_tokens=True, encode_special_tokens=True)
            return [ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id] for ids in rows]
        return encode_batch(tokenizer.backend_tokenizer, texts)

    def encode_inside(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts from the middle of a longer one, in front of which a dummy prefix has no place.

        Some SentencePiece tokenizers put one behind every special token, too: that one is serving's, and stays.
        """
        backend = self.tokenizer.backend_tokenizer
        if self.inner is backend:
            return encode_batch(backend, texts)
        cuts = [found.start() if (found := self.typed.search(text)) else len(text) for text in texts]
        heads = encode_batch(self.inner, [text[:cut] for text, cut in zip(texts, cuts, strict=True)])
        tails = encode_batch(backend, [text[cut:] for text, cut in zip(texts, cuts, strict=True)])
        return [head + tail for head, tail in zip(heads, tails, strict=True)]

    def with_typed_tokens(self, text: str, place: str) -> list[int]:
        """The ids of a text in which special tokens that a row spells out stand between transformers' markers."""
        ids: list[int] = []
        for number, part in enumerate(re.split(f"{TOKEN_START}(.*?){TOKEN_END}", text)):
            if part and number % 2:
                ids += encode_batch(self.inner, [part], encode_special_tokens=True)[0]
            elif part:
                ids += self.encode_as(place, [part])[0]
            place = "inside" if part else place
        return ids


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
    labels = np.where(np.repeat(supervised, lengths), flat, np.int32(IGNORE_INDEX))
    ends = np.concatenate([[0], lengths.cumsum()])[np.cumsum([len(row) for row in rows])]
    return {"input_ids": np.split(flat, ends[:-1]), "labels": np.split(labels, ends[:-1])}


def iterate_strings(value: Any) -> Iterator[str]:
    """Every string in a nest of mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from iterate_strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from iterate_strings(item)
