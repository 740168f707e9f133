"""A conversation as one row to train on, or as several where a template shows history otherwise than new turns."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft_recipes.encoding.answer_spans import AnswerFormat, has_thoughts
from sft_recipes.encoding.trained_spans import choose_answers, select_trained_spans
from sft_recipes.errors import DataError

UNROLL = ("auto", "last", "keep")
Piece = tuple[str, str, bool]  # how it is encoded, its text, whether the loss is taken on it
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Context:
    """One row to train on: a conversation, or its beginning up to an answer, as it is served before each answer."""

    conversation: Mapping[str, Any]  # with the settings that its thoughts need
    pieces: list[Piece]
    answers: list[int]  # the pieces with which the trained answers begin; what stands before one is its prompt
    text: str  # all that is shown of the conversation in any context, for the checks of what a template leaves out
    notes: frozenset[str] = frozenset()  # issues that rendering shows, see data/issues.py
    thinks: bool = False  # whether a trained answer has thoughts


@dataclass(frozen=True)
class Rendered:
    """The messages of one row, its text, where each of the answers stands in it, and how it was rendered."""

    messages: Messages  # those that are not trained here have train: False
    text: str
    spans: list[tuple[int, int]]
    settings: Mapping[str, Any]
    notes: frozenset[str] = frozenset()


def render_rows(
    render: Callable,
    answers: AnswerFormat,
    messages: Messages,
    tools: Any,
    settings: Mapping[str, Any],
    train_on: str,
    unroll: str,
) -> tuple[list[Rendered], str]:
    """The rows of one conversation, shortest first, each with the answers that it shows as serving would; and all that
    the template shows of it, also where no row is made of it: thoughts that history drops are not lost by mistake.

    An answer's span is what rendering it adds to the prompt of serving. Answers that the whole conversation shows in
    another context stand in a row that ends with one of them (`auto`), are not trained (`last`), or are trained in the
    whole one (`keep`). Raises DataError where an answer does not follow its prompt.
    """
    wanted = choose_answers(messages, train_on)
    settings_of = {index: answers.settings_for(messages[index], settings) for index in wanted}
    last = settings_of[max(wanted)] if wanted else settings
    whole, end = render(messages, tools, last)[0], 0
    if messages[-1]["role"] == "assistant":
        whole, end = answers.find_end(whole, messages[-1])
    rows, starts, untrained = [(messages, whole, {}, last)], {}, ""
    for index in sorted(wanted, reverse=True):
        if not wanted[index] and train_on != "all":
            if has_thoughts(messages[index]):
                untrained += render(messages[: index + 1], tools, settings_of[index])[0]
            continue
        prompt = render(messages[:index], tools, settings_of[index], prompt=True)[0]
        text, stop = whole, end
        if index + 1 < len(messages):
            text = render(messages[: index + 1], tools, settings_of[index])[0]
            text, stop = answers.find_end(text, messages[index])
        if not text.startswith(prompt):
            raise DataError(
                f"the chat template shows …{prompt[-32:]!r} before messages[{index}] when it is served, and not in the "
                "row, so that it cannot be trained as an answer; train: false leaves it out"
            )
        starts[index] = len(prompt) if whole.startswith(prompt) else len(whole)
        fitting = next((spans for _, shown, spans, _ in rows if shown.startswith(text[:stop])), None)
        if fitting is None and train_on != "all":
            rows.append((messages[: index + 1], text, fitting := {}, settings_of[index]))
        elif fitting is None and not wanted[index]:
            raise DataError(f"the chat template shows messages[{index}] otherwise later, so it cannot be left out")
        if fitting is not None:
            fitting[index] = (len(prompt), stop)
    notes, elsewhere = frozenset(), [index for _, _, spans, _ in rows[1:] for index in spans]
    if elsewhere and unroll == "keep":
        notes = frozenset({"history_differs"})
        rows[0][2].update({index: find_in_history(answers, whole, index, starts) for index in elsewhere})
    shown = "".join(text for _, text, _, _ in rows) + untrained
    if unroll != "auto":
        rows = rows[:1]
    elif len(rows) > 1 and not rows[0][2]:  # the whole one trains nothing
        rows = rows[1:]
    return [
        Rendered(row if train_on == "all" else mark_untrained(row, spans), text, place_spans(row, spans), given, notes)
        for row, text, spans, given in reversed(rows)
    ], shown


def mark_untrained(messages: Messages, kept: Container[int]) -> list[Mapping[str, Any]]:
    """The messages with `train: False` on every answer that is not among the `kept` numbers."""
    return [
        message | {"train": False} if message["role"] == "assistant" and index not in kept else message
        for index, message in enumerate(messages)
    ]


def place_spans(messages: Messages, spans: Mapping[int, tuple[int, int]]) -> list[tuple[int, int]]:
    """The span of every answer, an empty one where none is known."""
    return [spans.get(index, (0, 0)) for index, message in enumerate(messages) if message["role"] == "assistant"]


def find_in_history(answers: AnswerFormat, whole: str, index: int, starts: Mapping[int, int]) -> tuple[int, int]:
    """Where an answer stands in the whole conversation, in which it is rendered otherwise than when it was new."""
    start, following = starts[index], min((each for other, each in starts.items() if other > index), default=len(whole))
    ends = [place + len(stop) for stop in answers.stops if (place := whole.find(stop, start)) >= 0]
    if min(ends, default=len(whole) + 1) > following:
        raise DataError(f"unroll=keep: messages[{index}] cannot be told apart in the whole row; unroll=auto trains it")
    return start, min(ends)


def cut_answers(
    row: Rendered, answers: AnswerFormat, train_on: str, train_empty_thoughts: bool
) -> tuple[list[tuple[str, bool]], list[int], set[str]]:
    """The row's text cut at its answers, with what carries loss; the numbers of the parts that begin an answer; notes.

    What an answer begins with and its row does not say is cut off, without loss.
    """
    text, parts, begins, notes, end = row.text, [], [], set(), 0
    for start, stop, trained in select_trained_spans(text, row.spans, row.messages, train_on):
        if start >= stop:
            continue
        if start > end:
            parts.append((text[end:start], train_on == "all"))
        opening, empty = answers.opening(text[start:stop]) if trained else ("", False)
        if trained:
            begins.append(len(parts))
        if opening:
            notes.add("empty_thought" if empty else "template_inserted")
            parts.append((opening, empty and train_empty_thoughts))
        if start + len(opening) < stop:
            parts.append((text[start + len(opening) : stop], trained))
        end = stop
    if text[end:]:
        parts.append((text[end:], train_on == "all"))
    return parts, begins, notes
