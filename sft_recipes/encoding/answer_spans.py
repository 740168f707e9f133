"""What a chat template writes around an answer, seen by rendering a few: its stop tokens, thoughts, empty thoughts."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from sft_recipes.encoding.rendering import render_template, special_tokens
from sft_recipes.errors import ConfigError, DataError

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
    ending: re.Pattern  # a stop token at the end of a row, with what may follow it
    openings: tuple[str, ...]  # what is written before an answer without thoughts, and no row says
    empty_thought: str  # the opening that is a thought without a text, its whitespace taken out
    switches: Mapping[bool, Mapping[str, Any]]  # the settings that an answer needs, by whether it thinks
    next_turn: tuple[str, str]  # the stop where none is written: what another turn begins with, and a call's result

    def find_end(self, text: str, answer: Mapping[str, Any], start: int = 0) -> tuple[str, int]:
        """The text of a row that ends with this answer, which begins at `start`, and where the answer ends, its stop
        token included."""
        text += self.next_turn[bool(answer.get("tool_calls"))]
        found = self.ending.search(text, start)
        return text, found.end(1) if found else len(text)  # without a stop token, which the checks of the rows find

    def settings_for(self, answer: Mapping[str, Any], settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """The settings with the switch that the answer needs, by whether it has thoughts, where none is set."""
        return {**self.switches.get(has_thoughts(answer), {}), **settings}

    def opening(self, answer: str) -> tuple[str, bool]:
        """What an answer begins with that its row does not say, and whether that is an empty thought."""
        found = next(filter(answer.startswith, self.openings), "")
        if not found and (empty := EMPTY_THOUGHT.match(answer)):  # one that the row itself spells out
            return empty[0], True
        return found, bool(found) and "".join(found.split()) == self.empty_thought


def has_thoughts(answer: Mapping[str, Any]) -> bool:
    """Whether an answer has thoughts that are no empty ones, in a field of their own or in its content."""
    if thoughts := answer.get("reasoning_content"):
        return bool(thoughts.strip())
    return "</think>" in answer["content"] and not EMPTY_THOUGHT.match(answer["content"])


def describe_answers(tokenizer: PreTrainedTokenizerFast, template: str) -> AnswerFormat:
    """How a template writes answers; raises ConfigError where they cannot be told from the prompt or do not stop."""

    def render(*messages: Mapping[str, Any], tools: Any = None, prompt: bool = False, **settings: Any) -> str:
        return render_template(tokenizer, template, messages, tools, settings, prompt)[0]

    def what_follows(*messages: Mapping[str, Any], prompt: bool = True, **settings: Any) -> str:
        """What the last message adds to the others, or to what serving shows of them; '' where it changes those."""
        settings |= {"tools": TOOLS} if CALL in messages else {}
        try:
            before, text = render(*messages[:-1], prompt=prompt, **settings), render(*messages, **settings)
        except DataError:
            return ""
        return text.removeprefix(before) if text.startswith(before) else ""

    switches, texts = {}, {False: "", True: ""}
    for thinks, message in ((False, PLAIN), (True, THINKING)):
        for settings in ({}, *({name: thinks} for name in SWITCHES)):
            if text := what_follows(QUESTION, message, **settings):
                switches[thinks], texts[thinks] = settings, text
                break
    opening, said, ending = texts[False].partition(SAID)
    if not said:
        raise ConfigError(explain_refusal(render))
    special = "|".join(map(re.escape, special_tokens(tokenizer))) or "(?!)"
    stops, next_turn = re.match(rf"\s*((?:{special})*)", ending)[1], ("", "")
    stops = re.findall(special, stops)[-1:]  # the last of those side by side
    if not ending.strip():
        later = (what_follows(QUESTION, *turns, prompt=False) for turns in ((PLAIN, QUESTION), (CALL, RESULT)))
        plain, call = (re.match(rf"\s*({special}|)", text)[1] for text in later)
        stops, next_turn = [token for token in (plain, call) if plain and token], (plain, call or plain)
    if not stops:
        raise ConfigError(
            f"model.chat_template ends an answer with {ending.strip()!r}, which is not one special token of the "
            f"tokenizer, so the model would not learn to stop. {WAY_OUT}"
        )
    calls = what_follows(QUESTION, CALL, **switches[False])
    if not next_turn[0] and not re.search(end_pattern(stops, special), calls):
        stops += re.findall(special, calls)[-1:]
    thought, said, _ = texts[True].partition(SAID)
    openings = set()
    if THOUGHT in thought:
        after_call = what_follows(QUESTION, CALL, RESULT, PLAIN, **switches[False]).partition(SAID)
        openings = {opening, after_call[0] if after_call[1] else ""}
    elif opening.strip():
        raise ConfigError(
            f"model.chat_template does not write {opening!r} before an answer when it is served, although it stands "
            "before every answer of a row. Write it where the template has add_generation_prompt, or take one of ours."
        )
    return AnswerFormat(
        stops=tuple(dict.fromkeys(stops)),
        ending=re.compile(end_pattern(stops, special)),
        openings=tuple(sorted(filter(str.strip, openings), key=len, reverse=True)),
        empty_thought="".join(thought.replace(THOUGHT, "").split()),
        switches=switches,
        next_turn=next_turn,
    )


def end_pattern(stops: Sequence[str], special: str) -> str:
    """A stop token, and after it up to the end only whitespace and other `special` tokens (Phi 3 writes eos there)."""
    return rf"({'|'.join(map(re.escape, stops))})(?:\s|{special})*\Z"


def explain_refusal(render: Callable[..., str]) -> str:
    """Why a plain answer cannot be told from its prompt, and what to write."""
    try:
        text, prompt = render(QUESTION, PLAIN), render(QUESTION, prompt=True)
    except DataError as error:
        return f"model.chat_template cannot write a question and its answer: {error}. {WAY_OUT}"
    if SAID not in text:
        return f"model.chat_template leaves out what the assistant says. {WAY_OUT}"
    return (
        f"model.chat_template shows …{prompt[-24:]!r} when it is served, but a row with its answer has "
        f"…{text[-48:]!r}: no answer stands where it would be generated. {WAY_OUT}"
    )
