"""Training rows that say what held-out rows say: near-duplicates, and rows that share their passages."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from sft_recipes.curation.near_duplicates import TwinIndex
from sft_recipes.curation.words import TEMPLATE_SAMPLE, drop_template, find_template, hash_windows


class LeakIndex:
    """Held-out texts, as lists of words, and which of them a training text gives away.

    It does where their Jaccard similarity is at least `threshold`, and where runs of `window` words that both have
    cover at least `coverage` of the held-out one (the rule of Tulu 3: 8 words, half; Lambert et al. 2024, section
    3.2). In a text of fewer than four such runs one is a way to ask, not a passage: by it the question `Can you tell me
    which language is spoken in Lorria?` would give away the same about every land, so that those are compared as a
    whole alone. Words of the `template` count for neither.
    """

    def __init__(
        self,
        texts: Iterable[Sequence[str]],
        threshold: float = 0.8,
        window: int = 8,
        coverage: float = 0.5,
        template: frozenset[int] = frozenset(),
    ):
        self.template, self.window, self.coverage = template, window, coverage
        texts = [drop_template(list(text), template) for text in texts]
        self.twins, self.lengths = TwinIndex(threshold, rows=texts), [len(text) for text in texts]
        self.places: dict[int, list[tuple[int, int]]] = defaultdict(list)  # of each run of words: text, first word
        for number, text in enumerate(texts):
            for place, run in enumerate(hash_windows(text, window) if len(text) >= 4 * window else ()):
                self.places[run].append((number, place))

    def find_leak(self, words: Sequence[str]) -> int | None:
        """The number of a held-out text that this training text gives away; None where there is none."""
        words = drop_template(list(words), self.template)
        if (twin := next(self.twins.find_twins(words), None)) is not None:
            return twin
        covered: dict[int, set[int]] = defaultdict(set)
        for run in hash_windows(words, self.window):
            for number, place in self.places.get(run, ()):
                covered[number].update(range(place, place + self.window))
        shared = (number for number, some in covered.items() if len(some) >= self.coverage * self.lengths[number])
        return min(shared, default=None)


def hold_out_groups(
    drawn: Sequence[int],
    rows: int,
    read_texts: Callable[[Sequence[int]], Iterable[Sequence[str]]],
    threshold: float = 0.8,
) -> np.ndarray:
    """The places of the rows to hold out, in order: as many as were `drawn`, with all their near-duplicates.

    Where none of the drawn rows has one these are the drawn rows themselves. A group that would make them too many
    stays in training as a whole, so that they may become fewer, and none where all rows belong together. `read_texts`
    gives the rows of these places as words: all are read once, and again for each further link of a chain of twins.
    """
    group = {int(place): {int(place)} for place in drawn}  # of each place that was reached, one set a group
    template = find_template(list(read_texts(range(0, rows, max(1, rows // TEMPLATE_SAMPLE)))))
    new = set(group)
    while new:
        names = sorted(new)
        index = TwinIndex(threshold, rows=[drop_template(list(words), template) for words in read_texts(names)])
        new = set()
        for place, words in enumerate(read_texts(range(rows))):
            for twin in index.find_twins(drop_template(list(words), template)):
                if place not in group:
                    new.add(place)
                mine, its = group.setdefault(place, {place}), group[names[twin]]
                if mine is not its:
                    its |= mine
                    group |= dict.fromkeys(mine, its)
    taken: list[int] = []
    seen: set[int] = set()
    for place in map(int, drawn):
        if place not in seen and len(taken) + len(group[place]) <= len(drawn):
            taken += group[place]
        seen |= group[place]
    return np.sort(np.array(taken, dtype=np.int64))
