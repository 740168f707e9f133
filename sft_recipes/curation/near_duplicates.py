"""Near-duplicates by Jaccard on words, exactly: a join by prefixes of rare words, without hashing or sampling."""

import logging
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import count
from math import ceil

import numpy as np

log = logging.getLogger(__name__)
EXACT_ROWS = 200_000  # above, candidates come from sketches, where the extra `curate` is installed
PreparedRow = tuple[array, int]  # the numbers of a row's words from rare to frequent, and a hash of its digits


def drop_near_duplicates(
    rows: Iterable[Sequence[str]], scores: Sequence[float], threshold: float = 0.9, shingle: int = 1
) -> dict[int, int]:
    """For each row to be left out the row that stays in its place, one at least `threshold` like it.

    Rows are lists of words. Of two alike the one with the higher score stays, of equals the earlier one. A row without
    words has no twin. Rows with different numbers are different, however long they are.
    """
    index, kept, twins = TwinIndex(threshold, shingle), [], {}
    prepared = index.count_words(rows)
    if len(prepared) > EXACT_ROWS:
        try:
            index = SketchIndex(threshold)
        except ImportError:
            log.warning("%s rows and more are faster with pip install 'sft-recipes[curate]'.", f"{EXACT_ROWS:,}")
    for place in sorted(range(len(prepared)), key=lambda place: (-scores[place], place)):
        twin = next(index.find_prepared(*prepared[place]), None)
        if twin is not None:
            twins[place] = kept[twin]
        elif prepared[place][0]:
            index.add_prepared(*prepared[place])
            kept.append(place)
    return twins


class TwinIndex:
    """Rows to which those with a Jaccard similarity of at least `threshold` are found.

    Two sets of n and m words that share at least k = ceil(t (n + m) / (1 + t)) have one in common among the first
    n - ceil(t n) + 1 and m - ceil(t m) + 1, in any one order (prefix filter, Chaudhuri, Ganti and Kaushik 2006). From
    rare to frequent few rows meet there. Most of those are dropped because behind the first word that they share there
    is no room for k (PPJoin, Xiao et al. 2008), and the others are compared word by word.
    """

    def __init__(self, threshold: float, shingle: int = 1, rows: Iterable[Sequence[str]] = ()):
        self.threshold, self.shingle = threshold, shingle
        self.vocabulary: dict[str, int] = {}
        self.rows: list[array] = []
        self.postings: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        for prepared in self.count_words(rows):
            self.add_prepared(*prepared)

    def count_words(self, rows: Iterable[Sequence[str]]) -> list[PreparedRow]:
        """The rows, none of which is added yet, and the order of their words."""
        found = []
        for words in rows:
            numbered = make_shingles(words, self.shingle)
            ids = [self.vocabulary.setdefault(word, len(self.vocabulary)) for word in numbered]
            found.append((array("i", ids), hash_numbers(words)))
        counts = np.zeros(len(self.vocabulary), dtype=np.int64)
        for ids, _ in found:
            counts[ids] += 1
        ranks = np.empty(len(counts), dtype=np.int32)
        ranks[np.argsort(counts, kind="stable")] = np.arange(len(counts))
        self.vocabulary = dict(zip(self.vocabulary, ranks.tolist(), strict=True))
        return [(array("i", np.sort(ranks[ids]).tobytes()), numbers) for ids, numbers in found]

    def find_twins(self, words: Sequence[str]) -> Iterator[int]:
        """The numbers of the rows, in the order they were added in, that are alike."""
        numbered = make_shingles(words, self.shingle)
        ranks = sorted(self.vocabulary.get(word, -1 - place) for place, word in enumerate(numbered))  # unknown: rarest
        return self.find_prepared(array("i", ranks), hash_numbers(words))

    def add_prepared(self, ranks: array, numbers: int) -> None:
        """Takes a row in."""
        for place, rank in enumerate(ranks[: self.prefix_length(len(ranks))]):
            self.postings[rank, numbers].append((len(self.rows), place))
        self.rows.append(ranks)

    def find_prepared(self, ranks: array, numbers: int) -> Iterator[int]:
        """As `find_twins`: the candidates that are alike, word by word."""
        own = set(ranks)
        for row, needed in self.find_candidates(ranks, numbers):
            if len(own.intersection(self.rows[row])) >= needed:
                yield row

    def find_candidates(self, ranks: array, numbers: int) -> Iterator[tuple[int, int]]:
        """Rows that can be alike, and how many words they would have to share."""
        size, met, ratio = len(ranks), set(), self.threshold / (1 + self.threshold)
        for place, rank in enumerate(ranks[: self.prefix_length(size)]):
            for row, other in self.postings.get((rank, numbers), ()):
                if row not in met:
                    met.add(row)
                    length = len(self.rows[row])
                    needed = ceil(ratio * (size + length) - 1e-9)
                    if size - place >= needed <= length - other:
                        yield row, needed

    def prefix_length(self, size: int) -> int:
        """How many words of so many are looked up."""
        return size - ceil(self.threshold * size - 1e-9) + 1


class SketchIndex(TwinIndex):
    """As `TwinIndex`, of prepared rows whose candidates rensa's MinHash finds: a few are missed, none is wrong.

    Two rows of similarity s share one of b bands of r hashes with a probability of 1 - (1 - s^r)^b: at r = 8 and b = 16
    0.9999 for 0.9, at r = 4 and b = 32 0.9999 for 0.7.
    """

    def __init__(self, threshold: float):
        from rensa import RMinHash, RMinHashLSH

        super().__init__(threshold)
        # Of the rows that are added, find_candidates has asked for the sketch just before
        self.sketch = lru_cache(1)(lambda ranks: RMinHash.from_token_sets([ranks], num_perm=128, seed=0)[0])
        self.lsh = RMinHashLSH(threshold, 128, 16 if threshold >= 0.9 else 32)
        self.numbers: list[int] = []

    def add_prepared(self, ranks: array, numbers: int) -> None:
        """Takes a row in."""
        self.lsh.insert(len(self.rows), self.sketch(tuple(map(str, ranks))))
        self.rows.append(ranks)
        self.numbers.append(numbers)

    def find_candidates(self, ranks: array, numbers: int) -> Iterator[tuple[int, int]]:
        """As `TwinIndex`."""
        ratio = self.threshold / (1 + self.threshold)
        for row in sorted(self.lsh.query(self.sketch(tuple(map(str, ranks))))) if ranks else ():
            if self.numbers[row] == numbers:
                yield row, ceil(ratio * (len(ranks) + len(self.rows[row])) - 1e-9)


def make_shingles(words: Sequence[str], size: int) -> list[str]:
    """The words themselves, or every `size` of them in a row; the second `the` is another one than the first.

    >>> make_shingles(["the", "cat", "the"], 1), make_shingles(["the", "cat", "the"], 2)
    (['the', 'cat', 'the 1'], ['the cat', 'cat the'])
    """
    if size > 1 and words:
        words = [" ".join(words[start : start + size]) for start in range(max(1, len(words) - size + 1))]
    seen = defaultdict(count)  # how often each word came before
    return [f"{word} {number}" if (number := next(seen[word])) else word for word in words]


def hash_numbers(words: Sequence[str]) -> int:
    """A hash of the words with digits, in any order: two arithmetic problems are two, whatever else they share.

    >>> hash_numbers(["3", "apples"]) == hash_numbers(["4", "apples"])
    False
    """
    return hash(tuple(sorted(word for word in words if not word.isalpha() and any(map(str.isdigit, word)))))
