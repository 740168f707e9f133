"""Which of a source's rows are used, and which of those are held out."""

import logging
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from sft_recipes.config.options import Source
from sft_recipes.config.schema import Config
from sft_recipes.curation.leaks import hold_out_groups
from sft_recipes.data.curate_sources import Rows, read_words
from sft_recipes.encoding.rendering import list_strings
from sft_recipes.errors import ConfigError, plural

log = logging.getLogger(__name__)
SMOKE_ROWS, SMOKE_HELD_OUT = 200, 20  # rows a source gives under +debug=smoke, and at most so many of them held out


def choose_rows(where: str, source: Source, rows: Rows, config: Config) -> np.ndarray:
    """The numbers of the rows that are used: all of a source, unless it says how many, or the run is a smoke test."""
    chosen = np.arange(len(rows))
    if source.rows and source.rows > len(rows):
        log.warning("%s.rows=%d: the source has no more than %s.", where, source.rows, plural(len(rows), "row"))
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
        raise ConfigError(f"{where}.held_out={wanted} leaves none of {plural(len(chosen), 'row')} to train on.")
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
            f"{where}: no {plural(number, 'row')} can be held out, since each is a near-duplicate (at "
            f"{leaks.threshold:g}) of rows that would be trained on. Write a larger data.held_out, data.held_out=0, or "
            "curation=none."
        )
    if len(out) < number:
        log.warning(
            "%s: %s held out, not %d: near-duplicates stay together, larger groups of them in training.",
            where, plural(len(out), "row is", "rows are"), number,
        )  # fmt: skip
    return out


def draw_by_length(rows: Rows, chosen: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Places within `chosen`, one drawn from each of `number` equal parts of the rows sorted by their characters."""
    random = np.random.default_rng(seed)
    length = np.array([sum(map(len, list_strings(row))) for _, row, _ in rows.records(chosen)])
    order = np.lexsort((random.permutation(len(chosen)), length))
    return np.sort([random.choice(part) for part in np.array_split(order, number)]) if number else np.zeros(0, int)
