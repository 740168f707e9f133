"""How close answers come to their references: exact match, ROUGE-L and chrF, each a share from 0 to 1."""

import logging
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from sft_recipes.config.metrics import metrics_on

Answers = Sequence[Mapping[str, Any]]  # each with `text`, `reference` and `stops`


def score_answers(answers: Answers) -> dict[str, float]:
    """The number of `rows`, and for every metric on answers in METRICS the value of the function here with its name.

    >>> score_answers([{"text": "a cat", "reference": "a cat", "stops": True}])["exact_match"]
    1.0
    """
    return {"rows": len(answers)} | {metric.name: globals()[metric.name](answers) for metric in metrics_on("answers")}


def exact_match(answers: Answers) -> float:
    """The share of answers that equal their reference."""
    return fmean(answer["text"] == answer["reference"] for answer in answers)


def stops(answers: Answers) -> float:
    """The share of answers that end with a stop token before evaluate.max_new_tokens."""
    return fmean(answer["stops"] for answer in answers)


def rouge_l(answers: Answers) -> float:
    """ROUGE-L (Lin 2004), the mean F-measure by rouge-score, whose words are Latin letters and digits only."""
    from rouge_score.rouge_scorer import RougeScorer  # nltk, SciPy and scikit-learn come with it: 0.7 s

    logging.getLogger("absl").setLevel(logging.WARNING)  # rouge-score logs which tokenizer it uses, every time
    scorer = RougeScorer(["rougeL"])
    return fmean(scorer.score(answer["reference"], answer["text"])["rougeL"].fmeasure for answer in answers)


def chrf(answers: Answers) -> float:
    """chrF (Popović 2015), sacrebleu's score of the whole corpus, which works for every script."""
    from sacrebleu import corpus_chrf

    return corpus_chrf([a["text"] for a in answers], [[a["reference"] for a in answers]]).score / 100


def score_by_length(answers: Answers) -> dict[str, dict[str, float]]:
    """The scores of the `short` and of the `long` half, where the references are of more than one length."""
    middle = median(len(answer["reference"]) for answer in answers)
    halves = {
        "short": [answer for answer in answers if len(answer["reference"]) <= middle],
        "long": [answer for answer in answers if len(answer["reference"]) > middle],
    }
    return {name: score_answers(half) for name, half in halves.items()} if all(halves.values()) else {}
