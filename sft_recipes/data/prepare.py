"""Sources become what the trainer gets, token ids and labels: load, hold out, format, encode, mix."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from sft_recipes.config.schema import Config
from sft_recipes.data.audit import (
    check_rows,
    check_train_serve_parity,
    count_faults,
    count_rows,
    log_issues,
    row_hashes,
)
from sft_recipes.data.choice import choose_rows, hold_out
from sft_recipes.data.curate_sources import LeakTest, SourceRows, find_source_leaks, remove_rows
from sft_recipes.data.digest import digest_rows
from sft_recipes.data.fields import RowFields
from sft_recipes.data.formatters import Conversation
from sft_recipes.data.issues import ISSUE_BIT, find_issues
from sft_recipes.data.long_rows import apply_max_length_policy
from sft_recipes.data.mixing import mix_rows
from sft_recipes.data.packing import pack_rows
from sft_recipes.data.raw_rows import Record
from sft_recipes.data.reading import Fault
from sft_recipes.data.row_cache import cache_key, cache_root, cached, first_of_node, hash_values
from sft_recipes.data.sources import find_formatter, load_rows, source_fingerprint
from sft_recipes.data.token_rows import ORIGIN, TrainingData, flat_values, join_tables, take_rows, to_table
from sft_recipes.encoding.encoder import Encoder, Piece
from sft_recipes.errors import ConfigError, DataError

log = logging.getLogger(__name__)
ENCODE_BATCH_ROWS = 1000  # rows that are formatted and encoded at once
PARITY_ROWS = 50  # rows a source whose prompts are compared with what serving would show


def load_data(config: Config, encoder: Encoder, max_length: int | None, packing: bool = False) -> TrainingData:
    """All rows that can be trained on, source after source, mixed, where it is asked for packed, and digested; those
    that are held out; and the audit of both.

    Runs and jobs that share rows encode them once, those that share what is done with them then do that once; and so do
    the processes of one node. Raises DataError, naming source, row and field, for rows that cannot be trained on, and
    ConfigError where the saved tokenizer would serve another prompt than the one trained on.
    """

    def find_or_make() -> TrainingData:
        key = cache_key(config, encoder)
        if key is None:
            return finish(encode())
        shares = [source.share for source in config.sources.values()]
        later = [max_length, config.data.max_length_policy, asdict(config.data_checks), asdict(config.mix), shares]
        return cached(hash_values([key, *later, packing]), lambda: finish(cached(key, encode, logging.DEBUG)))

    def encode() -> TrainingData:
        return encode_sources(config, encoder)

    def finish(data: TrainingData) -> TrainingData:
        data = mix_rows(config, check_sources(config, data, max_length))
        packed = pack_rows(data.train, max_length, config.seed) if packing and len(data.train) else None
        return replace(data, packed=packed, digest=digest_rows(packed or data.train))

    return first_of_node(find_or_make) if config.data.cache and cache_root() else finish(encode())


def encode_sources(config: Config, encoder: Encoder) -> TrainingData:
    """All rows as token ids, of whatever length, with the issues that each has by itself."""
    opened = {name: open_source(name, config) for name in config.sources}
    opened, removed, curation = remove_rows(config, opened, partial(count_text, encoder.tokenizer))
    is_leak = find_source_leaks(config, opened.values())
    parts = {name: read_source(name, config, encoder, rows, is_leak) for name, rows in opened.items()}
    for name, part in parts.items():
        part.audit["problems"] |= removed[name]
    return TrainingData(
        concatenate_datasets([part.train for part in parts.values()]),
        concatenate_datasets([part.held_out for part in parts.values()]),
        [question for part in parts.values() for question in part.questions],
        {name: part.audit for name, part in parts.items()},
        curation=curation,
        examples=[example for part in parts.values() for example in part.examples],
    )


def check_sources(config: Config, data: TrainingData, max_length: int | None) -> TrainingData:
    """The rows that the policies for issues and lengths keep, the others in `left_out`, all of them in the audit."""
    long_rows = "keep" if config.smoke else config.data.max_length_policy
    out, seen, train, left_out = row_hashes(data.held_out), set(), [], []
    ends = np.searchsorted(flat_values(data.train, "source"), range(len(data.audit) + 1))
    for (name, audit), start, end in zip(data.audit.items(), ends[:-1], ends[1:], strict=True):
        part = data.train.select(range(start, end))
        rows, kept, issues = check_rows(name, part, config, max_length, long_rows, out, seen)
        gone = np.isin(flat_values(rows, "row"), flat_values(kept, "row"), invert=True)
        left_out.append(take_rows(rows.remove_columns("fields"), np.flatnonzero(gone)))
        count_rows(audit, name, kept, issues)
        train.append(kept)
    if not any(map(len, train)) and any(source.split for source in config.sources.values()):
        raise DataError("data: no row is left to train on.")
    policy = "keep" if long_rows == "keep" else "drop"
    held_out, cut = apply_max_length_policy("held_out", data.held_out, max_length, policy)
    log_issues("held_out", cut)
    train, left_out = concatenate_datasets(train), concatenate_datasets(left_out)
    return replace(data, train=train, held_out=held_out, left_out=left_out)


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
    return TrainingData(train, held_out.remove_columns("fields"), questions, audit, examples=some)


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
    issue; and `fields`, of which some issues are.
    """
    source, records = config.sources[name], iter(records)
    batches, some, faults, index = [], [], [], list(config.sources).index(name)
    fields = RowFields(formatter) if formatter else None

    def rendered() -> Iterator[list[list[Piece]]]:
        size = ENCODE_BATCH_ROWS // 10  # so that the tokenizer waits little for the first
        while batch := list(islice(records, size)):
            size = ENCODE_BATCH_ROWS // 2  # one half is made while the other is tokenized
            contexts, given, numbers, pieces = [], [], [], []
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
                origin = {"source": [index] * len(numbers), "row": numbers, "piece": pieces}
                batches.append((given, contexts, origin))
                yield [context.pieces for context in contexts]

    def tables() -> Iterator[pyarrow.Table]:
        columns = ("input_ids", "labels")
        yield to_table(*(dict.fromkeys(keys, ()) for keys in (columns, ORIGIN, ["fields"])))
        for encoded in encoder.encode_batches(rendered()):
            given, contexts, origin = batches.pop(0)
            talks = [context.conversation for context in contexts]
            some.extend(talks[::every])
            found, about = find_issues(encoder, fields, given, contexts, encoded, source.train_on)
            if is_leak:
                found |= ISSUE_BIT["leak"] * np.array([is_leak(talk) for talk in talks], dtype=np.int64)
            yield to_table({key: encoded[key] for key in columns}, origin | {"problems": found}, {"fields": about})

    off = {"disable": True} if total < 5 * ENCODE_BATCH_ROWS else {}  # else as TQDM_DISABLE says
    with tqdm(total=total, desc=f"Encoding {name}", unit=" rows", **off) as bar:
        return join_tables(tables()), some, faults


def with_settings(conversation: Conversation, settings: Mapping[str, Any]) -> Conversation:
    """The conversation with a source's settings of the template, over which its own win."""
    if not settings or "text" in conversation:
        return conversation
    return conversation | {"chat_template_kwargs": {**settings, **conversation.get("chat_template_kwargs", {})}}
