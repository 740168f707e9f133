"""Thoughts before an answer, told apart from it by the markers that models write around them."""

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

# How published chat templates open and close a thought: Qwen, DeepSeek, SmolLM; Gemma; gpt-oss; Mistral; Cohere.
MARKERS = (
    ("<think>", "</think>"),
    ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
ANSWER_HEADER = re.compile(r"\s*(<\|start\|>assistant)?<\|channel\|>final<\|message\|>")  # gpt-oss writes one


def split_thought(text: str, prompt: str = "") -> tuple[str, str]:
    """The thought, '' where there is none or an empty one, and the answer behind it.

    Some templates end the `prompt` with the opening marker; without the closing one all of the text is thought.

    >>> split_thought("<think>Two and two.</think> Four."), split_thought("Two", "<think> "), split_thought("Four.")
    (('Two and two.', 'Four.'), ('Two', ''), ('', 'Four.'))
    """
    for opening, closing in MARKERS:
        opened = prompt.rstrip().endswith(opening)
        if opened or text.lstrip().startswith(opening):
            thought, _, answer = (text if opened else text.partition(opening)[2]).partition(closing)
            return thought.strip(), ANSWER_HEADER.sub("", answer, count=1).lstrip()
    return "", ANSWER_HEADER.sub("", text, count=1)


def score_thoughts(answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The `share` of answers that think, the mean `tokens` of a thought, and the share of them that `answered`, too."""
    thoughts = [answer for answer in answers if "thought" in answer]
    found = {"share": len(thoughts) / len(answers)}
    if thoughts:
        found["tokens"] = fmean(answer["thought_tokens"] for answer in thoughts)
        found["answered"] = fmean(bool(answer["text"].strip()) for answer in thoughts)
    return found
