"""Scores against figures by hand and slow references of ROUGE-L and chrF."""

import re
from collections import Counter
from statistics import fmean

import pytest

from sft_recipes.evaluation.text_metrics import score_answers, score_by_length

SAID = [
    ("The capital of Kelthia is Pinemoor.", "The capital of Kelthia is Pinemoor."),
    ("Pinemoor is the capital of Kelthia.", "The capital of Kelthia is Pinemoor."),
    ("the   CAPITAL, of kelthia", "The capital of Kelthia is Pinemoor."),
    ("What is the food of the willowtoad?", "The willowtoad eats moths."),
    ("The willowtoad is orange.", "Orange, like the fire newt of Älvsö and 3 others."),
]
ANSWERS = [{"text": text, "reference": reference, "stops": True} for text, reference in SAID]


def common(first: list[str], second: list[str]) -> int:
    """The length of the longest common subsequence, by trying everything."""
    if not first or not second:
        return 0
    if first[0] == second[0]:
        return 1 + common(first[1:], second[1:])
    return max(common(first[1:], second), common(first, second[1:]))


def rouge_l(text: str, reference: str) -> float:
    """Lin 2004, equations 2 to 4 with beta = 1, on lowercase words of letters and digits."""
    said, true = (re.findall(r"[a-z0-9]+", words.lower()) for words in (text, reference))
    recall, precision = (common(said, true) / len(words) for words in (true, said))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def chrf(pairs: list[tuple[str, str]], longest: int = 6, beta: float = 2) -> float:
    """Popović 2015: F2 of the mean precision and recall of character n-grams without spaces, counted over the corpus."""
    shares = []
    for n in range(1, longest + 1):
        grams = [
            [Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in ("".join(t.split()) for t in pair)]
            for pair in pairs
        ]
        shared = sum((said & true).total() for said, true in grams)
        shares.append((shared / sum(s.total() for s, _ in grams), shared / sum(t.total() for _, t in grams)))
    precision, recall = map(fmean, zip(*shares, strict=True))
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def test_exact_match_is_letter_for_letter():
    texts = ["yes", "Yes", "yes ", "yes.", "yes"]
    answers = [{"text": text, "reference": "yes", "stops": place < 3} for place, text in enumerate(texts)]
    found = score_answers(answers)
    assert (found["rows"], found["exact_match"], found["stops"]) == (5, 0.4, 0.6)


@pytest.mark.parametrize(("text", "reference"), SAID)
def test_rouge_l_is_that_of_a_slow_longest_common_subsequence(text, reference):
    found = score_answers([{"text": text, "reference": reference, "stops": True}])
    assert found["rouge_l"] == pytest.approx(rouge_l(text, reference))


def test_rouge_l_of_several_answers_is_their_mean():
    assert score_answers(ANSWERS)["rouge_l"] == pytest.approx(fmean(rouge_l(*pair) for pair in SAID))


def test_rouge_l_by_hand():
    # "the", "capital", "of", "kelthia" are common to 6 and 6 words
    found = score_answers([ANSWERS[1]])
    assert found["rouge_l"] == pytest.approx(4 / 6)


@pytest.mark.parametrize("pairs", [SAID[1:2], SAID[2:4], SAID])
def test_chrf_is_that_of_a_slow_count_of_n_grams(pairs):
    found = score_answers([{"text": text, "reference": reference, "stops": True} for text, reference in pairs])
    assert found["chrf"] == pytest.approx(chrf(pairs))


def test_a_script_without_latin_letters_has_no_rouge_l_but_a_chrf():
    found = score_answers([{"text": "首都是北京。", "reference": "首都是北京。", "stops": True}])
    assert (found["exact_match"], found["rouge_l"], found["chrf"]) == (1.0, 0.0, 1.0)


def test_an_empty_answer_scores_nothing():
    found = score_answers([{"text": "", "reference": "The willowtoad eats moths.", "stops": True}])
    assert found == {"rows": 1, "exact_match": 0.0, "stops": 1.0, "rouge_l": 0.0, "chrf": 0.0}


def test_the_halves_are_split_at_the_median_reference():
    answers = [{"text": "b", "reference": reference, "stops": True} for reference in ("a", "b", "bb", "bbbb", "b")]
    found = score_by_length(answers)
    assert {name: half["rows"] for name, half in found.items()} == {"short": 3, "long": 2}
    assert (found["short"]["exact_match"], found["long"]["exact_match"]) == (pytest.approx(2 / 3), 0.0)


def test_references_of_one_length_have_no_halves():
    assert score_by_length([{"text": "a", "reference": "b", "stops": True}] * 4) == {}
