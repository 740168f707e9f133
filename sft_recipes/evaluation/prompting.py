"""Would a prompt have done it? The questions behind a system prompt and a few rows with their answers, for the base."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from sft_recipes.config.options import EvaluateOptions
from sft_recipes.errors import ConfigError
from sft_recipes.evaluation.generation import split_last_answer

Question = Mapping[str, Any]
SPEAKERS = {"user": "User: ", "assistant": "Assistant: "}


def prompt_questions(
    asked: Sequence[Question],
    rows: Sequence[Question],
    options: EvaluateOptions,
    seed: int,
    tokenizer: PreTrainedTokenizerFast | None,
) -> list[Question]:
    """The questions behind `evaluate.system` and `few_shot` of the rows, drawn with the seed, never the same question.

    With a tokenizer they are turns of its chat template. Without one they are plain text (`prompt_text`): a base model
    that has never seen the template should not be judged by it. Raises ConfigError for too few rows, and for a template
    that leaves out system messages.
    """
    shown = [pair for row in rows if (pair := single_turn(row))]
    random.Random(seed).shuffle(shown)
    prompted = []
    for question in asked:
        past, _ = split_last_answer(question["messages"])
        examples = [pair for pair in shown if pair[0]["content"] != past[-1]["content"]][: options.few_shot]
        if len(examples) < options.few_shot:
            raise ConfigError(
                f"evaluate.few_shot={options.few_shot}: rows with one question and its answer: {len(examples)}. "
                f"Write evaluate.few_shot={len(examples)}."
            )
        system = [message for message in past if message["role"] == "system"]
        if options.system:
            system = [{"role": "system", "content": options.system}]
        turns = [*sum(examples, []), *(message for message in question["messages"] if message["role"] != "system")]
        prompted.append(question | {"messages": [*system, *turns]})
        if tokenizer is None:
            prompted[-1]["prompt_text"] = write_plain(split_last_answer(prompted[-1]["messages"])[0])
    if tokenizer and options.system and asked:
        check_system_message(tokenizer, options.system)
    return prompted


def single_turn(row: Question) -> list[Mapping[str, Any]]:
    """The row's question and its answer, where it has one of each and no tools; else nothing."""
    turns = [message for message in row.get("messages", []) if message["role"] != "system"]
    plain = [message["role"] for message in turns] == ["user", "assistant"] and not row.get("tools")
    return turns if plain and split_last_answer(turns)[1] else []


def write_plain(messages: Sequence[Mapping[str, Any]]) -> str:
    """The messages as plain text that ends where an answer begins; see `generation.generate_answers` for its end."""
    lines = [SPEAKERS.get(message["role"], "") + message["content"] for message in messages]
    return "\n\n".join([*lines, "Assistant:"])


def check_system_message(tokenizer: PreTrainedTokenizerFast, system: str) -> None:
    """Raises ConfigError for a chat template that refuses system messages or leaves them out."""
    talk = [{"role": "system", "content": system}, {"role": "user", "content": "?"}]
    try:
        kept = system.strip() in tokenizer.apply_chat_template(talk, tokenize=False)
    except TemplateError:
        kept = False
    if not kept:
        raise ConfigError("evaluate.system: the chat template leaves out system messages. Leave evaluate.system out.")
