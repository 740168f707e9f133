"""Near-duplicates among 100,000 rows: seconds, memory, recall and false removals: `python benchmarks/deduplicate.py`.

The rows are made here: words drawn with the frequencies of English (Zipf, 50,000 words), 20 to 400 a row, a fifth of
them after one of 20 instructions that many rows share. Planted are copies with edits (words replaced, dropped or put
in) whose Jaccard similarity to their original, counted here by Python's Counter, is at least 0.95, and others between
0.65 and 0.75, which are different rows. Every removal is held against its kept twin by the same count. `--file
rows.jsonl` takes the texts of a file (every string of a row), whose own near-duplicates are left out first.
"""

import argparse
import json
import random
import resource
import time
from collections import Counter
from itertools import accumulate

from sft_recipes.curation import near_duplicates
from sft_recipes.curation.near_duplicates import drop_near_duplicates
from sft_recipes.curation.words import split_words


def main() -> None:
    """Prints one line a measurement."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--planted", type=int, default=2_000, help="copies of each kind")
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--shingle", type=int, default=1)
    parser.add_argument("--file")
    parser.add_argument("--sketches", action="store_true", help="as for more than 200,000 rows, by rensa")
    options = parser.parse_args()
    if options.sketches:
        near_duplicates.EXACT_ROWS = 0
    draw = random.Random(0)
    texts = read_texts(options.file) if options.file else make_texts(options.rows - 2 * options.planted, draw)
    originals = draw.sample(range(len(texts)), 2 * options.planted)
    near = [edit(texts[place], draw, 0.95, 1.0) for place in originals[: options.planted]]
    far = [edit(texts[place], draw, 0.65, 0.75) for place in originals[options.planted :]]
    rows = texts + near + far
    started = time.process_time()
    clock = time.perf_counter()
    twins = drop_near_duplicates(map(split_words, rows), [0.0] * len(rows), options.threshold, options.shingle)
    ended, clock = time.process_time(), time.perf_counter() - clock
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    planted = [len(texts) + place for place in range(len(near))]
    others = range(len(texts) + len(near), len(rows))
    wrong = sum(
        similarity(*map(split_words, (rows[row], rows[twin]))) < options.threshold for row, twin in twins.items()
    )
    mean = sum(len(row.split()) for row in rows) / len(rows)
    print(f"{len(rows):,} rows, {mean:.0f} words a row, threshold {options.threshold:g}")
    print(f"{ended - started:.1f} s of one core ({clock:.1f} s by the clock), peak memory {memory:.2f} GiB")
    print(f"recall at Jaccard 0.95 and above: {sum(row in twins for row in planted) / len(planted):.4f}")
    print(f"removed of those at Jaccard 0.65 to 0.75: {sum(row in twins for row in others) / len(others):.4f}")
    print(f"removed in all: {len(twins):,}; of these below the threshold by an independent count: {wrong}")


def make_texts(number: int, draw: random.Random) -> list[str]:
    """So many texts of words that are as frequent as a language's."""
    vocabulary = [
        f"w{draw.randrange(36**5):x}".translate(str.maketrans("0123456789", "ghijklmnop")) for _ in range(50_000)
    ]
    weights = list(accumulate(1 / rank for rank in range(1, len(vocabulary) + 1)))
    shared = [" ".join(draw.choices(vocabulary, cum_weights=weights, k=25)) for _ in range(20)]
    texts = []
    for _ in range(number):
        length = min(400, max(20, round(draw.lognormvariate(4.4, 0.6))))
        text = " ".join(draw.choices(vocabulary, cum_weights=weights, k=length))
        texts.append(f"{draw.choice(shared)} {text}" if draw.random() < 0.2 else text)
    return texts


def read_texts(path: str) -> list[str]:
    """The strings of each line's object, without those that are near-duplicates of others at 0.6."""
    with open(path, encoding="utf-8") as lines:
        texts = ["\n".join(v for v in json.loads(line).values() if isinstance(v, str)) for line in lines]
    alike = drop_near_duplicates([split_words(text) for text in texts], [0.0] * len(texts), 0.6)
    return [text for place, text in enumerate(texts) if place not in alike and len(split_words(text)) >= 20]


def edit(text: str, draw: random.Random, low: float, high: float) -> str:
    """The text with so many words replaced, dropped or put in that its similarity falls into the interval."""
    first, words = split_words(text), split_words(text)
    target = draw.uniform(low, min(high, 0.999))
    while True:
        edited, place = list(words), draw.randrange(len(words))
        new = f"x{chr(97 + draw.randrange(26))}{chr(97 + draw.randrange(26))}"
        if not any(map(str.isdigit, words[place])):  # another number would make it another row
            edited[place : place + 1] = draw.choice([[new], [], [words[place], new]])
        found = similarity(first, edited)
        if found < low:
            return " ".join(words)
        words = edited
        if found <= target:
            return " ".join(words)


def similarity(first: list[str], second: list[str]) -> float:
    """Jaccard's similarity of two lists of words, each counted as often as it occurs."""
    one, other = Counter(first), Counter(second)
    return sum((one & other).values()) / max(1, sum((one | other).values()))


if __name__ == "__main__":
    main()
