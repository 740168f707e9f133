"""Sources become what the trainer gets, token ids and labels: load, hold out, format, encode, mix, pack."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm

from sft_recipes.config.schema import Config
from sft_recipes.data.audit import (
    apply_policy,
    check_train_serve_parity,
    find_issues,
    log_issues,
    mark_duplicates,
    row_hashes,
)
from sft_recipes.data.fields import RowFields
from sft_recipes.data.formatters import Conversation
from sft_recipes.data.messages import drop_nulls
from sft_recipes.data.mixing import apply_max_length_policy, sample_mixture, shuffle_rows
from sft_recipes.data.sources import find_formatter, load_rows, locate_row, source_fingerprint
from sft_recipes.data.sweep_cache import cache_key, cached
from sft_recipes.data.token_rows import count_tokens, flat_values, to_dataset
from sft_recipes.encoding.encoder import Encoder, iterate_strings
from sft_recipes.errors import ConfigError, DataError

ENCODE_BATCH_ROWS = 1000  # rows that are formatted and encoded at once
PARITY_ROWS = 50  # rows a source whose prompts are compared with what serving would show
SMOKE_ROWS, SMOKE_HELD_OUT = 200, 20  # rows a source gives under +debug=smoke, and at most so many of them held out


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on and is asked: columns `input_ids`, `labels`, `source` (its index) and `row` (its number)."""

    train: Dataset
    held_out: Dataset
    questions: list[Conversation]  # the held-out conversations
    audit: dict[str, dict]  # by source: rows, held_out, kept, tokens, supervised_tokens, problems


def load_data(config: Config, encoder: Encoder, max_length: int | None) -> TrainingData:
    """What `prepare_data` gives; the jobs of a sweep that share it, and run in one process, do it once."""
    return cached(cache_key(config, encoder, max_length), lambda: prepare_data(config, encoder, max_length))


def prepare_data(config: Config, encoder: Encoder, max_length: int | None) -> TrainingData:
    """The rows to train on, in an order drawn with the run's seed, those that are held out, and the audit of both.

    Raises DataError, naming source, row and field, for a row that cannot be trained on, and ConfigError where the saved
    tokenizer would serve another prompt than the one trained on.
    """
    cutting = "keep" if config.smoke else config.data.max_length_policy
    parts = {name: read_source(name, config, encoder) for name in config.sources}
    held_out = concatenate_datasets([part.held_out for part in parts.values()])
    train = mark_duplicates(concatenate_datasets([part.train for part in parts.values()]), row_hashes(held_out), set())
    kept, audit = {}, {}
    for index, (name, part) in enumerate(parts.items()):
        mine = train.select(np.flatnonzero(flat_values(train, "source") == index))
        mine, problems = apply_policy(name, mine, config.data_checks)
        kept[name], cut = apply_max_length_policy(name, mine, max_length, cutting)
        counts = {"rows": len(part.train), "held_out": len(part.held_out)}
        audit[name] = part.audit | counts | {"problems": problems | cut}
        log_issues(name, problems | cut)
    kept = sample_mixture(kept, {name: source.share for name, source in config.sources.items()}, config.seed)
    for name, rows in kept.items():
        audit[name] |= {"kept": len(rows)} | count_tokens(rows)
    train = shuffle_rows(concatenate_datasets(list(kept.values())), config.seed)
    if not len(train):
        raise DataError("data: no row is left to train on.")
    questions = [question for part in parts.values() for question in part.questions]
    return TrainingData(
        train,
        apply_max_length_policy("held_out", held_out, max_length, "keep" if cutting == "keep" else "drop")[0],
        questions,
        audit,
    )


