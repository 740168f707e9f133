"""The shares of a mixture: which rows of each source are drawn, and how often; of a stream, whose row is next."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sft_recipes.config.options import MixOptions
from sft_recipes.config.schema import Config
from sft_recipes.data.token_rows import TrainingData, flat_values, row_lengths, supervised_lengths, take_rows
from sft_recipes.errors import ConfigError

log = logging.getLogger(__name__)
UNITS = {"rows": "rows", "tokens": "tokens with loss"}  # of mix.by; raw text beside conversations is counted in tokens


@dataclass
class Part:
    """One source of a mixture: what is asked of it, and what was taken."""

    name: str
    share: float | None  # of the conversations or, as raw text beside them, of all tokens
    unit: str
    beside: bool = False  # raw text that mix.raw_text is about
    rows: np.ndarray | None = None  # their places in the table …
    amounts: np.ndarray | None = None  # … and what each of them is in `unit`; a stream does not know its rows
    taken: Counter = field(default_factory=Counter)  # by unit


def mix_rows(config: Config, data: TrainingData) -> TrainingData:
    """The data with its training rows drawn by the shares of their sources, in an order drawn with the run's seed.

    The audit counts what is drawn, and its `mix` says what was asked for and what each source got.
    """
    if not len(data.train):
        return data
    sizes = {"rows": np.ones(len(data.train), dtype=np.int64), "tokens": row_lengths(data.train)}
    sizes["tokens with loss"] = supervised_lengths(data.train)
    index, is_raw = flat_values(data.train, "source"), flat_values(data.train, "piece") >= 0
    parts = make_parts(config, [bool(is_raw[index == number].any()) for number in range(len(config.sources))])
    for number, part in enumerate(parts):
        part.rows = np.flatnonzero(index == number)
        part.amounts = sizes[part.unit][part.rows]
    drawn, audit = draw_parts(config, parts, sizes["tokens"]), {}
    for part in parts:
        part.taken.update({unit: int(size[drawn[part.name]].sum()) for unit, size in sizes.items()})
        rows, tokens, supervised = (part.taken[unit] for unit in ("rows", "tokens", "tokens with loss"))
        audit[part.name] = data.audit[part.name] | {"kept": rows, "tokens": tokens, "supervised_tokens": supervised}
    if config.mix.total or config.mix.raw_text is not None or any(part.share for part in config.sources.values()):
        audit = {name: audit[name] | {"mix": entry} for name, entry in describe_mixture(parts).items()}
    order = np.concatenate([drawn[part.name] for part in parts])
    order = order[np.random.default_rng(config.seed).permutation(len(order))]
    return replace(data, train=take_rows(data.train, order), audit=audit)


def make_parts(config: Config, is_raw: Sequence[bool]) -> list[Part]:
    """The sources as parts of the mixture. `mix.raw_text` is about raw text that asks for no share."""
    mix, sources = config.mix, config.sources
    if mix.raw_text and not any(is_raw):
        raise ConfigError(
            f"mix.raw_text={mix.raw_text:g}: no source is raw text. Write 'data=[{','.join(sources)},prose]', or add a "
            "source of your own with formatter=text."
        )
    raw = dict(zip(sources, is_raw, strict=True)) if mix.raw_text is not None and not all(is_raw) else {}
    beside = [name for name in sources if raw.get(name) and not sources[name].share]
    for name in sources:
        if raw.get(name) and sources[name].share:
            log.warning("data.%s.share=%g holds, not mix.raw_text=%g.", name, sources[name].share, mix.raw_text)
    return [
        Part(name, mix.raw_text / len(beside), "tokens", beside=True)
        if name in beside
        else Part(name, source.share, UNITS[mix.by])
        for name, source in sources.items()
    ]


def draw_parts(config: Config, parts: Sequence[Part], tokens: np.ndarray) -> dict[str, np.ndarray]:
    """For each source the places of its rows in the mixture: first of conversations, then of raw text beside them.

    Several sources of raw text share `mix.raw_text` in proportion to their size.
    """
    mix, drawn = config.mix, {}
    talks, beside = ([part for part in parts if part.beside == which] for which in (False, True))
    have = {part.name: int(part.amounts.sum()) for part in parts}
    shares, total = plan_shares(mix, {part.name: part.share for part in talks}, have)
    wanted = {name: total * share for name, share in shares.items()}
    wanted = round_to_total(wanted) if mix.by == "rows" else wanted
    for part in talks:
        part.share = shares[part.name]
        drawn[part.name] = draw_rows(mix, part, wanted[part.name], config.seed)
    said, size = sum(int(tokens[rows].sum()) for rows in drawn.values()), sum(have[part.name] for part in beside)
    for part in beside:
        part.share = mix.raw_text * have[part.name] / max(1, size)
        # the conversations' tokens are what raw text leaves of all, 1 - mix.raw_text
        drawn[part.name] = draw_rows(mix, part, said * part.share / (1 - mix.raw_text), config.seed)
    return drawn


def plan_shares(
    mix: MixOptions, asked: Mapping[str, float | None], have: Mapping[str, float]
) -> tuple[dict[str, float], float]:
    """Each source's share, and how much the whole mixture is.

    Sources that ask for no share have what the others leave, in proportion to their size, and unless `mix.total` says
    otherwise all of it is used. Where every source asks, the whole is as much as they have together.

    >>> plan_shares(MixOptions(), {"a": None, "b": 0.25}, {"a": 30, "b": 50})
    ({'a': 0.75, 'b': 0.25}, 40.0)
    >>> plan_shares(MixOptions(when_short="shrink"), {"a": 0.5, "b": 0.5}, {"a": 30, "b": 10})
    ({'a': 0.5, 'b': 0.5}, 20.0)
    """
    free = 1 - sum(share for share in asked.values() if share)
    size = sum(have[name] for name, share in asked.items() if share is None)
    if free < 1e-9 if None in asked.values() else abs(free) > 1e-9:
        listed = ", ".join(f"{name} {share:g}" for name, share in asked.items() if share)
        raise ConfigError(
            f"data: shares ({listed}) should be above 0 and sum to 1, or to less where a source has none."
        )
    shares = {name: free * have[name] / max(1, size) if share is None else share for name, share in asked.items()}
    total = mix.total or (size / free if None in asked.values() else sum(have[name] for name in asked))
    enough = {name: have[name] / share for name, share in shares.items() if share}
    scarce = min(enough, key=enough.get, default=None)
    if mix.when_short == "shrink" and scarce and enough[scarce] < total * (1 - 1e-9):
        log.warning(
            "data: the mixture is %s %s rather than %s: data.%s has no more for its share of %.3g.",
            f"{enough[scarce]:,.0f}", UNITS[mix.by], f"{total:,.0f}", scarce, shares[scarce],
        )  # fmt: skip
        total = enough[scarce]
    return shares, float(total)


def round_to_total(wanted: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers with the same sum, rounded by the largest remainders.

    >>> round_to_total({"a": 3.5, "b": 3.0, "c": 2.0, "d": 1.5})
    {'a': 4, 'b': 3, 'c': 2, 'd': 1}
    """
    whole = {name: int(number + 1e-9) for name, number in wanted.items()}
    missing = round(sum(wanted.values())) - sum(whole.values())
    largest = sorted(wanted, key=lambda name: whole[name] - wanted[name])[:missing]
    return {name: number + (name in largest) for name, number in whole.items()}


