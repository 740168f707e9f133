"""What curation is given of the sources, and what becomes of its findings: held-out groups, leaks, removed rows."""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
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
LeakTest = Callable[[Conversation], bool]


@dataclass(frozen=True)
class SourceRows:
    """One source as it is read: the numbers of the rows to train on, and of those held out."""

    rows: Rows
    out_rows: Rows  # which the held-out rows' numbers are of
    formatter: Callable | None
    trained: np.ndarray
    out: np.ndarray


def read_conversations(rows: Rows, formatter: Callable | None, numbers: Iterable[int]) -> Iterator[Conversation | None]:
    """The conversation of each of these rows; None for one that cannot be read, counted where rows are encoded."""
    for _, row, _ in rows.records(numbers):
        try:
            yield formatter(row) if formatter and not isinstance(row, Fault) else None
        except DataError:
            yield None


def read_words(rows: Rows, formatter: Callable | None, numbers: Iterable[int]) -> Iterator[list[str]]:
    """The words of each of these rows, none of a row that cannot be read."""
    for talk in read_conversations(rows, formatter, numbers):
        yield split_words(join_messages(talk)) if talk else []


def hold_out_with_twins(
    where: str, config: Config, rows: Rows, formatter: Callable | None, chosen: np.ndarray, drawn: np.ndarray
) -> np.ndarray:
    """The places within `chosen` of the rows to hold out: `drawn`, but near-duplicates are held out together."""
    if config.curation.leaks is None or not len(drawn):
        return np.sort(drawn)
    threshold, number = config.curation.leaks.threshold, len(drawn)
    read_texts = lambda places: read_words(rows, formatter, chosen[list(places)])  # noqa: E731
    out = hold_out_groups(drawn, len(chosen), read_texts, threshold)
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


def find_source_leaks(config: Config, sources: Collection[SourceRows]) -> LeakTest | None:
    """`build_leak_test` for the held-out rows of all sources, each of which may have a template of its own."""
    held_out = (words for each in sources for words in read_words(each.out_rows, each.formatter, each.out))
    some = ((each, each.trained[:: max(1, len(each.trained) // TEMPLATE_SAMPLE)]) for each in sources)
    samples = (list(read_words(each.rows, each.formatter, numbers)) for each, numbers in some)
    return build_leak_test(config, held_out, samples)


def build_leak_test(
    config: Config, held_out: Iterable[list[str]], samples: Iterable[list[list[str]]]
) -> LeakTest | None:
    """Whether a conversation gives away held-out rows or questions of `curation.decontaminate`; None where neither is
    looked for. What repeats in one of the `samples` of rows is no sign of a leak.
    """
    if config.curation.leaks is None:
        return None
    how = asdict(config.curation.leaks) | {"template": frozenset().union(*map(find_template, samples))}
    questions = [
        split_words(join_messages(question, "user"))
        for asked in config.curation.decontaminate
        for question in read_questions(f"curation.decontaminate={asked}", asked)
    ]
    indexes = [(LeakIndex(held_out, **how), ())] + ([(LeakIndex(questions, **how), ("user",))] if questions else [])

    def is_leak(conversation: Conversation) -> bool:
        return any(index.find_leak(split_words(join_messages(conversation, *of))) is not None for index, of in indexes)

    return is_leak


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
    numbers = range(len(rows))
    for (_, row, _), talk in zip(rows.records(numbers), read_conversations(rows, formatter, numbers), strict=True):
        if isinstance(row, Fault):
            continue
        messages = (talk or {}).get("messages", [])
        last = max((place for place, message in enumerate(messages) if message["role"] == "user"), default=-1)
        if last < 0:
            column = next((name for name in QUESTION_COLUMNS if isinstance(row.get(name), str)), None)
            if column is None:
                known = ", ".join(QUESTION_COLUMNS)
                raise ConfigError(f"{where}: no question was found in a row; one of its columns should be {known}.")
            more = row.get("input") if column == "instruction" else None
            messages = [{"role": "user", "content": "\n\n".join([row[column], *([more] if more else [])])}]
        yield {"messages": list(messages[: last + 1] or messages)}
