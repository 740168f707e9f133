"""Curation of a run's sources: what it is given of them, which rows give held-out ones away, and what it removes."""

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np

from sft_recipes.config.curation_options import CurationOptions, FilterAction
from sft_recipes.config.schema import Config
from sft_recipes.config.validation import call_validated, import_function, validate_kwargs
from sft_recipes.curation.curate import Curation
from sft_recipes.curation.diversity import describe_diversity
from sft_recipes.curation.filters import FILTERS
from sft_recipes.curation.leaks import LeakIndex
from sft_recipes.curation.selection import score_quality
from sft_recipes.curation.words import TEMPLATE_SAMPLE, find_template, join_messages, split_words
from sft_recipes.data.formatters import Conversation
from sft_recipes.data.messages import Message, read_messages
from sft_recipes.data.raw_rows import ArrowRows, FileRows
from sft_recipes.data.reading import Fault
from sft_recipes.data.sources import asked_source, find_formatter, load_rows
from sft_recipes.data.token_rows import audit_entry
from sft_recipes.errors import ConfigError, DataError, did_you_mean

COUNTED_ROWS = 20_000  # at 2 ms each, measured on Alpaca's; more are not counted before a training that removes none
QUESTION_COLUMNS = ("question", "prompt", "instruction", "problem", "input", "text")  # of a benchmark, the first it has
Rows = FileRows | ArrowRows
LeakTest = Callable[[Conversation], bool]
Filter = tuple[Callable[[Conversation], str | None], FilterAction]


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


