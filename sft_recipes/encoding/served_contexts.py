"""A conversation as one row to train on, or as several where a template shows history otherwise than new turns; and the
parts of a row that carry loss: its answers, without what it marks as untrained."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sft_recipes.encoding.answer_spans import CALL, PLAIN, QUESTION, RESULT, THINKING, TOOLS, AnswerFormat, has_thoughts
from sft_recipes.encoding.tokenizer_backend import TOKEN_START
from sft_recipes.errors import DataError

log = logging.getLogger(__name__)
UNROLL = ("auto", "last", "keep")
Messages = Sequence[Mapping[str, Any]]


@dataclass
class Row:
    """The text of a conversation, or of its beginning up to an answer."""

    length: int  # the number of messages
    text: str
    settings: Mapping[str, Any]  # with which it is rendered
    # Where answers begin and end, by the numbers of their messages, with the message; None for one that is not trained
    spans: dict[int, tuple[int, int, Mapping[str, Any] | None]] = field(default_factory=dict)
    notes: frozenset[str] = frozenset()  # issues that rendering shows, see data/issues.py


def choose_answers(messages: Messages, train_on: str) -> dict[int, bool]:
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


def render_rows(
    render: Callable,
    answers: AnswerFormat,
    given: tuple[Messages, Any, Mapping[str, Any]],
    wanted: Mapping[int, bool],
    train_on: str,
    unroll: str,
) -> tuple[list[Row], str]:
    """The rows of one conversation, shortest first, each with the answers that it shows as serving would; and all that
    the template shows of it, also where no row is made of it: thoughts that history drops are not lost by mistake.

    `given` are its messages, tools and settings, `wanted` is from `choose_answers`. An answer's span is what rendering
    it adds to the prompt of serving. Answers that the whole conversation shows in another context stand in a row that
    ends with one of them (`auto`), are not trained (`last`), or are trained in the whole one (`keep`). Raises DataError
    where an answer does not follow its prompt.
    """
    messages, tools, settings = given
    settings_of = {index: answers.settings_for(messages[index], settings) for index in wanted}
    last = settings_of[max(wanted)] if wanted else settings
    whole, starts, untrained = render(messages, tools, last)[0], {}, ""
    rows = [Row(len(messages), whole, last)]
    for index in sorted(wanted, reverse=True):
        if not wanted[index] and train_on != "all":
            if has_thoughts(messages[index]):
                untrained += render(messages[: index + 1], tools, settings_of[index])[0]
            continue
        is_last = index + 1 == len(messages)
        prompt = render(messages[:index], tools, settings_of[index], prompt=True)[0]
        text = whole if is_last else render(messages[: index + 1], tools, settings_of[index])[0]
        if not text.startswith(prompt):
            raise DataError(
                f"the chat template shows …{prompt[-32:]!r} before messages[{index}] when it is served, and not in the "
                "row, so that it cannot be trained as an answer; train: false leaves it out"
            )
        text, stop = answers.find_end(text, messages[index], len(prompt))
        rows[0].text = text if is_last else rows[0].text
        starts[index] = len(prompt) if whole.startswith(prompt) else len(whole)
        row = next((row for row in rows if row.text.startswith(text[:stop])), None)
        if row is None and train_on == "all":
            if not wanted[index] or "train_detail" in messages[index]:
                raise DataError(f"the chat template shows messages[{index}] otherwise later, so it cannot be left out")
            continue
        if row is None:
            rows.append(row := Row(index + 1, text, settings_of[index]))
        row.spans[index] = (len(prompt), stop, messages[index] if wanted[index] else None)
    shown = "".join(row.text for row in rows) + untrained
    elsewhere = [index for row in rows[1:] for index in row.spans]
    if unroll != "auto":
        rows = rows[:1]
    elif elsewhere and not rows[0].spans:  # the whole one trains nothing
        rows = rows[1:]
    if elsewhere and unroll == "keep":
        for index in elsewhere:
            rows[0].spans[index] = (*find_in_history(answers, rows[0].text, index, starts), messages[index])
        rows[0].notes = frozenset({"history_differs"})
    return rows[::-1], shown


def do_markers_suffice(render: Callable, answers: AnswerFormat) -> bool:
    """Whether a template's `{% generation %}` markers tell by themselves where answers stand, so that a conversation is
    rendered once: as far as a few show, they begin where `render_rows` does, which makes one row of each.

    The log says where they begin elsewhere.
    """
    suffice = not answers.next_turn[0]  # a stop token that only the next turn writes is behind the marked answer
    for turns in ((PLAIN, QUESTION, PLAIN), (THINKING, QUESTION, THINKING), (CALL, RESULT, PLAIN)):
        turns, tools = [QUESTION, *turns], TOOLS if CALL in turns else None
        try:
            wanted = choose_answers(turns, "assistant")
            rows, _ = render_rows(render, answers, (turns, tools, {}), wanted, "assistant", "auto")
            _, marks = render(turns, tools, rows[-1].settings)
        except DataError:  # no place for calls, or for thoughts
            continue
        starts = sorted(start for start, *_ in rows[-1].spans.values())
        if [start for start, _ in marks][-len(starts) :] != starts:
            log.warning(
                "The {%% generation %%} markers of model.chat_template do not begin where serving's prompt ends "
                "(…%r); answers are trained from there on.", rows[-1].text[: starts[-1]][-24:],
            )  # fmt: skip
            return False
        suffice &= len(rows) == 1
    return suffice


def find_in_history(answers: AnswerFormat, whole: str, index: int, starts: Mapping[int, int]) -> tuple[int, int]:
    """Where an answer stands in the whole conversation, in which it is rendered otherwise than when it was new."""
    start, following = starts[index], min((each for other, each in starts.items() if other > index), default=len(whole))
    stops = "|".join(map(re.escape, answers.stops))
    found = re.compile(f"(?<!{TOKEN_START})(?:{stops})").search(whole, start, following)  # none that the row spells out
    if not found:
        raise DataError(f"unroll=keep: messages[{index}] cannot be told apart in the whole row; unroll=auto trains it")
    return start, found.end()


def cut_row(
    row: Row, answers: AnswerFormat, train_on: str, train_empty_thoughts: bool
) -> Iterator[tuple[str, bool, str]]:
    """The parts of a row's text, whether each carries loss, and what it is where an answer begins: `answer`, or what
    the template begins it with and its row does not say, `template_inserted` or an `empty_thought`. Parts may be empty.

    Each part is encoded by itself, as the borders of prompt and answer are, so that no token spans two of them.
    """
    end = 0
    for start, stop, message in sorted(row.spans.values(), key=lambda span: span[:2]):
        if start >= stop:
            continue
        yield row.text[end:start], train_on == "all", ""
        end = stop
        if message is None:
            yield row.text[start:stop], False, ""
            continue
        for number, (part, trained) in enumerate(split_answer(row.text[start:stop], message)):
            opening, empty = answers.opening(part) if trained and not number else ("", False)
            if opening:
                yield opening, empty and train_empty_thoughts, "empty_thought" if empty else "template_inserted"
            yield part[len(opening) :], trained, "" if number or opening else "answer"
    yield row.text[end:], train_on == "all", ""


def split_answer(text: str, message: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """A rendered answer, cut where the message's `train_detail` begins and ends a part without loss."""
    start = 0
    if "train_detail" in message:
        content = message["content"]
        kept = content if content in text else content.strip()  # some templates trim
        if text.count(kept) != 1:
            raise DataError("an answer is trained in part, and the chat template changes it, so no part can be chosen")
        first = text.index(kept)
        begin, end = first - content.index(kept), first + len(kept)
        for part in message["train_detail"]:
            cuts = [begin + part["begin_offset"], begin + part["end_offset"] + 1]
            opening, closing = (min(max(cut, first), end) for cut in cuts)
            if not part["train"] and opening < closing:
                yield text[start:opening], True
                yield text[opening:closing], False
                start = closing
    yield text[start:], True
