"""How close answers come to their references: exact match, ROUGE-L and chrF, each a share from 0 to 1."""

import logging
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_chrf


def score_answers(answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`rows`, `exact_match`, `stops`, `rouge_l` and `chrf` of answers with `text`, `reference` and `stops`.

    ROUGE-L (Lin 2004) is the mean F-measure by rouge-score, which knows words of Latin letters and digits alone; chrF
    (Popović 2015) is sacrebleu's of the whole corpus, and serves every script.

    >>> score_answers([{"text": "a cat", "reference": "a cat", "stops": True}])["exact_match"]
    1.0
    """
    logging.getLogger("absl").setLevel(logging.WARNING)  # rouge-score says which tokenizer it takes, every time
    scorer = RougeScorer(["rougeL"])
    texts, references = [[answer[key] for answer in answers] for key in ("text", "reference")]
    return {
        "rows": len(answers),
        "exact_match": fmean(text == reference for text, reference in zip(texts, references, strict=True)),
        "stops": fmean(answer["stops"] for answer in answers),
        "rouge_l": fmean(map(lambda said, true: scorer.score(true, said)["rougeL"].fmeasure, texts, references)),
        "chrf": corpus_chrf(texts, [references]).score / 100,
    }


def score_by_length(answers: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The scores of the `short` and of the `long` half, where the references are of more than one length."""
    middle = median(len(answer["reference"]) for answer in answers)
    halves = {
        "short": [answer for answer in answers if len(answer["reference"]) <= middle],
        "long": [answer for answer in answers if len(answer["reference"]) > middle],
    }
    return {name: score_answers(half) for name, half in halves.items()} if all(halves.values()) else {}
