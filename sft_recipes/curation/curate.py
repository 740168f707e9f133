"""All steps of curation over a list of conversations, each removed row with its reasons."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sft_recipes.curation.diversity import classify_task
from sft_recipes.curation.near_duplicates import drop_near_duplicates
from sft_recipes.curation.selection import cluster_rows, select_best
from sft_recipes.curation.words import Conversation, drop_template, find_template, join_messages, split_words

EXAMPLES = 5  # rows that are named for every finding


@dataclass
class Curation:
    """Conversations, each known by its source and its number in it, and what was found in them by their places."""

    conversations: Sequence[Conversation]
    origins: Sequence[tuple[str, int]]
    scores: Sequence[float]
    reasons: dict[int, list[str]] = field(default_factory=dict)  # why each removed row was
    findings: dict[str, dict[str, Any]] = field(default_factory=dict)  # by filter: rows, action, removed, examples
    places: dict[str, list[int]] = field(default_factory=dict)  # by filter: the rows it found

    def add(self, name: str, action: str, found: Mapping[int, str], stay: int = 0) -> None:
        """Takes in what a filter found, and removes those beyond the first `stay` where the action is to."""
        places = self.places[name] = sorted(found)
        gone = places[stay:] if action == "remove" else []
        for place in gone:
            self.reasons.setdefault(place, []).append(f"{name}: {found[place]}")
        named = [(*self.origins[place], found[place]) for place in places[:EXAMPLES]]
        examples = [dict(zip(("source", "row", "reason"), values, strict=True)) for values in named]
        self.findings[name] = {"rows": len(found), "action": action, "removed": len(gone), "examples": examples}

    def remaining(self) -> list[int]:
        """The places that nothing removed so far."""
        return [place for place in range(len(self.origins)) if place not in self.reasons]

    def apply_filters(self, filters: Mapping[str, Any]) -> None:
        """Every filter over every row of messages; beside each function stand its `action` and `keep_share`."""
        talks = [(place, talk) for place, talk in enumerate(self.conversations) if "messages" in talk]
        for name, (function, chosen) in filters.items():
            found = {place: reason for place, talk in talks if (reason := function(talk)) is not None}
            self.add(name, chosen.action, found, int(chosen.keep_share * len(self.conversations)))

    def apply_near_duplicates(self, threshold: float, shingle: int, rows: str | bool, instructions: str | bool) -> None:
        """The actions for `rows`, compared as a whole, and for `instructions`, by what users ask: both among those
        that nothing removed yet."""
        steps = (
            ("rows", rows, (), "is like"),
            ("instructions", instructions, ("user",), "asks, with another answer, as"),
        )
        for name, action, roles, what in steps:
            if action in ("off", False):
                continue
            places = self.remaining()
            if roles:  # twins as a whole are counted above, and raw text asks nothing
                alike = set(self.places.get("near_duplicate_rows", ()))
                places = [place for place in places if place not in alike and "messages" in self.conversations[place]]
            words = [split_words(join_messages(self.conversations[place], *roles)) for place in places]
            template = find_template(words)
            bare, scores = [drop_template(text, template) for text in words], [self.scores[place] for place in places]
            found = {}
            for row, twin in drop_near_duplicates(bare, scores, threshold, shingle).items():
                source, number = self.origins[places[twin]]  # of the row that stays
                found[places[row]] = f"it {what} row {number} of data.{source}"
            self.add(f"near_duplicate_{name}", action, found)

    def apply_selection(self, rows: int, spread: str) -> dict[str, int]:
        """Removes all but the best `rows`, spread over kinds (`task`, `cluster` or `none`); how many each has left."""
        places = self.remaining()
        talks, kinds = [self.conversations[place] for place in places], ["all"] * len(places)
        if spread == "task":
            kinds = list(map(classify_task, talks))
        elif spread == "cluster":
            words = [split_words(join_messages(talk, "user")) for talk in talks]
            kinds = [f"cluster {number}" for number in cluster_rows(words)]
        taken = select_best([self.scores[place] for place in places], kinds, rows)
        beaten = set(places).difference(places[index] for index in taken)
        reasons = {place: f"its score {self.scores[place]:.2f} is not among the best" for place in beaten}
        self.add("select", "remove", reasons)
        return dict(Counter(kinds[index] for index in taken).most_common())
