"""Conversations become `input_ids` and `labels`: the loss is on the answers and their stop tokens and nothing else."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import mark_control_tokens

from sft_recipes.encoding.answer_spans import describe_answers, has_thoughts, is_stable
from sft_recipes.encoding.rendering import render_template, special_tokens
from sft_recipes.encoding.served_contexts import Context, Piece, Rendered, cut_answers, render_rows
from sft_recipes.encoding.tokenizer_backend import encode_batch, without_dummy_prefix
from sft_recipes.encoding.trained_spans import choose_answers
from sft_recipes.errors import ConfigError, DataError

IGNORE_INDEX = -100  # the label of a token without loss, torch.nn.CrossEntropyLoss's default
TOKEN_START, TOKEN_END = mark_control_tokens("x", re.compile("x")).split("x")  # the marks around a control token
UNMARKED = str.maketrans("", "", TOKEN_START + TOKEN_END)
TRAIN_ON = ("assistant", "last", "all")


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
        self.has_markers = "endgeneration" in chat_template
        self.markers_suffice = self.has_markers and is_stable(tokenizer, chat_template, self.answers)
        self.stop, self.stop_ids = self.answers.stops[0], tokenizer.convert_tokens_to_ids(list(self.answers.stops))
        self.special = special_tokens(tokenizer)
        self.typed = re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) or "(?!)")
        self.openings = sorted({token[:2] for token in self.special})  # two finds are faster than one big pattern
        self.inner = without_dummy_prefix(tokenizer.backend_tokenizer)

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
        return self.tokenized([context.pieces for context in contexts])

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

    def contexts(
        self, conversation: Mapping[str, Any], train_on: str = "assistant", unroll: str = "auto"
    ) -> list[Context]:
        """The rows that a conversation becomes, cut into pieces: one, or with `unroll` one for each answer that the
        whole conversation shows in another context than serving would.

        Raises DataError where the template refuses it.
        """
        if train_on not in TRAIN_ON:
            raise ConfigError(f"train_on should be {', '.join(TRAIN_ON)}, not {train_on!r}.")
        row = conversation.get("train") is not False
        if "text" in conversation:
            check_unicode(conversation["text"])
            return [Context(conversation, [("raw", conversation["text"], row)], [], conversation["text"])]
        given = [conversation["messages"], conversation.get("tools"), conversation.get("chat_template_kwargs") or {}]
        marked = any(map(self.has_typed_token, iterate_strings(given)))
        if marked:
            if any("train_detail" in message for message in given[0]):
                raise DataError("it spells out a special token, and an answer is trained in part: one has to go")
            given = mark_control_tokens(given, self.typed)
        if not row:
            train_on, given[0] = "assistant", [message | {"train": False} for message in given[0]]
        if self.markers_suffice or (self.has_markers and unroll == "keep"):
            rows = [Rendered(given[0], *self.render(*given), given[2])]
            whole = rows[0].text
        else:
            rows, whole = render_rows(self.render, self.answers, *given, train_on, unroll)
        check_unicode(whole)
        whole = whole.translate(UNMARKED) if marked else whole
        return [
            self.to_context(conversation, each, train_on, marked, whole, unrolled=each is not rows[-1]) for each in rows
        ]

    def to_context(
        self, conversation: Mapping[str, Any], row: Rendered, train_on: str, marked: bool, whole: str, unrolled: bool
    ) -> Context:
        """One rendered row of a conversation, whose rows are `whole` together."""
        parts, answers, notes = cut_answers(row, self.answers, train_on, self.train_empty_thoughts)
        befores = ["", *(part for part, _ in parts)]
        pieces = [
            (self.method(before, marked), part, loss) for before, (part, loss) in zip(befores, parts, strict=False)
        ]
        notes |= row.notes | {"unrolled"} if unrolled else row.notes
        given = conversation.get("chat_template_kwargs") or {}
        if len(row.messages) < len(conversation["messages"]) or row.settings.keys() != given.keys():
            messages = conversation["messages"][: len(row.messages)]
            conversation = {**conversation, "messages": messages, "chat_template_kwargs": {**row.settings, **given}}
        chosen = choose_answers(row.messages, train_on)
        thinks = any(has_thoughts(row.messages[index]) for index, trained in chosen.items() if trained)
        return Context(conversation, pieces, answers, whole, frozenset(notes), thinks)

    def method(self, before: str, marked: bool) -> str:
        """How a piece is encoded: at the `start` of a text, `inside` it, `after` a special token, with typed ones."""
        anchor = self.stop if before.endswith(self.stop) else next(filter(before.endswith, self.special), "")
        place = "start" if not before else f"after {anchor}" if anchor else "inside"
        return f"marked {place}" if marked else place

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Any = None,
        chat_template_kwargs: Any = None,
        prompt: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The conversation's text, and the character spans that the template marks as the assistant's."""
        return render_template(self.tokenizer, self.chat_template, messages, tools, chat_template_kwargs, prompt)

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
