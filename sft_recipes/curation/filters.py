"""Signs of a bad row: each function looks at one conversation and returns what is wrong, or None.

A filter's keyword arguments are its entry in conf/curation/*.yaml. `count` gives a text's length in tokens.
"""

import re
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from functools import cache
from typing import Any

from sft_recipes.curation.patterns import (
    BOILERPLATE,
    DAMAGE,
    FILLERS,
    MARKUP,
    REFUSAL,
    SENTENCE_END,
    TEMPLATE_TOKENS,
    UNFINISHED,
)
from sft_recipes.curation.words import Conversation, hash_windows, join_messages, split_words
from sft_recipes.errors import ConfigError


def last_answer(conversation: Conversation) -> str:
    """The text of the last answer."""
    answers = [m for m in conversation.get("messages", []) if m["role"] == "assistant" and not m.get("tool_calls")]
    return str(answers[-1].get("content") or "").strip() if answers else ""


def count_words(text: str) -> int:
    """The number of words, where no tokenizer is at hand."""
    return len(split_words(text))


def instruction_length(
    conversation: Conversation, least: int = 5, most: int = 512, count: Callable[[str], int] = count_words
) -> str | None:
    """Users' messages of fewer or more tokens in all."""
    return outside("the instruction has", count(join_messages(conversation, "user")), least, most, "tokens")


def answer_length(
    conversation: Conversation, least: int = 20, most: int = 2048, count: Callable[[str], int] = count_words
) -> str | None:
    """Answers of fewer or more tokens in all; a row with calls of tools is not too short."""
    least = 0 if any(message.get("tool_calls") for message in conversation["messages"]) else least
    return outside("the answer has", count(join_messages(conversation, "assistant")), least, most, "tokens")


def turns(conversation: Conversation, least: int = 1, most: int = 40) -> str | None:
    """Fewer or more questions of the user."""
    asked = sum(message["role"] == "user" for message in conversation["messages"])
    return outside("it has", asked, least, most, "turns")


def outside(found: str, number: int, least: int, most: int, unit: str) -> str | None:
    """What is wrong with a number outside its bounds."""
    if least <= number <= most:
        return None
    return f"{found} {number} {unit}, {f'below {least}' if number < least else f'above {most}'}"


def near_empty_answer(conversation: Conversation, fillers: Sequence[str] = FILLERS) -> str | None:
    """A last answer without a letter or digit, or that is a mere filler; one true word (`Paris`) is an answer."""
    answer = last_answer(conversation)
    if not answer or any(message.get("tool_calls") for message in conversation["messages"]):
        return None
    bare = answer.lower().strip(" .!?…\"'")
    return f"the answer is {answer[:20]!r}" if bare in fillers or not any(map(str.isalnum, bare)) else None


def repetition(
    conversation: Conversation,
    unique: float = 0.3,
    words: int = 30,
    lines: float = 0.5,
    shortest: int = 8,
    phrases: float = 0.5,
) -> str | None:
    """An answer of at least so many `words` of which fewer than a share are `unique`, or whose `lines` or runs of four
    words (`phrases`) repeat others, more than this share of them.

    Long texts repeat their small words: beyond 200 words the share is that of the windows of 200. Code, tables, tags
    and numbers repeat by nature and are not counted.
    """
    answer = last_answer(conversation)
    answer_words = [word for word in split_words(MARKUP.sub(" ", answer)) if word.isalpha()]
    if len(answer_words) >= words:
        windows = [answer_words[start : start + 200] for start in range(0, max(1, len(answer_words) - 100), 200)]
        share = min(len(set(window)) / len(window) for window in windows)
        if share < unique:
            return f"{share:.0%} of the answer's words are unique"
        runs = hash_windows(answer_words, 4)
        if len(set(runs)) < (1 - phrases) * len(runs):
            return f"{1 - len(set(runs)) / len(runs):.0%} of the answer's runs of four words repeat others"
    rows = [line.strip() for line in answer.splitlines() if len(line.strip()) > 20]
    if len(rows) >= shortest and len(set(rows)) <= (1 - lines) * len(rows):
        return f"{len(rows) - len(set(rows))} of {len(rows)} lines of the answer repeat others"
    return None