def draw_rows(mix: MixOptions, part: Part, wanted: float, seed: int) -> np.ndarray:
    """The places of a source's rows that together come nearest to `wanted`, in the table's order.

    They are drawn without replacement: a row comes again only once all have come, with a warning. Raises ConfigError
    where the source would be repeated too often.
    """
    have = int(part.amounts.sum())
    if wanted > have * (1 + 1e-9):
        wanted = check_repeats(mix, part, wanted, have)
    times = int(wanted // have) if have else 0
    order = np.random.default_rng(seed).permutation(len(part.amounts))
    sums = np.concatenate([[0], np.cumsum(part.amounts[order])])
    rest = order[: np.abs(sums - (wanted - times * have)).argmin()]
    return part.rows[np.sort(np.concatenate([np.tile(np.arange(len(order)), times), rest]))]


def check_repeats(mix: MixOptions, part: Part, wanted: float, have: int) -> float:
    """How much is taken of a source that has less than is wanted, with a warning.

    Raises ConfigError where it may not be repeated, or not so often.
    """
    share = f"mix.raw_text={mix.raw_text:g}" if part.beside else f"data.{part.name}.share={part.share:.3g}"
    found = f"{share} is {wanted:,.0f} {part.unit} of this mixture, and data.{part.name} has {have:,}"
    if mix.when_short == "shrink":
        log.warning("%s: they are taken once.", found)
        return have
    most = 1 if mix.when_short == "raise" else mix.max_repeat
    if wanted <= most * have:
        log.warning("%s: they are repeated %.2f times.", found, wanted / have)
        return wanted
    often = f", which {wanted / have:.1f} times its rows would make" if have and most > 1 else ""
    fits = "" if part.beside else f", mix.total={int(most * have / part.share)}"
    more = "mix.when_short=repeat" if most == 1 else f"mix.max_repeat above {mix.max_repeat:g}"
    raise ConfigError(f"{found}{often}. Write a smaller share{fits}, mix.when_short=shrink, or {more}.")


def describe_mixture(parts: Sequence[Part]) -> dict[str, dict[str, Any]]:
    """For each source what share was asked of it, what it got, in which unit, and how often its rows were taken."""
    found = {}
    for part in parts:  # a share is of all, as raw text, and else of the conversations
        whole = sum(other.taken[part.unit] for other in parts if part.beside or not other.beside)
        got = part.taken[part.unit] / max(1, whole)
        found[part.name] = {"asked": round(part.share, 6), "got": round(got, 6), "of": part.unit}
        if part.amounts is not None and (have := int(part.amounts.sum())):
            found[part.name]["times"] = round(part.taken[part.unit] / have, 4)
    return found


class StreamMixture:
    """Which source of a stream is next: the one that is furthest behind its share of what was taken so far."""

    def __init__(self, config: Config, is_raw: Sequence[bool]):
        self.parts, self.raw_text = make_parts(config, is_raw), config.mix.raw_text or 0
        asked = {part.name: part.share for part in self.parts if not part.beside}
        free = [name for name, share in asked.items() if share is None]
        if len(free) > 1:
            raise ConfigError(
                f"data: streamed sources are drawn by their shares. Write data.{free[0]}.share=…; one source may go "
                "without and gets the rest."
            )
        shares, _ = plan_shares(MixOptions(), asked, dict.fromkeys(asked, 1))
        for part in self.parts:
            part.share = shares.get(part.name, part.share)

    def next_source(self) -> Part:
        """The source whose row comes next.

        It is not drawn at random: so the shares hold at every row, and a resumed run finds its place without a state.
        """
        raw = sum(part.taken["tokens"] for part in self.parts if part.beside)
        behind = raw < self.raw_text * sum(part.taken["tokens"] for part in self.parts)
        chosen = [part for part in self.parts if part.beside == behind]
        return min(chosen, key=lambda part: part.taken[part.unit] / part.share)
