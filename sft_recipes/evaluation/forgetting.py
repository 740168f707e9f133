"""How much a run forgot: the verdict on a regression."""

from typing import Literal

Verdict = Literal["passed", "warning", "failed"]


def classify_regression(change: float, warn_above: float = 0.10, fail_above: float = 0.15) -> Verdict:
    """The verdict on a relative rise of the loss on raw text (0.10 is 10 %); NaN has failed.

    >>> [classify_regression(change) for change in (-0.02, 0.10, 0.11, 0.15, 0.16, float("nan"))]
    ['passed', 'passed', 'warning', 'warning', 'failed', 'failed']
    """
    if change <= warn_above:
        return "passed"
    return "warning" if change <= fail_above else "failed"
