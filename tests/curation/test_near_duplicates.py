"""Near-duplicates: the join against a count of every pair, and which of two rows stays."""

import random
from collections import Counter
from itertools import combinations

import pytest

from sft_recipes.curation.near_duplicates import TwinIndex, drop_near_duplicates
from sft_recipes.curation.words import drop_template, find_template, split_words


def similarity(first: list[str], second: list[str]) -> float:
    """Jaccard's similarity, by counting."""
    one, other = Counter(first), Counter(second)
    return sum((one & other).values()) / sum((one | other).values())


def random_rows(seed: int, number: int = 150) -> list[list[str]]:
    """Short rows of few words, so that many are alike."""
    draw = random.Random(seed)
    rows = [draw.choices("abcdefghijklmnop", k=draw.randint(1, 14)) for _ in range(number // 2)]
    return rows + [[word if draw.random() > 0.1 else draw.choice("xyz") for word in draw.choice(rows)] for _ in rows]


@pytest.mark.parametrize("threshold", [0.5, 0.75, 0.8, 0.9, 1.0])
def test_every_pair_that_is_alike_is_found_and_no_other(threshold):
    rows = random_rows(seed=int(threshold * 100))
    index = TwinIndex(threshold, rows=rows)
    found = {(one, other) for other, row in enumerate(rows) for one in index.find_twins(row) if one < other}
    pairs = combinations(range(len(rows)), 2)
    assert found == {(i, j) for i, j in pairs if similarity(rows[i], rows[j]) >= threshold - 1e-9}
    assert found


def test_of_two_alike_the_better_stays_and_of_equals_the_earlier():
    rows = [split_words("the river rises in the hills"), split_words("The river  rises, in the hills!"), ["else"]]
    assert drop_near_duplicates(rows, [0.0, 1.0, 0.0]) == {0: 1}
    assert drop_near_duplicates(rows, [0.0, 0.0, 0.0]) == {1: 0}


def test_rows_are_held_against_rows_that_stay_so_that_a_chain_does_not_vanish():
    words = [f"w{letter}" for letter in "abcdefghijklmnopqrst"]
    rows = [words, [*words[:19], "x"], [*words[:18], "y", "x"]]  # 19 of 21, then 19 of 21, but 18 of 22 from end to end
    assert drop_near_duplicates(rows, [3.0, 2.0, 1.0], 0.9) == {1: 0}


def test_two_sums_that_differ_by_a_number_are_two():
    story = "A farmer has 12 sheep and sells 5 of them on a long and rainy market day in the town by the sea. How many are left?"
    rows = [split_words(story), split_words(story.replace("5", "7"))]
    assert similarity(*rows) > 0.9
    assert drop_near_duplicates(rows, [0.0, 0.0]) == {}
    assert drop_near_duplicates([split_words("What is 3 + 4?"), split_words("What is 3 - 4?")], [0.0, 0.0]) == {}


def test_shingles_of_three_heed_the_order():
    rows = [
        ["the", "dog", "bites", "the", "man", "in", "the", "park"],
        ["the", "man", "bites", "the", "dog", "in", "the", "park"],
    ]
    assert drop_near_duplicates(rows, [0.0, 0.0], shingle=1) == {1: 0}
    assert drop_near_duplicates(rows, [0.0, 0.0], shingle=3) == {}


def test_signs_of_a_script_without_spaces_are_words_each():
    assert split_words("水果 Obst") == ["水", "果", "obst"]


def test_an_instruction_before_every_row_makes_no_twins_of_them():
    ask = "Read the following sentence with care and say in one word how its writer feels about the product described"
    rows = [[*split_words(ask), f"noun{letter}", f"verb{letter}"] for letter in "abcdefghijklmnopqrstuvwxyz"]
    assert drop_near_duplicates(rows, [0.0] * len(rows), 0.8)  # as they stand all are alike
    template = find_template(rows)
    assert drop_template(rows[0], template) == ["nouna", "verba"]
    assert drop_near_duplicates([drop_template(row, template) for row in rows], [0.0] * len(rows), 0.8) == {}


@pytest.mark.parametrize("threshold", [0.9, 0.7])
def test_above_200_000_rows_sketches_find_what_the_exact_join_finds_and_nothing_else(monkeypatch, threshold):
    pytest.importorskip("rensa")
    draw = random.Random(1)
    rows = [[f"w{chr(97 + draw.randrange(26))}{chr(97 + draw.randrange(26))}" for _ in range(40)] for _ in range(300)]
    rows += [[*row[:2], "other", *row[3:]] for row in rows[:100]] + [["sum", "3"], ["sum", "4"], []]
    exact = drop_near_duplicates(rows, [0.0] * len(rows), threshold)
    monkeypatch.setattr("sft_recipes.curation.near_duplicates.EXACT_ROWS", 0)
    monkeypatch.setattr(
        "sft_recipes.curation.near_duplicates.TwinIndex.find_candidates", None
    )  # which sketches do not use
    assert drop_near_duplicates(rows, [0.0] * len(rows), threshold) == exact == {300 + n: n for n in range(100)}
