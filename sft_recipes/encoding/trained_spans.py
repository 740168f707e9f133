"""Which parts of a rendered conversation carry loss: the answers, without what a row marks as untrained."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sft_recipes.errors import DataError


def select_trained_spans(
    text: str, spans: list[tuple[int, int]], messages: Sequence[Mapping], train_on: str
) -> Iterator[tuple[int, int, bool]]:
    """The spans that are encoded by themselves, and whether they are trained; the others are context.

    Raises DataError where an answer, or a part of one, has to be chosen and cannot be told apart.
    """
    wanted = choose_answers(messages, train_on)
    answers = [messages[index] for index in wanted]
    if all(wanted.values()) and not any("train_detail" in message for message in answers):
        yield from ((start, stop, True) for start, stop in spans)
        return
    if train_on != "all" and not any(wanted.values()):
        return
    if len(spans) != len(answers):
        raise DataError(f"the chat template marks {len(spans)} parts for {len(wanted)} answers, so none can be chosen")
    for (start, stop), message, trained in zip(spans, answers, wanted.values(), strict=True):
        if trained and "train_detail" in message:
            yield from split_answer(text, start, stop, message)
        elif trained or train_on == "all":
            yield start, stop, trained


def choose_answers(messages: Sequence[Mapping], train_on: str) -> dict[int, bool]:
    """The numbers of the assistant's messages, and whether each is trained; raises DataError for an untrained question
    where everything is trained."""
    if train_on == "all" and any(
        message["role"] != "assistant" and (message.get("train") is False or "train_detail" in message)
        for message in messages
    ):
        raise DataError("train_on=all cannot leave out a question that is marked as untrained; train_on=assistant can")
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    chosen = answers[-1:] if train_on == "last" else answers
    return {index: index in chosen and messages[index].get("train") is not False for index in answers}


def split_answer(text: str, start: int, stop: int, message: Mapping[str, Any]) -> Iterator[tuple[int, int, bool]]:
    """The span of an answer, cut where the message's `train_detail` begins and ends a part without loss.

    Each part is encoded by itself, as the borders of prompt and answer are, so that no token spans two of them.
    """
    content = message["content"]
    kept = content if content in text[start:stop] else content.strip()  # some templates trim
    if text.count(kept, start, stop) != 1:
        raise DataError("an answer is trained in part, and the chat template changes its text, so none can be chosen")
    first = text.index(kept, start, stop)
    begin, end = first - content.index(kept), first + len(kept)
    for part in message["train_detail"]:
        cuts = [begin + part["begin_offset"], begin + part["end_offset"] + 1]
        opening, closing = (min(max(cut, first), end) for cut in cuts)
        if not part["train"] and opening < closing:
            yield start, opening, True
            yield opening, closing, False
            start = closing
    yield start, stop, True
