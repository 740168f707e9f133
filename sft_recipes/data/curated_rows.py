"""What curation is given of the sources, and what becomes of its findings: held-out groups, leaks, removed rows."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sft_recipes.config.options import Source
from sft_recipes.config.schema import Config
from sft_recipes.config.validation import call_validated
from sft_recipes.curation.leaks import LeakIndex, hold_out_groups
from sft_recipes.curation.words import TEMPLATE_SAMPLE, find_template, join_messages, split_words
from sft_recipes.data.formatters import Conversation
from sft_recipes.data.raw_rows import ArrowRows, FileRows
from sft_recipes.data.reading import Fault
from sft_recipes.data.sources import BUILDERS, find_ending, find_formatter, load_rows
from sft_recipes.errors import ConfigError, DataError

log = logging.getLogger(__name__)
QUESTION_COLUMNS = ("question", "prompt", "instruction", "problem", "input", "text")  # of a benchmark, the first it has
Rows = FileRows | ArrowRows


@dataclass(frozen=True)
class SourceRows:
    """One source as it is read: the numbers of the rows to train on, and of those held out."""

    rows: Rows
    out_rows: Rows  # which the held-out rows' numbers are of
    formatter: Callable | None
    trained: np.ndarray
    out: np.ndarray


def read_conversations(
    rows: Rows, formatter: Callable | None, numbers: Iterable[int]
) -> Iterator[tuple[int, Conversation]]:
    """The number and the conversation of every row that can be read; the others are counted where rows are encoded."""
    for number, row, _ in rows.records(numbers):
        try:
            if not isinstance(row, Fault) and formatter:
                yield number, formatter(row)
        except DataError:
            continue


def read_words(rows: Rows, formatter: Callable | None, numbers: Sequence[int]) -> Iterator[list[str]]:
    """The words of each of these rows, none of a row that cannot be read."""
    position = 0
    for number, conversation in read_conversations(rows, formatter, numbers):
        while numbers[position] != number:
            yield []
            position += 1
        yield split_words(join_messages(conversation))
        position += 1
    yield from ([] for _ in range(position, len(numbers)))


def hold_out_with_twins(
    where: str, config: Config, rows: Rows, formatter: Callable | None, chosen: np.ndarray, drawn: np.ndarray
) -> np.ndarray:
    """The places within `chosen` of the rows to hold out: `drawn`, but near-duplicates are held out together."""
    if config.curation.leaks is None or not len(drawn):
        return np.sort(drawn)
    threshold, number = config.curation.leaks.threshold, len(drawn)
    out = hold_out_groups(
        drawn, number, len(chosen), lambda places: read_words(rows, formatter, chosen[list(places)]), threshold
    )
    if not len(out):
        raise ConfigError(
            f"{where}: no {number} rows can be held out, since each is a near-duplicate (at {threshold:g}) of rows "
            "that would be trained on. Write a larger data.held_out, data.held_out=0, or curation=none."
        )
    if len(out) < number:
        log.warning(
            "%s: %d rows are held out, not %d: near-duplicates stay together, larger groups of them in training.",
            where, len(out), number,
        )  # fmt: skip
    return out


class LeakFinder:
    """Whether conversations to train on give away held-out rows, or the questions of `curation.decontaminate`."""

    def __init__(self, config: Config, held_out: Iterable[list[str]], template: frozenset[int]):
        options = config.curation.leaks
        how = {"threshold": options.threshold, "window": options.window, "coverage": options.coverage}
        self.rows = LeakIndex(held_out, **how, template=template)
        questions = [
            split_words(join_messages(question, "user"))
            for asked in config.curation.decontaminate
            for question in read_questions(f"curation.decontaminate={asked}", asked)
        ]
        self.questions = LeakIndex(questions, **how, template=template) if questions else None

    @classmethod
    def of_sources(cls, config: Config, sources: Iterable[SourceRows]) -> "LeakFinder | None":
        """For the held-out rows of all sources; None where leaks are not looked for."""
        if config.curation.leaks is None:
            return None
        held_out, template = [], frozenset()
        for source in sources:
            held_out += read_words(source.out_rows, source.formatter, source.out)
            sample = source.trained[:: max(1, len(source.trained) // TEMPLATE_SAMPLE)]
            template |= find_template(list(read_words(source.rows, source.formatter, sample)))
        return cls(config, held_out, template)

    @classmethod
    def of_conversations(cls, config: Config, held_out: Iterable[Conversation]) -> "LeakFinder | None":
        """For the held-out conversations of a stream; None where leaks are not looked for."""
        if config.curation.leaks is None:
            return None
        words = [split_words(join_messages(conversation)) for conversation in held_out]
        return cls(config, words, find_template(words))

    def find_leaks(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """One bool a conversation."""
        return np.array([self.is_leak(conversation) for conversation in conversations], dtype=bool)

    def is_leak(self, conversation: Conversation) -> bool:
        """Whether a held-out row is like this conversation, or a foreign question like its questions."""
        if self.rows.find_leak(split_words(join_messages(conversation))) is not None:
            return True
        asked = split_words(join_messages(conversation, "user")) if self.questions else []
        return bool(asked) and self.questions.find_leak(asked) is not None


def read_questions(where: str, asked: str | Mapping[str, Any]) -> Iterator[Conversation]:
    """What each row of a file or dataset asks: its messages before the last answer, or its first column for a question.

    A mapping has the keys of a source in `data`; a text is a file, or the name of a dataset or folder.
    """
    if isinstance(asked, str):
        asked = {"data_files" if find_ending(asked) in BUILDERS else "path": asked}
    source = call_validated(Source, asked, where)
    rows = load_rows(where, source, source.split)
    try:
        formatter = find_formatter(where, source, {"name": "auto"}, rows.columns)
    except DataError:
        formatter = None
    for _, row, _ in rows.records(range(len(rows))):
        if isinstance(row, Fault):
            continue
        try:
            messages = formatter(row).get("messages", []) if formatter else []
        except DataError:
            messages = []
        last = max((place for place, message in enumerate(messages) if message["role"] == "user"), default=-1)
        if last < 0:
            column = next((name for name in QUESTION_COLUMNS if isinstance(row.get(name), str)), None)
            if column is None:
                known = ", ".join(QUESTION_COLUMNS)
                raise ConfigError(f"{where}: no question was found in a row; one of its columns should be {known}.")
            more = row.get("input") if column == "instruction" else None
            messages = [{"role": "user", "content": "\n\n".join([row[column], *([more] if more else [])])}]
        yield {"messages": list(messages[: last + 1] or messages)}
