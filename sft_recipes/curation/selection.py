"""The better rows: a score by simple signs, and the best ones spread over types of task."""

import re
from collections import defaultdict
from collections.abc import Hashable, Sequence
from math import log

from sft_recipes.curation.filters import FILTERS, last_answer
from sft_recipes.curation.words import Conversation, join_messages, split_words

BAD_SIGNS = ("near_empty_answer", "encoding_damage", "template_tokens", "repetition", "abrupt_end", "echo", "refusal")


def score_quality(conversation: Conversation) -> float:
    """Between 0 and 1, a heuristic that knows nothing of truth: it prefers long, varied, finished answers.

    The mean of four parts: the answers' length in words (logarithmic, full at 300), the answers' length over the
    instructions' (full where it is as long), the share of different words in the first 200 of the last answer, and 1
    unless a filter objects (empty, damaged, repeated, cut off, echoed, refused); 0.01 less where two spaces stand in a
    line, so that of copies the tidy one is the better. Short exact answers score low.
    """
    said, asked = (len(split_words(join_messages(conversation, role))) for role in ("assistant", "user"))
    words = split_words(last_answer(conversation))[:200]
    whole = not any(FILTERS[name](conversation) for name in BAD_SIGNS) if "messages" in conversation else True
    parts = (
        min(1.0, log(1 + said) / log(301)),
        min(1.0, said / max(1, asked)),
        len(set(words)) / max(1, len(words)),
        whole,
    )
    untidy = re.search(r"\S  +\S", join_messages(conversation)) is not None
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
