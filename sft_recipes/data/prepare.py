"""Sources become what the trainer gets, token ids and labels: load, hold out, format, encode, mix."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from sft_recipes.config.options import Source
from sft_recipes.config.schema import Config
from sft_recipes.curation.leaks import hold_out_groups
from sft_recipes.data.audit import (
    check_rows,
    check_train_serve_parity,
    count_faults,
    count_rows,
    drop_field_names,
    log_issues,
    row_hashes,
)
from sft_recipes.data.curate_sources import LeakTest, Rows, SourceRows, find_source_leaks, read_words, remove_rows
from sft_recipes.data.fields import RowFields
from sft_recipes.data.formatters import Conversation
from sft_recipes.data.issues import FIELD_COLUMNS, ISSUE_BIT, find_issues
from sft_recipes.data.long_rows import apply_max_length_policy
from sft_recipes.data.mixing import mix_rows
from sft_recipes.data.raw_rows import Record
from sft_recipes.data.reading import Fault
from sft_recipes.data.sources import find_formatter, load_rows, source_fingerprint
from sft_recipes.data.sweep_cache import cache_key, cached
from sft_recipes.data.token_rows import TrainingData, flat_values, take_rows, to_dataset
from sft_recipes.encoding.encoder import Encoder, Piece, iterate_strings
from sft_recipes.errors import ConfigError, DataError

log = logging.getLogger(__name__)
ENCODE_BATCH_ROWS = 1000  # rows that are formatted and encoded at once
PARITY_ROWS = 50  # rows a source whose prompts are compared with what serving would show
SMOKE_ROWS, SMOKE_HELD_OUT = 200, 20  # rows a source gives under +debug=smoke, and at most so many of them held out


def load_data(config: Config, encoder: Encoder, max_length: int | None) -> TrainingData:
    """What `prepare_data` gives, mixed; the jobs of a sweep that share it, and run in one process, prepare it once."""
    data = cached(cache_key(config, encoder, max_length), lambda: prepare_data(config, encoder, max_length))
    return mix_rows(config, data)


def prepare_data(config: Config, encoder: Encoder, max_length: int | None) -> TrainingData:
    """All rows that can be trained on, source after source, those that are held out, and the audit of both.

    Raises DataError, naming source, row and field, for rows that cannot be trained on, and ConfigError where the saved
    tokenizer would serve another prompt than the one trained on.
    """
    long_rows = "keep" if config.smoke else config.data.max_length_policy
    opened = {name: open_source(name, config) for name in config.sources}
    opened, removed, curation = remove_rows(config, opened, partial(count_text, encoder.tokenizer))
    is_leak = find_source_leaks(config, opened.values())
    parts = {name: read_source(name, config, encoder, rows, is_leak) for name, rows in opened.items()}
    held_out = concatenate_datasets([part.held_out for part in parts.values()])
    out, seen, train, left_out = row_hashes(held_out), set(), [], []
    for name, part in parts.items():
        rows, kept, issues = check_rows(name, part.train, config, max_length, long_rows, out, seen)
        gone = np.isin(flat_values(rows, "row"), flat_values(kept, "row"), invert=True)
        left_out.append(take_rows(drop_field_names(rows), np.flatnonzero(gone)))
        part.audit["problems"] |= removed[name]
        count_rows(part.audit, name, kept, issues)
        train.append(kept)
    if not any(map(len, train)) and any(source.split for source in config.sources.values()):
        raise DataError("data: no row is left to train on.")
    held_out, cut = apply_max_length_policy("held_out", held_out, max_length, "keep" if long_rows == "keep" else "drop")
    log_issues("held_out", cut)
    return TrainingData(
        concatenate_datasets(train),
        held_out,
        [question for part in parts.values() for question in part.questions],
        {name: part.audit for name, part in parts.items()},
        concatenate_datasets(left_out),
        curation,
        [example for part in parts.values() for example in part.examples],
    )


def count_text(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    """How many tokens a text has."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def open_source(name: str, config: Config) -> SourceRows:
    """One source's rows, those that are held out set apart before anything else touches them."""
    source, where = config.sources[name], f"data.{name}"
    rows = out_rows = load_rows(where, source, source.split or source.held_out_split)
    formatter = find_formatter(name, source, config.formatter, rows.columns)
    chosen = choose_rows(where, source, rows, config)
    if source.split is None:
        trained, out = chosen[:0], chosen
    elif source.held_out_split:
        out_rows = load_rows(where, source, source.held_out_split)
        trained, out = chosen, np.arange(len(out_rows))
    else:
        out = chosen[hold_out(where, rows, formatter, chosen, source.held_out, config)]
        trained = np.setdiff1d(chosen, out)
    return SourceRows(rows, out_rows, formatter, trained, out)


