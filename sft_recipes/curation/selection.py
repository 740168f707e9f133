"""The better rows: a score by simple signs, and the best ones spread over types of task."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from math import log
from zlib import crc32

import numpy as np

from sft_recipes.curation.filters import FILTERS, count_words, last_answer
from sft_recipes.curation.words import Conversation, join_messages, split_words

BAD_SIGNS = ("near_empty_answer", "encoding_damage", "template_tokens", "repetition", "abrupt_end", "echo", "refusal")


def score_quality(conversation: Conversation, count: Callable[[str], int] = count_words) -> float:
    """Between 0 and 1, a heuristic that knows nothing of truth: it prefers long, varied, finished answers.

    The mean of four parts: the answers' length in tokens by `count` (logarithmic, full at 400), their length over the
    instructions' (full where it is as long), the share of different words in the first 200 of the last answer, and 1
    unless a filter objects (empty, damaged, repeated, cut off, echoed, refused); 0.01 less for two spaces in a line or
    a space at an end, so that of copies the tidy one is the better. Short exact answers score low.
    """
    answered, asked = (count(join_messages(conversation, role)) for role in ("assistant", "user"))
    words = split_words(last_answer(conversation))[:200]
    whole = not any(FILTERS[name](conversation) for name in BAD_SIGNS) if "messages" in conversation else True
    parts = (
        min(1.0, log(1 + answered) / log(401)),
        min(1.0, answered / max(1, asked)),
        len(set(words)) / max(1, len(words)),
        whole,
    )
    untidy = re.search(r"\S  +\S|\A\s|\s\Z", join_messages(conversation)) is not None
    return sum(parts) / len(parts) - 0.01 * untidy


def select_best(scores: Sequence[float], kinds: Sequence[Hashable], number: int) -> list[int]:
    """The places, in order, of so many rows: the best of each kind in turn, as long as it has any (LIMA's spread).

    >>> select_best([0.9, 0.8, 0.7, 0.1], ["code", "code", "code", "maths"], 2)
    [0, 3]
    """
    queues: dict[Hashable, list[int]] = defaultdict(list)
    for place in sorted(range(len(scores)), key=lambda place: (-scores[place], place)):
        queues[kinds[place]].append(place)
    ranked = sorted(((turn, -scores[place], place) for queue in queues.values() for turn, place in enumerate(queue)))
    return sorted(place for _, _, place in ranked[:number])


def cluster_rows(texts: Sequence[Sequence[str]], rounds: int = 10) -> list[int]:
    """The cluster of each list of words: k-means (Lloyd) on their rare words, sqrt(n / 2) clusters.

    A row is a vector of 512 places to which words are hashed, weighed by tf-idf, of length 1; the first centre is the
    first row, each further one that row of up to 2,000 which is farthest from those before it.
    """
    bags = [Counter(crc32(word.encode()) % 512 for word in words) for words in texts]
    seen = Counter(place for bag in bags for place in bag)
    rows = np.zeros((len(texts), 512), dtype=np.float32)
    for row, bag in zip(rows, bags, strict=True):
        for place, times in bag.items():
            row[place] = times * log((1 + len(texts)) / (1 + seen[place]))
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    number = min(max(1, round((len(texts) / 2) ** 0.5)), len(texts))
    some = rows[:: max(1, len(rows) // 2000)]
    centres, nearest = some[:1], some @ some[0] if len(some) else np.zeros(0)
    while len(centres) < number:
        centres = np.vstack([centres, some[int(nearest.argmin())]])
        nearest = np.maximum(nearest, some @ centres[-1])
    for _ in range(rounds if len(rows) else 0):
        chosen = (rows @ centres.T).argmax(axis=1)
        for cluster in range(number):
            mean = rows[chosen == cluster].sum(axis=0)
            if norm := np.linalg.norm(mean):
                centres[cluster] = mean / norm
    return (rows @ centres.T).argmax(axis=1).tolist() if len(rows) else []
