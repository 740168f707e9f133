"""Sources become what the trainer gets, token ids and labels: load, hold out, format, encode, mix, pack."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm

from sft_recipes.binding import ConfigError, call
from sft_recipes.config import Config
from sft_recipes.encoding import Encoder, strings
from sft_recipes.formatters import Conversation, DataError
from sft_recipes.reuse import identity, once
from sft_recipes.rows import flat_values, mix, shorten, shuffled, table, token_counts
from sft_recipes.sources import find_formatter, fingerprint, load_rows, place, sources
from sft_recipes.supervision import Policy, announce, check_parity, enforce, keys, mark_repeats, problems_of

log = logging.getLogger(__name__)
BATCH = 1000  # rows that are formatted and encoded at once
PARITY_ROWS = 50  # rows a source whose prompts are compared with what serving would show
SMOKE_ROWS, SMOKE_HELD_OUT = 200, 20  # rows a source gives under +debug=smoke, and at most so many of them held out


@dataclass(frozen=True)
class Options:
    """The entries of `data` that hold for all sources."""

    held_out: float = 0.02  # a share below 1, or a number of rows, of each source
    held_out_by_length: bool = False  # of every length as many as there are, rather than by chance
    max_length_policy: Literal["auto", "drop", "keep", "raise"] = "auto"


@dataclass(frozen=True)
class Data:
    """What a run trains on and is asked: columns `input_ids`, `labels`, `source` (its index) and `row` (its number)."""

    train: Dataset
    held_out: Dataset
    questions: list[Conversation]  # the held-out conversations
    ledger: dict[str, dict]  # by source: rows, held_out, kept, tokens, supervised_tokens, problems


def streamed(config: Config) -> bool:
    """Whether the sources are streamed; raises ConfigError where only some of them are."""
    asked = {name: source.streaming for name, source in sources(config).items()}
    if any(asked.values()) and not all(asked.values()):
        other = min(asked, key=asked.get)
        raise ConfigError(f"data.{other}.streaming should be true, too: all sources are streamed, or none.")
    return any(asked.values())


def load(config: Config, encoder: Encoder, max_length: int | None) -> Data:
    """What `prepare` gives; the jobs of a sweep that share it, and run in one process, do it once."""
    return once(identity(config, encoder, max_length), lambda: prepare(config, encoder, max_length))


def prepare(config: Config, encoder: Encoder, max_length: int | None) -> Data:
    """The rows to train on, in an order drawn with the run's seed, those that are held out, and the ledger of both.

    Raises DataError, naming source, row and field, for a row that cannot be trained on, and ConfigError where the saved
    tokenizer would serve another prompt than the one trained on.
    """
    found = sources(config)
    options = call(Options, {key: value for key, value in config.data.items() if key not in found}, "data")
    policy = call(Policy, config.supervision, "supervision")
    cutting = "keep" if config.smoke else options.max_length_policy
    parts = {name: read(name, options, config, encoder) for name in found}
    held_out = concatenate_datasets([part.held_out for part in parts.values()])
    train = mark_repeats(concatenate_datasets([part.train for part in parts.values()]), keys(held_out), set())
    kept, ledger = {}, {}
    for index, (name, part) in enumerate(parts.items()):
        mine = train.select(np.flatnonzero(flat_values(train, "source") == index))
        mine, problems = enforce(name, mine, policy)
        kept[name], cut = shorten(name, mine, max_length, cutting)
        counts = {"rows": len(part.train), "held_out": len(part.held_out)}
        ledger[name] = part.ledger | counts | {"problems": problems | cut}
        announce(name, problems | cut)
    kept = mix(kept, {name: source.share for name, source in found.items()}, config.seed)
    for name, rows in kept.items():
        ledger[name] |= {"kept": len(rows)} | token_counts(rows)
    train = shuffled(concatenate_datasets(list(kept.values())), config.seed)
    if not len(train):
        raise DataError("data: no row is left to train on.")
    questions = [question for part in parts.values() for question in part.questions]
    return Data(
        train, shorten("held_out", held_out, max_length, "keep" if cutting == "keep" else "drop")[0], questions, ledger
    )


def read(name: str, options: Options, config: Config, encoder: Encoder) -> Data:
    """One source from its files to token ids, its held-out rows set apart before anything else touches them."""
    source = sources(config)[name]
    rows = load_rows(name, source, source.split)
    if config.smoke:
        rows = rows.select(range(min(len(rows), SMOKE_ROWS)))
        options = replace(options, held_out=min(options.held_out, SMOKE_HELD_OUT))
    formatter = find_formatter(name, source, config.formatter, rows.column_names)
    if source.held_out_split:
        out = []
    elif options.held_out_by_length:
        out = held_out_by_length(rows, options.held_out, config.seed)
    else:
        out = held_out_rows(len(rows), options.held_out, config.seed)
    out_rows = load_rows(name, source, source.held_out_split) if source.held_out_split else rows
    numbers = range(len(out_rows)) if source.held_out_split else out
    trained = np.setdiff1d(np.arange(len(rows)), out)
    train, some = encode(name, config, formatter, encoder, rows, trained, every=max(1, len(trained) // PARITY_ROWS))
    held_out, questions = encode(name, config, formatter, encoder, out_rows, numbers, every=1)
    check_parity(encoder, some)
    questions = [question for question in questions if "messages" in question]
    return Data(train, held_out, questions, {"fingerprint": fingerprint(source, rows), "parity": len(some)})


def held_out_by_length(rows: Dataset, wanted: float, seed: int) -> np.ndarray:
    """As `held_out_rows`, one row drawn from each of so many equal parts of the rows sorted by their characters."""
    number = len(held_out_rows(len(rows), wanted, seed))
    random = np.random.default_rng(seed)
    length = np.array([sum(map(len, strings(row))) for row in rows])
    order = np.lexsort((random.permutation(len(rows)), length))
    return np.sort([random.choice(part) for part in np.array_split(order, number)]) if number else np.zeros(0, int)


def held_out_rows(rows: int, wanted: float, seed: int) -> np.ndarray:
    """The indices, in order, of the rows that are held out: `wanted` is a number of rows, or a share below 1."""
    number = round(rows * wanted) if wanted < 1 else int(wanted)
    if wanted > 1 and number != wanted:
        raise ConfigError(f"data.held_out should be a share below 1 or a whole number of rows, not {wanted}.")
    if not 0 <= number < max(rows, 1):
        raise ConfigError(f"data.held_out={wanted} leaves none of {rows} rows to train on.")
    return np.sort(np.random.default_rng(seed).permutation(rows)[:number])


def encode(
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
    source, index = sources(config)[name], list(sources(config)).index(name)
    ids, labels, problems, kept = [], [], [], []

    def batches() -> Iterator[list[Conversation]]:
        for start in range(0, len(numbers), BATCH):
            kept.append([])
            some = numbers[start : start + BATCH]
            columns = {} if isinstance(rows, list) else rows.select(some)[:]
            listed = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
            for row in (rows[number] for number in some) if isinstance(rows, list) else listed:
                kept[-1].append(formatter(row))
            yield kept[-1]

    bar = tqdm(total=len(numbers), desc=f"Encoding {name}", unit=" rows", disable=len(numbers) < 5 * BATCH)
    try:
        for encoded in encoder.encode_batches(batches(), source.supervise):
            conversations = kept[len(problems)]
            ids += encoded["input_ids"]
            labels += encoded["labels"]
            kept[len(problems)] = conversations[::every]
            problems.append(problems_of(encoder, conversations, encoded, source.supervise))
            bar.update(len(conversations))
    except DataError as error:
        number = numbers[(len(kept) - 1) * BATCH + getattr(error, "row", len(kept[-1]))]
        raise DataError(f"{place(name, source, first + number)}: {error}") from error
    bar.close()
    origin = {"source": np.full(len(ids), index), "row": first + np.asarray(numbers, dtype=np.int64)}
    found = {"problems": np.concatenate(problems) if problems else np.zeros(0, dtype=np.int64)}
    return table({"input_ids": ids, "labels": labels}, origin | found), [talk for batch in kept for talk in batch]
