"""Rows that are read, encoded and packed while training goes on, with the audit and digest that other rows have."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, LargeList, Value, concatenate_datasets

from sft_recipes.config.schema import Config
from sft_recipes.data.audit import (
    apply_policy,
    check_train_serve_parity,
    log_issues,
    mark_duplicates,
    row_hashes,
)
from sft_recipes.data.digest import DIGEST_COLUMNS, TokenDigest
from sft_recipes.data.formatters import Conversation
from sft_recipes.data.mixing import apply_max_length_policy
from sft_recipes.data.packing import pack_lengths
from sft_recipes.data.prepare import ENCODE_BATCH_ROWS, PARITY_ROWS, TrainingData, encode_rows
from sft_recipes.data.sources import find_formatter, load_rows, source_fingerprint
from sft_recipes.data.token_rows import count_tokens, flat_values, row_arrays, to_dataset
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.errors import ConfigError, DataError

log = logging.getLogger(__name__)
BUFFER_ROWS = 5000  # rows that are shuffled and packed together
GIVE_UP_ROWS = 20_000  # rows without one to train on, after which a stream is given up
EMPTY_COUNTS = {"rows": 0, "kept": 0, "tokens": 0, "supervised_tokens": 0}
Document = tuple[np.ndarray, np.ndarray, int, int]  # ids, labels, the source's index, the row's number


def load_stream(
    config: Config, encoder: Encoder, max_length: int | None, packing: bool
) -> tuple[TrainingData, "RowStream"]:
    """The first rows of the sources, read once to be looked at before any weights are, and the stream to train on."""
    stream = RowStream(config, encoder, max_length, packing)
    data = TrainingData(stream.first_rows(), stream.held_out, stream.questions, stream.audit)
    stream.passes, stream.audit = (
        0,
        {name: entry | EMPTY_COUNTS | {"problems": {}} for name, entry in data.audit.items()},
    )
    log.info("Streaming: the table counts the first rows; supervision.json will count all that training has read.")
    return data, stream


class RowStream:
    """The sources as one stream of rows for the trainer: `input_ids`, `labels`, where they are packed `seq_lengths`.

    Each pass draws the sources by their shares until one of them ends. Rows are shuffled and packed within a buffer of
    5,000. `audit` counts the first pass as far as it was read, `digest` takes in every row that was given out.
    """

    def __init__(self, config: Config, encoder: Encoder, max_length: int | None, packing: bool):
        self.config, self.encoder, self.max_length, self.packing = config, encoder, max_length, packing
        self.sources, self.passes, self.digest = config.sources, 0, TokenDigest()
        self.formatters: dict[str, Callable] = {}
        self.shares = stream_shares({name: source.share for name, source in self.sources.items()})
        held_out = {name: self.hold_out(name) for name in self.sources}
        self.held_out = concatenate_datasets([rows for rows, _ in held_out.values()])
        self.questions = [question for _, questions in held_out.values() for question in questions]
        self.out = row_hashes(self.held_out)
        self.audit: dict[str, dict[str, Any]] = {}
        for name, (rows, _) in held_out.items():
            entry = {"fingerprint": source_fingerprint(self.sources[name], None), "held_out": len(rows), "parity": 0}
            self.audit[name] = entry | EMPTY_COUNTS | {"problems": {}}

    def hold_out(self, name: str) -> tuple[Dataset, list[Conversation]]:
        """The first rows of a source, which training skips, or those of its held-out split."""
        source, wanted = self.sources[name], self.config.data.held_out
        if not source.held_out_split and (wanted < 0 or wanted != int(wanted)):
            raise ConfigError(f"data.held_out={wanted}: a stream has no length to take a share of. Write rows, or 0.")
        number = None if source.held_out_split and wanted < 1 else int(wanted)
        rows = list(islice(load_rows(name, source, source.held_out_split or source.split), number))
        if not rows:
            columns = {"source": [], "row": [], "problems": []}
            return to_dataset({"input_ids": [], "labels": []}, columns, {"unread": []}), []
        found, talks = self.encoded(name, rows, every=1)
        check_train_serve_parity(self.encoder, talks[:: max(1, len(talks) // PARITY_ROWS)])
        return apply_max_length_policy(name, found, self.max_length, "drop")[0], [
            talk for talk in talks if "messages" in talk
        ]

    def encoded(self, name: str, rows: list[dict], every: int, first: int = 0) -> tuple[Dataset, list[Conversation]]:
        """Rows of a source as ids and labels, `first` being the first one's number, and one in `every` as messages."""
        if name not in self.formatters:
            columns = list(rows[0])
            self.formatters[name] = find_formatter(name, self.sources[name], self.config.formatter, columns)
        numbers, formatter = range(len(rows)), self.formatters[name]
        return encode_rows(name, self.config, formatter, self.encoder, rows, numbers, every, first)

    def first_rows(self) -> Dataset:
        """The rows of the first buffer, with `source` and `row`; the audit counts what was read for them."""
        self.passes = 1
        ids, labels, origins, numbers = zip(*islice(self.mixed(), BUFFER_ROWS), strict=True)
        return to_dataset({"input_ids": ids, "labels": labels}, {"source": origins, "row": numbers})

    def mixed(self) -> Iterator[Document]:
        """The sources' rows in turn, drawn by their shares, until one of them ends."""
        streams = [self.documents(name) for name in self.sources]
        random, weights = np.random.default_rng(self.config.seed), [self.shares[name] for name in self.sources]
        while (row := next(streams[random.choice(len(streams), p=weights)], None)) is not None:
            yield row

    def documents(self, name: str) -> Iterator[Document]:
        """One source's rows that the policies keep."""
        source, first = self.sources[name], 0 if self.sources[name].held_out_split else int(self.config.data.held_out)
        rows, seen, kept, long, number = iter(load_rows(name, source, source.split).skip(first)), set(), 0, 0, first
        cutting = {"auto": "drop"}.get(self.config.data.max_length_policy, self.config.data.max_length_policy)
        while batch := list(islice(rows, ENCODE_BATCH_ROWS)):
            found, talks = self.encoded(name, batch, max(1, len(batch) // PARITY_ROWS), number)
            if number == first and self.passes == 1:
                check_train_serve_parity(self.encoder, talks)
                self.audit[name]["parity"] = len(talks)
            number += len(batch)
            found, problems = apply_policy(name, mark_duplicates(found, self.out, seen), self.config.data_checks)
            found, cut = apply_max_length_policy(name, found, self.max_length, cutting)
            long += cut.get("truncated", {"rows": 0})["rows"]
            if self.config.data.max_length_policy == "auto" and long > 0.01 * (number - first):
                raise DataError(
                    f"data.{name}: {long} of the first {number - first} rows are longer than "
                    f"trainer.max_length={self.max_length}. Raise it, or write data.max_length_policy=drop (or keep)."
                )
            kept += len(found)
            if self.passes == 1:
                add_counts(self.audit[name], name, len(batch), found, problems | cut)
            columns = [row_arrays(found, key) for key in ("input_ids", "labels")]
            yield from zip(*columns, *(flat_values(found, key).tolist() for key in ("source", "row")), strict=True)
            if not kept and number - first >= GIVE_UP_ROWS:
                break
        if not kept:
            raise DataError(f"data.{name}: none of {number - first} rows is left to train on.")

    def __call__(self) -> Iterator[dict[str, np.ndarray]]:
        """One pass: buffer after buffer, shuffled and, if asked for, packed; rows with room wait for the next."""
        self.passes += 1
        random, documents, waiting = np.random.default_rng([self.config.seed, self.passes]), self.mixed(), []
        while buffer := waiting + (fresh := list(islice(documents, BUFFER_ROWS))):
            rows, waiting = [[document] for document in buffer], []
            if self.packing:
                bins = pack_lengths([len(ids) for ids, *_ in buffer], self.max_length, self.config.seed)
                rows = [[buffer[i] for i in chosen] for chosen in bins]
                if fresh:
                    rows, waiting = split_by_fill(rows, self.max_length)
            for index in random.permutation(len(rows)):
                yield self.row(rows[index])

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


def split_by_fill(rows: list[list[Document]], max_length: int) -> tuple[list[list[Document]], list[Document]]:
    """The packed rows that are at least 98 % full, or the fuller half of all, and the documents of the others."""
    fill = np.array([sum(len(ids) for ids, *_ in row) for row in rows])
    order = np.argsort(-fill, kind="stable")
    ready = max(int((fill >= 0.98 * max_length).sum()), -(-len(rows) // 2))
    return [rows[i] for i in order[:ready]], [document for i in order[ready:] for document in rows[i]]


def stream_shares(asked: Mapping[str, float | None]) -> dict[str, float]:
    """How often each source is drawn; one may name no share and gets what the others leave."""
    given = {name: share for name, share in asked.items() if share is not None}
    free = [name for name in asked if name not in given]
    rest = 1 - sum(given.values())
    if len(free) > 1 or any(share <= 0 for share in given.values()) or (rest <= 0 if free else abs(rest) > 1e-9):
        raise ConfigError(
            "data: streamed sources are drawn by their shares, which should be above 0 and sum to 1. Write "
            f"data.{(free or list(asked))[0]}.share=…; one source may go without and gets the rest."
        )
    return given | dict.fromkeys(free, rest)


def add_counts(audit: dict[str, Any], name: str, rows: int, kept: Dataset, problems: Mapping[str, dict]) -> None:
    """Counts a batch of rows in its source's audit; a problem is announced when it is first met."""
    log_issues(name, {key: found for key, found in problems.items() if key not in audit["problems"]})
    for key, value in ({"rows": rows, "kept": len(kept)} | count_tokens(kept)).items():
        audit[key] += value
    for key, found in problems.items():
        old = audit["problems"].get(key, {"rows": 0, "first": []})
        counts = {"rows": old["rows"] + found["rows"], "first": (old["first"] + found["first"])[:20]}
        if "fields" in found:
            counts["fields"] = dict((Counter(old.get("fields")) + Counter(found["fields"])).most_common())
        audit["problems"][key] = found | counts
