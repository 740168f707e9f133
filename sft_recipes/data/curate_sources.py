"""Curation of a run's sources as its config asks for: which rows are removed, why, and what was counted."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from sft_recipes.config.curation_options import CurationOptions, FilterAction
from sft_recipes.config.schema import Config
from sft_recipes.config.validation import call_validated, import_function, validate_kwargs
from sft_recipes.curation.curate import Findings, apply_filters, apply_near_duplicates, apply_selection
from sft_recipes.curation.diversity import describe_diversity
from sft_recipes.curation.filters import FILTERS
from sft_recipes.curation.selection import score_quality
from sft_recipes.data.curated_rows import LeakTest, SourceRows, read_conversations
from sft_recipes.data.formatters import Conversation
from sft_recipes.data.token_rows import audit_entry
from sft_recipes.errors import ConfigError, did_you_mean

COUNTED_ROWS = 20_000  # at 2 ms each, measured on Alpaca's; more are not counted before a training that removes none
Filter = tuple[Callable[[Conversation], str | None], FilterAction]


@dataclass(frozen=True)
class CuratedSources:
    """The rows that were looked at, one list over all sources, and what was found."""

    conversations: list[Conversation]
    scores: list[float]
    findings: Findings
    record: dict[str, Any]  # what curation.json holds


def curate_sources(
    config: Config, sources: Mapping[str, SourceRows], count: Callable[[str], int], is_leak: LeakTest | None = None
) -> CuratedSources:
    """All rows to train on through filters, near-duplicates and selection; `count` gives a text's length in tokens.

    Leaks, where they are looked for, are removed first.
    """
    options, origins, talks = config.curation, [], []
    for name, source in sources.items():
        read = read_conversations(source.rows, source.formatter, source.trained)
        for number, talk in zip(source.trained.tolist(), read, strict=True):
            if talk:
                origins.append((name, number))
                talks.append(talk)
    findings = Findings(origins)
    if is_leak:
        found = {place: "it is like a held-out row" for place, talk in enumerate(talks) if is_leak(talk)}
        findings.add("leak", "remove", found)
    apply_filters(findings, talks, build_filters(options, count))
    own = options.select.by if options.select else "score"
    score = partial(score_quality, count=count) if own == "score" else import_function("curation.select.by", own)
    scores = [float(score(talk)) for talk in talks]
    if twins := options.near_duplicates:
        actions = {"rows": twins.rows, "instructions": twins.instructions}
        apply_near_duplicates(findings, talks, scores, actions, twins.threshold, twins.shingle)
    selected = {}
    if options.select:
        selected = apply_selection(findings, talks, scores, options.select.rows, options.select.spread)
    kept = findings.remaining()
    record = {"rows": len(talks), "removed": len(findings.reasons), "kept": len(kept), "findings": findings.counts}
    diversity = describe_diversity([talks[place] for place in kept if "messages" in talks[place]], count)
    return CuratedSources(talks, scores, findings, record | {"selected": selected, "diversity": diversity})


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
    curated = curate_sources(config, sources, count)
    if not options.removes_rows:
        return dict(sources), audit, curated.record
    left, findings = {}, curated.findings
    for name, source in sources.items():
        mine = {place: number for place, (origin, number) in enumerate(findings.origins) if origin == name}
        gone = [number for place, number in mine.items() if place in findings.reasons]
        left[name] = replace(source, trained=np.setdiff1d(source.trained, gone))
        for label, places in findings.places.items():
            numbers = [mine[place] for place in places if place in mine]
            policy = "drop" if findings.counts[label]["action"] == "remove" else "keep"
            if numbers:
                audit[name][f"curation_{label}"] = audit_entry(numbers, policy)
    return left, audit, curated.record