def read_source(
    name: str, config: Config, encoder: Encoder, opened: SourceRows, is_leak: LeakTest | None
) -> TrainingData:
    """One source's rows as token ids, with `leak` among the issues of those to train on."""
    source, where, trained, out = config.sources[name], f"data.{name}", opened.trained, opened.out
    every, records = max(1, len(trained) // PARITY_ROWS), opened.rows.records(trained)
    train, some, faults = encode_rows(name, config, opened.formatter, encoder, records, len(trained), every, is_leak)
    records = opened.out_rows.records(out)
    held_out, talks, more = encode_rows(name, config, opened.formatter, encoder, records, len(out), every=1)
    unusable = count_faults(where, source.on_error, faults + more, len(trained) + len(out))
    check_train_serve_parity(encoder, some)
    audit = {"fingerprint": source_fingerprint(where, source, opened.rows), "parity": len(some)}
    audit |= {"rows": len(trained), "held_out": len(held_out), "problems": unusable}
    questions = [talk for talk in talks if "messages" in talk]
    return TrainingData(train, drop_field_names(held_out), questions, audit, examples=some)


def choose_rows(where: str, source: Source, rows: Rows, config: Config) -> np.ndarray:
    """The numbers of the rows that are used: all of a source, unless it says how many, or the run is a smoke test."""
    chosen = np.arange(len(rows))
    if source.rows and source.rows > len(rows):
        log.warning("%s.rows=%d: there are %d rows, and all of them are used.", where, source.rows, len(rows))
    elif source.rows and source.sample_by == "length":
        chosen = draw_by_length(rows, chosen, source.rows, config.seed)
    elif source.rows:
        chosen = np.sort(np.random.default_rng(config.seed).permutation(len(rows))[: source.rows])
    return chosen[:SMOKE_ROWS] if config.smoke else chosen


def hold_out(
    where: str, rows: Rows, formatter: Callable | None, chosen: np.ndarray, wanted: float, config: Config
) -> np.ndarray:
    """The places within `chosen` of the rows that are held out: so many, or a share, and near-duplicates together."""
    wanted, leaks = min(wanted, SMOKE_HELD_OUT) if config.smoke else wanted, config.curation.leaks
    number = round(len(chosen) * wanted) if wanted < 1 else int(wanted)
    if wanted > 1 and number != wanted:
        raise ConfigError(f"{where}.held_out should be a share below 1 or a whole number of rows, not {wanted}.")
    if not 0 <= number < max(len(chosen), 1):
        raise ConfigError(f"{where}.held_out={wanted} leaves none of {len(chosen)} rows to train on.")
    if config.data.held_out_by_length:
        drawn = draw_by_length(rows, chosen, number, config.seed)
    else:
        drawn = np.random.default_rng(config.seed).permutation(len(chosen))[:number]
    if leaks is None or not number:
        return np.sort(drawn)

    def read_texts(places: Iterable[int]) -> Iterator[list[str]]:
        return read_words(rows, formatter, chosen[list(places)])

    out = hold_out_groups(drawn, len(chosen), read_texts, leaks.threshold)
    if not len(out):
        raise ConfigError(
            f"{where}: no {number} rows can be held out, since each is a near-duplicate (at {leaks.threshold:g}) of "
            "rows that would be trained on. Write a larger data.held_out, data.held_out=0, or curation=none."
        )
    if len(out) < number:
        log.warning(
            "%s: %d rows are held out, not %d: near-duplicates stay together, larger groups of them in training.",
            where, len(out), number,
        )  # fmt: skip
    return out


def draw_by_length(rows: Rows, chosen: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Places within `chosen`, one drawn from each of `number` equal parts of the rows sorted by their characters."""
    random = np.random.default_rng(seed)
    length = np.array([sum(map(len, iterate_strings(row))) for _, row, _ in rows.records(chosen)])
    order = np.lexsort((random.permutation(len(chosen)), length))
    return np.sort([random.choice(part) for part in np.array_split(order, number)]) if number else np.zeros(0, int)


def encode_rows(
    name: str,
    config: Config,
    formatter: Callable,
    encoder: Encoder,
    records: Iterable[Record],
    total: int,
    every: int,
    is_leak: LeakTest | None = None,
) -> tuple[Dataset, list[Conversation], list[tuple[int, str]]]:
    """The records as token ids and labels, one in `every` as a conversation, and the numbers and faults of the rest.

    Beside `input_ids` and `labels` stand `source`, its index; `row`, the number in its split; `piece`, which a raw text
    is cut into, and for a conversation -1, or -2, -3 … for further rows that it became; `problems`, a bit for each
    issue; and the columns of FIELD_COLUMNS.
    """
    source, records = config.sources[name], iter(records)
    columns = {"input_ids": [], "labels": []}
    batches, some, numbers, pieces, faults = [], [], [], [], []
    names: dict[str, list[str]] = {column: [] for column in FIELD_COLUMNS.values()}
    problems, fields = [np.zeros(0, dtype=np.int64)], RowFields(formatter) if formatter else None

    def rendered() -> Iterator[list[list[Piece]]]:
        while batch := list(islice(records, ENCODE_BATCH_ROWS)):
            contexts, given = [], []
            for number, row, place in batch:
                try:
                    if isinstance(row, Fault):
                        raise DataError(row)
                    conversation = with_settings(formatter(row), source.chat_template_kwargs)
                    for part, context in enumerate(encoder.contexts(conversation, source.train_on, source.unroll)):
                        contexts.append(context)
                        given.append(row)
                        numbers.append(number)
                        pieces.append(-1 - part if "messages" in conversation else 0)
                except DataError as error:
                    faults.append((number, f"row {number}{place and f' ({place})'}: {error}"))
                except ConfigError as error:  # of the template, which would not come to an end with the others either
                    raise ConfigError(f"data.{name}, row {number}{place and f' ({place})'}: {error}") from error
            bar.update(len(batch))
            if contexts:
                batches.append((given, contexts))
                yield [context.pieces for context in contexts]

    with tqdm(total=total, desc=f"Encoding {name}", unit=" rows", disable=total < 5 * ENCODE_BATCH_ROWS) as bar:
        for encoded in encoder.encode_batches(rendered()):
            given, contexts = batches.pop(0)
            for key, rows in columns.items():
                rows += encoded[key]
            talks = [context.conversation for context in contexts]
            some += talks[::every]
            found, fresh = find_issues(encoder, fields, given, contexts, encoded, source.train_on)
            if is_leak:
                found |= ISSUE_BIT["leak"] * np.array([is_leak(talk) for talk in talks], dtype=np.int64)
            problems.append(found)
            for column, values in fresh.items():
                names[column] += values
    index = list(config.sources).index(name)
    origin = {"source": [index] * len(numbers), "row": numbers, "piece": pieces, "problems": np.concatenate(problems)}
    return to_dataset(columns, origin, names), some, faults


def with_settings(conversation: Conversation, settings: Mapping[str, Any]) -> Conversation:
    """The conversation with a source's settings of the template, over which its own win."""
    if not settings or "text" in conversation:
        return conversation
    return conversation | {"chat_template_kwargs": {**settings, **conversation.get("chat_template_kwargs", {})}}
