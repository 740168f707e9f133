"""A text as the words that are compared: numbers and operators kept, what a template repeats in every row left out."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain

# A run of letters and digits; of scripts without spaces each sign; operators, or 3 + 4 would be 3 - 4
UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[+*/=<>^%×÷−]|(?<!\w)-")
TEMPLATE_WORDS = 8  # in a row, that stand in a fifth of a source's rows
TEMPLATE_SAMPLE = 500  # rows that are looked at for them
Conversation = dict  # `messages`, or a raw `text`


def split_words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation.

    >>> split_words("What is 3 - 4? A well-known sum.")
    ['what', 'is', '3', '-', '4', 'a', 'well', 'known', 'sum']
    """
    return WORD.findall(text.lower())


def join_messages(conversation: Conversation, *roles: str) -> str:
    """The texts of these roles, all but the system's where none is named; of raw text the text.

    >>> join_messages({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}, "user")
    'Hi'
    """
    if "messages" not in conversation:
        return conversation.get("text", "")
    wanted = roles or ("user", "assistant", "tool")
    return "\n".join(str(m.get("content") or "") for m in conversation["messages"] if m["role"] in wanted)


def hash_windows(words: Sequence[str], size: int) -> list[int]:
    """A hash of every `size` words in a row, good for this process."""
    return list(map(hash, zip(*(words[start:] for start in range(min(size, len(words) + 1))), strict=False)))


def find_template(texts: Sequence[list[str]], share: float = 0.2) -> frozenset[int]:
    """The hashes of the 8 words in a row that stand in this share of the texts, and in 10 at least.

    An instruction that stands before every input would otherwise make all rows of a source near-duplicates. Texts that
    are the same count once.
    """
    different = {tuple(text) for text in texts[:: max(1, len(texts) // TEMPLATE_SAMPLE)]}
    counts = Counter(chain.from_iterable(set(hash_windows(text, TEMPLATE_WORDS)) for text in different))
    return frozenset(window for window, count in counts.items() if count >= max(10, share * len(different)))


def drop_template(words: list[str], template: frozenset[int]) -> list[str]:
    """The words that belong to no part of the template."""
    if not template:
        return words
    covered: set[int] = set()
    for start, window in enumerate(hash_windows(words, TEMPLATE_WORDS)):
        if window in template:
            covered.update(range(start, start + TEMPLATE_WORDS))
    return [word for place, word in enumerate(words) if place not in covered] if covered else words