def read_source(name: str, config: Config, encoder: Encoder) -> TrainingData:
    """One source from its files to token ids, its held-out rows set apart before anything else touches them."""
    source, wanted = config.sources[name], config.data.held_out
    rows = load_rows(name, source, source.split)
    if config.smoke:
        rows = rows.select(range(min(len(rows), SMOKE_ROWS)))
        wanted = min(wanted, SMOKE_HELD_OUT)
    formatter = find_formatter(name, source, config.formatter, rows.column_names)
    if source.held_out_split:
        out = []
    elif config.data.held_out_by_length:
        out = sample_held_out_by_length(rows, wanted, config.seed)
    else:
        out = sample_held_out(len(rows), wanted, config.seed)
    out_rows = load_rows(name, source, source.held_out_split) if source.held_out_split else rows
    numbers = range(len(out_rows)) if source.held_out_split else out
    trained = np.setdiff1d(np.arange(len(rows)), out)
    train, some = encode_rows(
        name, config, formatter, encoder, rows, trained, every=max(1, len(trained) // PARITY_ROWS)
    )
    held_out, questions = encode_rows(name, config, formatter, encoder, out_rows, numbers, every=1)
    check_train_serve_parity(encoder, some)
    questions = [question for question in questions if "messages" in question]
    return TrainingData(
        train, held_out, questions, {"fingerprint": source_fingerprint(source, rows), "parity": len(some)}
    )


def sample_held_out_by_length(rows: Dataset, wanted: float, seed: int) -> np.ndarray:
    """As `sample_held_out`, one row drawn from each of so many equal parts of the rows sorted by their characters."""
    number = len(sample_held_out(len(rows), wanted, seed))
    random = np.random.default_rng(seed)
    length = np.array([sum(map(len, iterate_strings(row))) for row in rows])
    order = np.lexsort((random.permutation(len(rows)), length))
    return np.sort([random.choice(part) for part in np.array_split(order, number)]) if number else np.zeros(0, int)


def sample_held_out(rows: int, wanted: float, seed: int) -> np.ndarray:
    """The indices, in order, of the rows that are held out: `wanted` is a number of rows, or a share below 1."""
    number = round(rows * wanted) if wanted < 1 else int(wanted)
    if wanted > 1 and number != wanted:
        raise ConfigError(f"data.held_out should be a share below 1 or a whole number of rows, not {wanted}.")
    if not 0 <= number < max(rows, 1):
        raise ConfigError(f"data.held_out={wanted} leaves none of {rows} rows to train on.")
    return np.sort(np.random.default_rng(seed).permutation(rows)[:number])


def encode_rows(
    name: str,
    config: Config,
    formatter: Callable,
    encoder: Encoder,
    rows: Dataset | list[dict],
    numbers: Sequence[int],
    every: int,
    first: int = 0,
) -> tuple[Dataset, list[Conversation]]:
    """The rows of these numbers as token ids and labels, and one in `every` as a conversation.

    `first` is the number of the first row in its source, where `rows` are a part of it.
    """
    source, index = config.sources[name], list(config.sources).index(name)
    fields, unread, raw = RowFields(formatter), [], []
    ids, labels, problems, kept = [], [], [], []

    def batches() -> Iterator[list[Conversation]]:
        for start in range(0, len(numbers), ENCODE_BATCH_ROWS):
            kept.append([])
            raw.append([])
            some = numbers[start : start + ENCODE_BATCH_ROWS]
            columns = {} if isinstance(rows, list) else rows.select(some)[:]
            listed = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
            for row in (rows[number] for number in some) if isinstance(rows, list) else listed:
                row = {key: drop_nulls(value) for key, value in row.items()}  # those of Arrow; a column's own stay
                raw[-1].append(row)
                kept[-1].append(formatter(row))
            yield kept[-1]

    bar = tqdm(total=len(numbers), desc=f"Encoding {name}", unit=" rows", disable=len(numbers) < 5 * ENCODE_BATCH_ROWS)
    try:
        for encoded in encoder.encode_batches(batches(), source.train_on):
            conversations = kept[len(problems)]
            ids += encoded["input_ids"]
            labels += encoded["labels"]
            kept[len(problems)] = conversations[::every]
            found, names = find_issues(encoder, fields, raw.pop(0), conversations, encoded, source.train_on)
            problems.append(found)
            unread += names
            bar.update(len(conversations))
    except DataError as error:
        number = numbers[(len(kept) - 1) * ENCODE_BATCH_ROWS + getattr(error, "row", len(kept[-1]))]
        raise DataError(f"{locate_row(name, source, first + number)}: {error}") from error
    bar.close()
    origin = {"source": np.full(len(ids), index), "row": first + np.asarray(numbers, dtype=np.int64)}
    found = {"problems": np.concatenate(problems) if problems else np.zeros(0, dtype=np.int64)}
    found = to_dataset({"input_ids": ids, "labels": labels}, origin | found, {"unread": unread})
    return found, [talk for batch in kept for talk in batch]
