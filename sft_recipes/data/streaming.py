"""Rows that are read, encoded and packed while training goes on, with the audit and digest that other rows have."""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from itertools import chain, count, islice
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, LargeList, Value, concatenate_datasets

from sft_recipes.config.schema import Config
from sft_recipes.curation.words import join_messages, split_words
from sft_recipes.data.audit import (
    check_rows,
    check_train_serve_parity,
    count_faults,
    count_rows,
    log_issues,
    row_hashes,
)
from sft_recipes.data.curate_sources import LeakTest, build_leak_test
from sft_recipes.data.digest import DIGEST_COLUMNS, TokenDigest
from sft_recipes.data.formatters import Conversation
from sft_recipes.data.long_rows import apply_max_length_policy
from sft_recipes.data.mixing import UNITS, StreamMixture, describe_mixture
from sft_recipes.data.packing import pack_lengths, split_by_fill
from sft_recipes.data.prepare import ENCODE_BATCH_ROWS, PARITY_ROWS, encode_rows
from sft_recipes.data.raw_rows import Record
from sft_recipes.data.reading import Fault
from sft_recipes.data.sources import find_formatter, source_fingerprint, stream_rows
from sft_recipes.data.token_rows import ORIGIN, TrainingData, flat_values, row_arrays, to_dataset
from sft_recipes.encoding.encoder import IGNORE_INDEX, Encoder
from sft_recipes.errors import ConfigError, DataError, plural

log = logging.getLogger(__name__)
# Rows that are shuffled and packed together; 1,000 fill rows of 2,048 tokens as well (99.5 to 99.9 %), but mix less
BUFFER_ROWS = 5000
GIVE_UP_ROWS = 20_000  # rows without one to train on, after which a stream is given up
Document = tuple[np.ndarray, np.ndarray, *tuple[int, ...]]  # ids, labels, and the columns of ORIGIN
RAW_PIECE = 2 + ORIGIN.index("piece")  # which piece of a raw text a document is, -1 for a conversation


def load_stream(
    config: Config, encoder: Encoder, max_length: int | None, packing: bool
) -> tuple[TrainingData, "RowStream"]:
    """The first rows of the sources, read once to be looked at before any weights are, and the stream to train on."""
    if config.curation.removes_rows:
        raise ConfigError("curation: a stream is read once. Write mode=curate first, and train on its curated.jsonl.")
    if config.mix.total:
        raise ConfigError("mix.total: a stream has no end, trainer.max_steps says how long it is. Leave it out.")
    stream = RowStream(config, encoder, max_length, packing)
    ids, labels, *origin = zip(*islice(stream.mixed(), BUFFER_ROWS), strict=True)
    stream.record_mixture()
    first = to_dataset({"input_ids": ids, "labels": labels}, dict(zip(ORIGIN, origin, strict=True)))
    data = TrainingData(first, stream.held_out, stream.questions, stream.read)
    stream.begin()
    log.info("Streaming: the table counts the first rows; supervision.json will count all that training has read.")
    return data, stream