def find_source_leaks(config: Config, sources: Collection[SourceRows]) -> LeakTest | None:
    """`build_leak_test` for the held-out rows of all sources, each of which may have a template of its own."""
    held_out = (words for each in sources for words in read_words(each.out_rows, each.formatter, each.out))
    some = ((each, each.trained[:: max(1, len(each.trained) // TEMPLATE_SAMPLE)]) for each in sources)
    samples = (list(read_words(each.rows, each.formatter, numbers)) for each, numbers in some)
    return build_leak_test(config, held_out, samples)


def build_leak_test(
    config: Config, held_out: Iterable[list[str]], samples: Iterable[list[list[str]]]
) -> LeakTest | None:
    """Whether a conversation gives away held-out rows or questions of `curation.decontaminate`; None where leaks are
    not looked for. What stands in a fifth of one of the `samples` of rows is their template, and no sign of a leak.
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
    """What each row of a file or dataset asks: its messages before the last answer, or a column for a question, behind
    the row's system prompt."""
    source = asked_source(where, asked)
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
        yield {"messages": list(messages[: last + 1]) or read_unanswered(where, row)}


def read_unanswered(where: str, row: Mapping[str, Any]) -> list[Message]:
    """The question of a row without an answer, which no formatter reads: its messages, or a column."""
    turns = next((name for name in ("messages", "conversations", "prompt") if isinstance(row.get(name), list)), None)
    column = next((name for name in QUESTION_COLUMNS if isinstance(row.get(name), str)), None)
    messages: list[Message] = []
    if turns:
        try:
            messages = read_messages(row[turns], turns)
        except DataError as error:
            raise ConfigError(f"{where}: {error}") from error
    elif column:
        more = row.get("input") if column == "instruction" else None
        texts = [row[column], *([str(more)] if more else [])]
        messages = [{"role": "user", "content": "\n\n".join(texts)}]
    if not any(message["role"] == "user" for message in messages):
        known = ", ".join(("messages", *QUESTION_COLUMNS))
        raise ConfigError(f"{where}: no question was found in a row; one of its columns should be {known}.")
    system = row.get("system") or row.get("system_prompt")
    alone = messages[0]["role"] != "system" and isinstance(system, str) and system.strip()
    return [{"role": "system", "content": system}, *messages] if alone else messages


def curate_sources(
    config: Config, sources: Mapping[str, SourceRows], count: Callable[[str], int], is_leak: LeakTest | None = None
) -> tuple[Curation, dict[str, Any]]:
    """All rows to train on through filters, near-duplicates and selection, and what curation.json holds of it.

    `count` gives a text's length in tokens. Leaks, where they are looked for, are removed first.
    """
    options, origins, talks = config.curation, [], []
    count = cache(count)  # filters, the score and the lengths ask for the same texts
    filters = build_filters(options, count)
    own = options.select.by if options.select else "score"
    score = partial(score_quality, count=count) if own == "score" else import_function("curation.select.by", own)
    for name, source in sources.items():
        read = read_conversations(source.rows, source.formatter, source.trained)
        for number, talk in zip(source.trained.tolist(), read, strict=True):
            if talk:
                origins.append((name, number))
                talks.append(talk)
    curation = Curation(talks, origins, [float(score(talk)) for talk in talks])
    if is_leak:
        found = {place: "it is like a held-out row" for place, talk in enumerate(talks) if is_leak(talk)}
        curation.add("leak", "remove", found)
    curation.apply_filters(filters)
    if options.near_duplicates:
        curation.apply_near_duplicates(**asdict(options.near_duplicates))
    selected = curation.apply_selection(options.select.rows, options.select.spread) if options.select else {}
    kept = [talks[place] for place in curation.remaining()]
    diversity = describe_diversity([talk for talk in kept if "messages" in talk], count)
    record = {"rows": len(talks), "removed": len(curation.reasons), "kept": len(kept), "findings": curation.findings}
    return curation, record | {"selected": selected, "diversity": diversity}


def build_filters(options: CurationOptions, count: Callable[[str], int]) -> dict[str, Filter]:
    """The filters that the config names, with their thresholds; raises ConfigError for those that do not exist."""
    built = {}
    for name, values in options.filters.items():
        where = f"curation.filters.{name}"
        if name not in FILTERS:
            raise ConfigError(f"{where} is no filter.{did_you_mean(name, FILTERS)} Or name your own in own_filters.")
        values = dict(values or {"action": "off"})
        chosen = {key: values.pop(key) for key in ("action", "keep_share") if key in values}
        validate_kwargs(FILTERS[name], {"conversation": {}, **values}, where)
        if "count" in inspect.signature(FILTERS[name]).parameters:
            values["count"] = count
        built[name] = (partial(FILTERS[name], **values), call_validated(FilterAction, chosen, where))
    built |= {
        own: (import_function("curation.own_filters", own), FilterAction("remove")) for own in options.own_filters
    }
    return {name: each for name, each in built.items() if each[1].action not in ("off", False)}


def remove_rows(
    config: Config, sources: Mapping[str, SourceRows], count: Callable[[str], int]
) -> tuple[dict[str, SourceRows], dict[str, dict[str, Any]], dict[str, Any] | None]:
    """The sources without the rows that `curation` removes, by source the audit's entries for them, and the record.

    Where curation removes nothing it counts; more than COUNTED_ROWS are left to mode=curate, and there is no record.
    """
    options, rows = config.curation, sum(len(source.trained) for source in sources.values())
    audit: dict[str, dict[str, Any]] = {name: {} for name in sources}
    counts = bool(options.near_duplicates or options.filters) and 0 < rows <= COUNTED_ROWS
    if not options.removes_rows and not counts:
        return dict(sources), audit, None
    curation, record = curate_sources(config, sources, count)
    if not options.removes_rows:
        return dict(sources), audit, record
    left = {}
    for name, source in sources.items():
        mine = {place: number for place, (origin, number) in enumerate(curation.origins) if origin == name}
        gone = [number for place, number in mine.items() if place in curation.reasons]
        left[name] = replace(source, trained=np.setdiff1d(source.trained, gone))
        for label, places in curation.places.items():
            numbers = [mine[place] for place in places if place in mine]
            policy = "drop" if curation.findings[label]["action"] == "remove" else "keep"
            if numbers:
                audit[name][f"curation_{label}"] = audit_entry(numbers, policy)
    return left, audit, record
