"""The config's `curation`: thresholds and what is done with the rows beyond them."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from sft_recipes.config.validation import Count, Share
from sft_recipes.errors import ConfigError

CurationAction = Literal["off", "report", "remove", False]  # YAML reads off as false


@dataclass(frozen=True)
class LeakOptions:
    """The config's `curation.leaks`: when a training row gives a held-out row away."""

    threshold: Share = 0.8  # Jaccard similarity of their words
    window: Annotated[int, "[3, inf)"] = 8  # words in a row that both have …
    coverage: Share = 0.5  # … and the share of the held-out row's words that these may cover


@dataclass(frozen=True)
class NearDuplicateOptions:
    """The config's `curation.near_duplicates`."""

    threshold: Share = 0.9  # Jaccard similarity of their words
    shingle: Count = 1  # words that are compared as one: 3 heeds their order
    rows: CurationAction = "report"  # rows that are alike as a whole, within and across sources
    instructions: CurationAction = "report"  # rows that ask alike, whatever they answer


@dataclass(frozen=True)
class FilterAction:
    """What stands beside the thresholds of an entry of `curation.filters`."""

    action: CurationAction = "report"
    keep_share: Annotated[float, "[0, 1]"] = 0.0  # of all rows may stay though the filter objects


@dataclass(frozen=True)
class SelectOptions:
    """The config's `curation.select`: the best rows, as many of each kind as there can be."""

    rows: Count
    by: str = "score"  # score, or module.function(conversation) -> float of your own
    spread: Literal["task", "cluster", "none"] = "task"  # over types of task, over clusters of words, or not at all


@dataclass(frozen=True)
class CurationOptions:
    """The config's `curation`."""

    leaks: LeakOptions | None = LeakOptions()  # null splits and trains without looking for leaks
    decontaminate: list[str | dict] = field(default_factory=list)  # files or datasets of questions that no row may hold
    near_duplicates: NearDuplicateOptions | None = NearDuplicateOptions()
    filters: dict[str, dict | None] = field(default_factory=dict)  # by name: thresholds, and off, report or remove
    own_filters: list[str] = field(default_factory=list)  # module.function(conversation) -> the reason to remove it
    select: SelectOptions | None = None
    output: Literal["jsonl", "parquet"] = "jsonl"  # what mode=curate writes the rows to that are kept

    def __post_init__(self):
        if self.decontaminate and self.leaks is None:
            raise ConfigError("curation.decontaminate needs curation.leaks. Write curation=report, or leave it out.")

    @property
    def removes_rows(self) -> bool:
        """Whether rows are removed for anything but a leak."""
        twins = self.near_duplicates
        actions = [twins.rows, twins.instructions] if twins else []
        actions += [values.get("action", "report") for values in self.filters.values() if values]
        return "remove" in actions or bool(self.own_filters or self.select)