class RowStream:
    """The sources as one stream of rows for the trainer: `input_ids`, `labels`, where they are packed `seq_lengths`.

    Each pass takes the sources by their shares, see `mixed`. Rows are shuffled and packed within a buffer of 5,000,
    and while one is given out a thread makes the next. `read` counts what the first pass has read, `audit` the same up
    to the buffer that is given out, and `digest` takes in every row that was given out.
    """

    def __init__(self, config: Config, encoder: Encoder, max_length: int | None, packing: bool):
        self.config, self.max_length, self.packing = config, max_length, packing
        self.encoder = deepcopy(encoder)  # a tokenizer has modes, which the evaluation beside the thread sets, too
        self.sources = config.sources
        self.formatters: dict[str, Callable] = {}
        held_out = {name: self.hold_out(name) for name in self.sources}
        self.unread = {  # the audit before a row is read
            name: {"fingerprint": source_fingerprint(f"data.{name}", self.sources[name], None)}
            | {"held_out": len(rows), "parity": 0, "rows": 0}
            for name, (rows, _) in held_out.items()
        }
        self.held_out = concatenate_datasets([rows for rows, _ in held_out.values()])
        self.questions = [question for _, questions in held_out.values() for question in questions]
        self.out = row_hashes(self.held_out)
        words = [split_words(join_messages(question)) for question in self.questions]
        self.is_leak = build_leak_test(config, words, [words])
        self.passes = 0
        self.begin()

    def begin(self) -> None:
        """Nothing is read yet, or what was read to be looked at does not count."""
        self.counts, self.read = True, {name: entry | {"problems": {}} for name, entry in self.unread.items()}
        self.audit, self.digest = deepcopy(self.read), TokenDigest()

    def hold_out(self, name: str) -> tuple[Dataset, list[Conversation]]:
        """The first rows of a source, which training skips, or those of its held-out split."""
        source, wanted = self.sources[name], self.sources[name].held_out
        if source.rows:
            raise ConfigError(f"data.{name}.rows={source.rows}: a stream has no end to draw from. Leave it out.")
        if not source.held_out_split and (wanted < 0 or wanted != int(wanted)):
            raise ConfigError(
                f"data.{name}.held_out={wanted}: a stream has no length to take a share of. Write rows, or 0."
            )
        number = None if source.held_out_split and wanted < 1 else int(wanted)
        records = stream_rows(f"data.{name}", source, source.held_out_split or source.split)
        rows, talks, _ = self.encoded(name, list(islice(records, number)), every=1, total=number)
        check_train_serve_parity(self.encoder, talks[:: max(1, len(talks) // PARITY_ROWS)])
        rows, cut = apply_max_length_policy(name, rows.remove_columns("fields"), self.max_length, "drop")
        log_issues("held_out", cut)
        return rows, [talk for talk in talks if "messages" in talk]

    def encoded(
        self, name: str, records: list[Record], every: int, total: int | None, is_leak: LeakTest | None = None
    ) -> tuple[Dataset, list[Conversation], dict[str, Any]]:
        """What `encode_rows` gives of records, and the entry for those without use; `total` were read so far."""
        source = self.sources[name]
        if self.formatters.get(name) is None:
            columns = dict.fromkeys(key for _, row, _ in records if not isinstance(row, Fault) for key in row)
            self.formatters[name] = find_formatter(name, source, self.config.formatter, list(columns))
        how = (name, self.config, self.formatters[name], self.encoder)
        rows, talks, faults = encode_rows(*how, records, len(records), every, is_leak)
        return rows, talks, count_faults(f"data.{name}", source.on_error, faults, total or len(records))

    def mixed(self) -> Iterator[Document]:
        """The sources' rows, each of the source that is furthest behind its share, until every source was read.

        One that ends before the others begins anew as often as `mix` allows; then the pass ends with it.
        """
        mix, streams = self.config.mix, {name: self.documents(name) for name in self.sources}
        waiting = {name: next(stream) for name, stream in streams.items()}
        self.mixture = StreamMixture(self.config, [row[RAW_PIECE] >= 0 for row in waiting.values()])
        ended = {part.name: 0 for part in self.mixture.parts if part.share}
        while not all(ended.values()):
            part = self.mixture.next_source()
            row, name = waiting[part.name], part.name
            part.taken.update({"rows": 1, "tokens": len(row[1]), UNITS["tokens"]: int((row[1] != IGNORE_INDEX).sum())})
            yield row
            waiting[name] = next(streams[name], None)
            if waiting[name] is None:
                ended[name] += 1
                if all(ended.values()) or ended[name] >= (mix.max_repeat if mix.when_short == "repeat" else 1):
                    break
                streams[name] = self.documents(name, again=True)
                waiting[name] = next(streams[name])
        if not all(ended.values()) and mix.when_short == "raise":
            raise DataError(
                f"data.{name} ends before the other sources. Write a smaller share, or mix.when_short=repeat."
            )
        if len(ended) > 1 and self.counts:
            listed = ", ".join(f"{name} {times} times" if times else f"{name} in part" for name, times in ended.items())
            log.warning("A pass ends with data.%s; of the sources were read: %s.", name, listed)

    def record_mixture(self) -> None:
        """Puts beside the counts what the first pass has taken of every source so far."""
        if self.counts and len(self.sources) > 1:
            for name, entry in describe_mixture(self.mixture.parts).items():
                self.read[name]["mix"] = entry

    def documents(self, name: str, again: bool = False) -> Iterator[Document]:
        """One source's rows that the policies keep; the audit counts them unless they are read `again`."""
        source = self.sources[name]
        first = 0 if source.held_out_split else int(source.held_out)
        records = islice(stream_rows(f"data.{name}", source, source.split), first, None)
        seen, kept, long, number, policy = set(), 0, 0, 0, self.config.data.max_length_policy
        while batch := list(islice(records, ENCODE_BATCH_ROWS)):
            number += len(batch)
            rows, talks, unusable = self.encoded(name, batch, max(1, len(batch) // PARITY_ROWS), number, self.is_leak)
            if number == len(batch) and self.counts:
                check_train_serve_parity(self.encoder, talks)
                self.read[name]["parity"] = len(talks)
            long_rows = "drop" if policy == "auto" else policy
            _, rows, issues = check_rows(name, rows, self.config, self.max_length, long_rows, self.out, seen)
            long += issues.get("truncated", {"rows": 0})["rows"]
            if policy == "auto" and long > 0.01 * number:
                raise DataError(
                    f"data.{name}: {long} of the first {number} rows {'is' if long == 1 else 'are'} longer than "
                    f"trainer.max_length={self.max_length}. Raise it, or write data.max_length_policy=drop (or keep)."
                )
            kept += len(rows)
            if self.counts and not again:
                self.read[name]["rows"] += len(batch)
                count_rows(self.read[name], name, rows, unusable | issues)
            # copies: a row that waits for room in a packed one would keep its whole batch in memory
            columns = [map(np.copy, row_arrays(rows, key)) for key in ("input_ids", "labels")]
            yield from zip(*columns, *(flat_values(rows, key).tolist() for key in ORIGIN), strict=True)
            if not kept and number >= GIVE_UP_ROWS:
                break
        if not kept:
            raise DataError(f"data.{name}: none of {plural(number, 'row')} is left to train on.")

    def __call__(self) -> Iterator[dict[str, np.ndarray]]:
        """Pass after pass, without an end: a resumed run finds its place by the number of rows alone.

        TRL takes a row before training does, which begins anew.
        """
        self.begin()
        yield from self.give_out(chain.from_iterable(self.buffers() for _ in count()))

    def one_pass(self) -> Iterator[dict[str, np.ndarray]]:
        """The rows of one pass."""
        yield from self.give_out(self.buffers())

    def give_out(self, buffers: Iterator[tuple[list, dict]]) -> Iterator[dict[str, np.ndarray]]:
        """The rows of the buffers; each is made in a thread while the one before it is given out, and counted then."""
        with ThreadPoolExecutor(max_workers=1) as pool:  # which ends with the buffer that it makes
            ahead = pool.submit(next, buffers, None)
            while made := ahead.result():
                rows, self.audit = made
                yield self.row(rows[0])  # who wants to see one row alone waits for one buffer
                ahead = pool.submit(next, buffers, None)
                yield from map(self.row, rows[1:])

    def buffers(self) -> Iterator[tuple[list[list[Document]], dict[str, dict]]]:
        """One pass in buffers, shuffled and, if asked for, packed, each with the audit of all that was read for it."""
        self.passes += 1
        random, documents, waiting = np.random.default_rng([self.config.seed, self.passes]), self.mixed(), []
        while buffer := waiting + (fresh := list(islice(documents, BUFFER_ROWS))):
            self.record_mixture()
            rows, waiting = [[document] for document in buffer], []
            if self.packing:
                bins = pack_lengths([len(ids) for ids, *_ in buffer], self.max_length, self.config.seed)
                rows = [[buffer[i] for i in chosen] for chosen in bins]
                if fresh:  # rows with room wait for the next buffer
                    rows, waiting = split_by_fill(rows, self.max_length)
            yield [rows[index] for index in random.permutation(len(rows))], deepcopy(self.read)
        self.counts = False

    def row(self, documents: list[Document]) -> dict[str, np.ndarray]:
        """One row for the trainer, taken into the digest."""
        columns = [np.concatenate([document[place] for document in documents]) for place in (0, 1)]
        if self.packing:
            columns.append(np.array([len(ids) for ids, *_ in documents]))
        self.digest.add(columns)
        return dict(zip(DIGEST_COLUMNS, columns, strict=False))

    def dataset(self) -> IterableDataset:
        """What the trainer is given."""
        names = DIGEST_COLUMNS if self.packing else DIGEST_COLUMNS[:2]
        features = Features({key: LargeList(Value("int32")) for key in names})
        return IterableDataset.from_generator(self, features=features)

    def __getstate__(self) -> dict[str, Any]:
        """What tells two streams apart: `datasets` hashes its generators, and a digest in the making has no hash."""
        return self.config.composed
