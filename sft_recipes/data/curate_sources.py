"""Curation of a run's sources as its config asks for: which rows are removed, why, and what was counted."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import numpy as np

from sft_recipes.config.curation_options import CurationAction, CurationOptions
from sft_recipes.config.schema import Config
from sft_recipes.config.validation import import_function, validate_kwargs
from sft_recipes.curation.curate import (
    Findings,
    apply_filters,
    apply_near_duplicates,
    apply_selection,
)
from sft_recipes.curation.diversity import describe_diversity
from sft_recipes.curation.filters import FILTERS
from sft_recipes.curation.selection import score_quality
from sft_recipes.data.curated_rows import LeakFinder, SourceRows, read_conversations
from sft_recipes.data.formatters import Conversation
from sft_recipes.errors import ConfigError, did_you_mean

COUNTED_ROWS = 20_000  # at 2 ms each, measured on Alpaca's; more are not counted before a training that removes none


@dataclass(frozen=True)
class CuratedSources:
    """The rows that were looked at, one list over all sources, and what was found."""

    origins: list[tuple[str, int]]  # the source and the row's number in it
    conversations: list[Conversation]
    scores: list[float]
    findings: Findings
    record: dict[str, Any]  # what curation.json holds


def curate_sources(
    config: Config, sources: Mapping[str, SourceRows], count: Callable[[str], int], leaks: LeakFinder | None = None
) -> CuratedSources:
    """All rows to train on through filters, near-duplicates and selection; `count` gives a text's length in tokens.

    Rows that give away what `leaks` knows are removed first.
    """
    options, origins, talks = config.curation, [], []
    for name, source in sources.items():
        for number, talk in read_conversations(source.rows, source.formatter, source.trained):
            origins.append((name, number))
            talks.append(talk)
    findings = Findings()
    if leaks:
        found = {place: "it is like a held-out row" for place, talk in enumerate(talks) if leaks.is_leak(talk)}
        findings.add("leak", "remove", found)
    apply_filters(findings, talks, build_filters(options, count))
    own = options.select.by if options.select else "score"
    score = partial(score_quality, count=count) if own == "score" else import_function("curation.select.by", own)
    scores = [float(score(talk)) for talk in talks]
    if twins := options.near_duplicates:
        actions = {"rows": twins.rows, "instructions": twins.instructions}
        names = [f"row {number} of data.{name}" for name, number in origins]
        apply_near_duplicates(findings, talks, names, scores, actions, twins.threshold, twins.shingle)
    selected = {}
    if options.select:
        selected = apply_selection(findings, talks, scores, options.select.rows, options.select.spread)
    kept = [talks[place] for place in findings.remaining(len(talks)) if "messages" in talks[place]]
    record = {"rows": len(talks), "removed": len(findings.reasons), "kept": len(talks) - len(findings.reasons)}
    record |= {"findings": name_examples(findings, origins), "selected": selected}
    return CuratedSources(origins, talks, scores, findings, record | {"diversity": describe_diversity(kept, count)})


def build_filters(
    options: CurationOptions, count: Callable[[str], int]
) -> dict[str, tuple[Callable[[Conversation], str | None], str, float]]:
    """The filters that the config names, with their thresholds; raises ConfigError for those that do not exist."""
    built = {}
    for name, values in options.filters.items():
        where = f"curation.filters.{name}"
        if name not in FILTERS:
            raise ConfigError(f"{where} is no filter.{did_you_mean(name, FILTERS)} Or name your own in own_filters.")
        values = dict(values or {"action": "off"})
        action, share = values.pop("action", "report"), values.pop("keep_share", 0.0)
        if action not in get_args(CurationAction):
            raise ConfigError(f"{where}.action cannot be {action!r}. Write off, report or remove.")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ConfigError(f"{where}.keep_share should be a share from 0 to 1, not {share!r}.")
        validate_kwargs(FILTERS[name], {"conversation": {}, **values}, where)
        if "count" in inspect.signature(FILTERS[name]).parameters:
            values["count"] = count
        if action not in ("off", False):
            built[name] = (partial(FILTERS[name], **values), action, share)
    for label in options.own_filters:
        built[label] = (import_function("curation.own_filters", label), "remove", 0.0)
    return built


def name_examples(findings: Findings, origins: list[tuple[str, int]]) -> dict[str, Any]:
    """The counts with the examples' source and number in it instead of their place."""
    named = {}
    for name, entry in findings.counts.items():
        examples = [
            {"source": origins[example["row"]][0], "row": origins[example["row"]][1], "reason": example["reason"]}
            for example in entry["examples"]
        ]
        named[name] = entry | {"examples": examples}
    return named


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
    curated = curate_sources(config, sources, count)
    if not options.removes_rows:
        return dict(sources), audit, curated.record
    left = {}
    for name, source in sources.items():
        mine = {place: number for place, (origin, number) in enumerate(curated.origins) if origin == name}
        gone = [number for place, number in mine.items() if place in curated.findings.reasons]
        left[name] = replace(source, trained=np.setdiff1d(source.trained, gone))
        for label, places in curated.findings.places.items():
            numbers = [mine[place] for place in places if place in mine]
            policy = "drop" if curated.findings.counts[label]["action"] == "remove" else "keep"
            if numbers:
                audit[name][f"curation_{label}"] = {"rows": len(numbers), "policy": policy, "first": numbers[:20]}
    return left, audit, curated.record