def abrupt_end(conversation: Conversation, words: int = 12) -> str | None:
    """A last answer that ends in an open code fence, at a comma, after an article or the like, or without a full stop
    although its other sentences have one or it is a single one. The latter need so many `words`, and no list, table,
    sum or code at the end.

    A language without full stops is no abrupt end, and neither is a name or a title: scripts with small letters have
    full stops, and of a single sentence most words begin with a small one.
    """
    answer = last_answer(conversation)
    if answer.count("```") % 2:
        return "a code fence is left open"
    line = answer.rsplit("\n", 1)[-1].strip()
    if not line or line[-1] in SENTENCE_END or len(split_words(answer)) < words or "```" in answer:
        return None
    last = split_words(line)[-1:] or [""]
    if line[-1] in ",(-–" or (last[0] in UNFINISHED and line[-1].isalpha()):
        return f"the answer ends at {line[-20:]!r}"
    if re.match(r"[-*•#|>]|\d+[.)]|\S+:|https?:|\s*[{}<$\\]", line) or "=" in line or not line[-1].isalpha():
        return None
    small = [word[0].islower() for word in line.split()]
    single = line == answer and line[0].isupper() and line[-1].islower() and sum(small) > len(small) / 2
    stops = len(small) >= 4 and re.search(r"[a-zà-ÿа-я]{2}[.!?](?=\s)", answer)
    return f"the answer ends in mid-sentence, {line[-20:]!r}" if single or stops else None


def refusal(conversation: Conversation) -> str | None:
    """A last answer that begins as refusals do, in English, German, Spanish, French and some more languages."""
    found = REFUSAL.search(last_answer(conversation)[:200])
    return f"the answer refuses: {found[0][:40]!r}" if found else None


def echo(conversation: Conversation, share: float = 0.9, words: int = 8) -> str | None:
    """A last answer that says little but the last instruction, of at least so many words, once more."""
    asked = [m for m in conversation["messages"] if m["role"] == "user"][-1:]
    question, answer = (split_words(text) for text in (asked[0]["content"] if asked else "", last_answer(conversation)))
    if min(len(question), len(answer)) < words or not 0.5 < len(question) / len(answer) < 2:
        return None
    alike = SequenceMatcher(None, question, answer, autojunk=False).ratio()
    return "the answer repeats the instruction" if alike >= share else None


def template_tokens(conversation: Conversation) -> str | None:
    """A chat template's tokens or role names left over in a message."""
    for message in conversation["messages"]:
        if found := TEMPLATE_TOKENS.search(str(message.get("content") or "")):
            return f"a message of role {message['role']} has {found[0]!r}"
    return None


def boilerplate(conversation: Conversation) -> str | None:
    """An answer that talks about the model (As an AI language model) or to the reader of its transcript."""
    found = BOILERPLATE.search(join_messages(conversation, "assistant"))
    return f"the answer says {found[0]!r}" if found else None


def encoding_damage(conversation: Conversation) -> str | None:
    """Characters that only a wrong encoding leaves."""
    found = DAMAGE.search(join_messages(conversation))
    return f"damaged characters, {found[0]!a}" if found else None


def language(conversation: Conversation, keep: Sequence[str] = ("en",), sure: float = 0.9) -> str | None:
    """An answer that is surely in none of the languages to keep, as ISO 639-1 has them; needs the extra `curate`."""
    found = detect_language(last_answer(conversation), sure)
    return f"the answer's language is {found}" if found and found not in keep else None


def detect_language(text: str, sure: float = 0.9) -> str | None:
    """The ISO 639-1 code; None for less than 20 letters beside code and tables, and where it is not so `sure`.

    Raises ConfigError where the detector is not installed.
    """
    plain = MARKUP.sub(" ", text)[:1000]  # 1 ms a text; 965 of alpaca's first thousand answers are English by it
    if sum(map(str.isalpha, plain)) < 20:
        return None
    if load_detector() is None:
        raise ConfigError("curation.filters.language needs a detector: pip install 'sft-recipes[curate]'.")
    found, probability = load_detector().classify(plain)
    return found if probability >= sure else None


@cache
def load_detector() -> Any | None:
    """py3langid's identifier with probabilities; None where it is not installed."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        return None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


FILTERS: dict[str, Callable[..., str | None]] = {
    function.__name__: function
    for function in (
        near_empty_answer, encoding_damage, template_tokens, repetition, abrupt_end, echo, boilerplate, refusal,
        instruction_length, answer_length, turns, language,
    )
}  # fmt: skip
