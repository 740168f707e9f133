"""What a chat template writes around an answer, seen by rendering a few: its stop tokens, thoughts, empty thoughts."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerFast

from sft_recipes.encoding.rendering import render_template, special_tokens
from sft_recipes.errors import ConfigError, DataError

Messages = Sequence[Mapping[str, Any]]
SAID, THOUGHT = "\u00a7", "\u00b6"  # characters that no template writes by itself
QUESTION = {"role": "user", "content": "?"}
PLAIN = {"role": "assistant", "content": SAID}
THINKING = {"role": "assistant", "content": SAID, "reasoning_content": THOUGHT}
PARAMETER = {"type": "integer", "description": "x"}
TOOL = {"name": "f", "description": "f", "parameters": {"type": "object", "properties": {"x": PARAMETER}}}
TOOLS = [{"type": "function", "function": TOOL}]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
}
RESULT = {"role": "tool", "content": "1"}
SWITCHES = ("enable_thinking", "thinking")  # how templates name the variable that turns thoughts on and off
WAY_OUT = "Choose one of ours, as model.chat_template=chatml, or give the path of a changed copy."
EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")


@dataclass(frozen=True)
class AnswerFormat:
    """What stands around answers: learned from a plain one, one with a thought, a call, and one after a call."""

    stops: tuple[str, ...]  # special tokens that end an answer, that of a plain one first
    endings: tuple[tuple[str, str], ...]  # each with what follows it at the end of a row, longest first
    openings: tuple[str, ...] = ()  # what is written before an answer without thoughts, and no row says
    empty_thoughts: tuple[str, ...] = ()  # those of the openings that are a thought without a text
    # What an answer needs, by whether it thinks
    switches: Mapping[bool, Mapping[str, Any]] = field(default_factory=dict)
    next_turn: tuple[str, str] | None = None  # for answers without a stop token: what follows, and what follows a call
    thinks: bool = False  # whether there is a place for thoughts

    def find_end(self, text: str, answer: Mapping[str, Any]) -> tuple[str, int]:
        """The text of a row that ends with this answer, and where in it the answer ends, its stop token included."""
        if self.next_turn:
            text += self.next_turn[bool(answer.get("tool_calls"))]
        for stop, rest in self.endings:
            if text.endswith(stop + rest):
                return text, len(text) - len(rest)
        return text, len(text)  # without a stop token, which the checks of the rows find

    def settings_for(self, answer: Mapping[str, Any], settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """The settings with the switch that the answer needs, by whether it has thoughts, where none is set."""
        return {**self.switches.get(has_thoughts(answer), {}), **settings}

    def opening(self, answer: str) -> tuple[str, bool]:
        """What an answer begins with that its row does not say, and whether that is an empty thought."""
        found = next(filter(answer.startswith, self.openings), "")
        if not found and (empty := EMPTY_THOUGHT.match(answer)):  # one that the row itself spells out
            return empty[0], True
        return found, found in self.empty_thoughts


def has_thoughts(answer: Mapping[str, Any]) -> bool:
    """Whether an answer has thoughts that are no empty ones, in a field of their own or in its content."""
    if thoughts := answer.get("reasoning_content"):
        return bool(thoughts.strip())
    return "</think>" in answer["content"] and not EMPTY_THOUGHT.match(answer["content"])


def describe_answers(tokenizer: PreTrainedTokenizerFast, template: str, anywhere: bool = True) -> AnswerFormat:
    """The format of a template's answers; raises ConfigError where they cannot be told from the prompt or do not stop.

    With markers the stop token stands within them, or right behind them if it may stand `anywhere`.
    """
    marked = "endgeneration" in template

    def answer(message: Mapping[str, Any], history: Messages = (QUESTION,), **settings: Any) -> str | None:
        """What follows the prompt of serving, or with markers the first of them; None where that cannot be said."""
        tools = TOOLS if any("tool_calls" in each for each in (*history, message)) else None
        try:
            text, spans = render_template(tokenizer, template, [*history, message], tools, settings)
            if marked:
                return text[spans[-1][0] :] if spans else None
            prompt, _ = render_template(tokenizer, template, history, tools, settings, prompt=True)
        except DataError:
            return None
        return text[len(prompt) :] if text.startswith(prompt) else None

    switches, texts = {}, {}
    for thinks, message in ((False, PLAIN), (True, THINKING)):
        for settings in ({}, *({name: thinks} for name in SWITCHES)):
            if text := answer(message, **settings):
                switches[thinks], texts[thinks] = settings, text
                break
    if SAID not in texts.get(False, ""):
        raise ConfigError(explain_refusal(tokenizer, template, marked))
    calls = answer(CALL, **switches[False])
    opening, _, ending = texts[False].partition(SAID)
    special = f"(?:{'|'.join(map(re.escape, special_tokens(tokenizer))) or '(?!)'})"
    if marked and not anywhere:
        text, spans = render_template(tokenizer, template, [QUESTION, PLAIN])
        ending = text[slice(*spans[-1])].rpartition(SAID)[2]
    endings, next_turn = read_ending(special, ending), None
    if not endings and not marked and not ending.strip():
        after = (answer_and_next(tokenizer, template, *turns) for turns in ((PLAIN, QUESTION), (CALL, RESULT)))
        next_turn = tuple(found[0] if (found := re.match(special, text)) else "" for text in after)
        endings = [(token, "") for token in dict.fromkeys(next_turn) if token] if next_turn[0] else []
        next_turn = (next_turn[0], next_turn[1] or next_turn[0])
    if not endings:
        way_out = "Write the stop token inside the {% generation %} block." if marked else WAY_OUT
        raise ConfigError(
            f"model.chat_template ends an answer with {ending.strip()!r}, which is not one special token of the "
            f"tokenizer, so the model would not learn to stop. {way_out}"
        )
    if calls and not next_turn and not any(calls.endswith(stop + rest) for stop, rest in endings):
        endings += read_ending(special, calls, r"(?s:.*)")
    openings, empty = [], ()
    with_thoughts, _, _ = texts.get(True, "").partition(SAID)
    thinks = THOUGHT in with_thoughts
    if thinks and not marked:
        after_call = answer(PLAIN, (QUESTION, CALL, RESULT), **switches[False]) or ""
        found = {opening, after_call.partition(SAID)[0] if SAID in after_call else ""}
        openings = sorted(filter(str.strip, found), key=len, reverse=True)
        bare = "".join(with_thoughts.replace(THOUGHT, "").split())
        empty = tuple(each for each in openings if "".join(each.split()) == bare)
    elif opening.strip() and not marked:
        raise ConfigError(
            f"model.chat_template does not write {opening!r} before an answer when it is served, although it stands "
            "before every answer of a row. Write it where the template has add_generation_prompt, or take one of ours."
        )
    return AnswerFormat(
        tuple(dict.fromkeys(stop for stop, _ in endings)), tuple(sorted(endings, key=lambda each: -len(each[1]))),
        tuple(openings), empty, switches, next_turn, thinks,
    )  # fmt: skip


def read_ending(special: str, text: str, before: str = "") -> list[tuple[str, str]]:
    """The stop token of a text that ends an answer, the last of those side by side, and what follows it.

    >>> read_ending("<end>|<turn>", "<end><turn>\\n")
    [('<turn>', '\\n')]
    """
    found = re.match(rf"{before}\s*((?:{special})+)(.*)", text, re.DOTALL)
    return [(re.findall(special, found[1])[-1], found[2])] if found else []


def answer_and_next(tokenizer: PreTrainedTokenizerFast, template: str, answer: Mapping, following: Mapping) -> str:
    """What a template writes behind an answer when another turn follows; '' where it refuses that."""
    tools = TOOLS if "tool_calls" in answer else None
    try:
        first, _ = render_template(tokenizer, template, [QUESTION, answer], tools)
        both, _ = render_template(tokenizer, template, [QUESTION, answer, following], tools)
    except DataError:
        return ""
    return both[len(first) :].lstrip() if both.startswith(first) else ""


def explain_refusal(tokenizer: PreTrainedTokenizerFast, template: str, marked: bool) -> str:
    """Why a plain answer cannot be told from its prompt, and what to write."""
    try:
        text, spans = render_template(tokenizer, template, [QUESTION, PLAIN])
        prompt, _ = render_template(tokenizer, template, [QUESTION], prompt=True)
    except DataError as error:
        return f"model.chat_template cannot write a question and its answer: {error}. {WAY_OUT}"
    if marked and not spans:
        return "model.chat_template marks nothing in a question and its answer with {% generation %}."
    if SAID not in text:
        return f"model.chat_template leaves out what the assistant says. {WAY_OUT}"
    return (
        f"model.chat_template shows …{prompt[-24:]!r} when it is served, but a row with its answer has "
        f"…{text[-48:]!r}: no answer stands where it would be generated. {WAY_OUT}"
    )


def is_stable(tokenizer: PreTrainedTokenizerFast, template: str, answers: AnswerFormat) -> bool:
    """Whether the history of a conversation renders as the turns did when they were new, as far as a few show."""
    for first, *rest in ((PLAIN, QUESTION, PLAIN), (THINKING, QUESTION, THINKING), (CALL, RESULT, PLAIN)):
        tools = TOOLS if "tool_calls" in first else None
        try:
            early, _ = render_template(tokenizer, template, [QUESTION, first], tools)
            whole, _ = render_template(tokenizer, template, [QUESTION, first, *rest], tools)
        except DataError:  # no place for calls, or for thoughts
            continue
        early, end = answers.find_end(early, first)
        if not whole.startswith(early[:end]):
            return False
    return True
