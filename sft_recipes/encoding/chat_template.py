"""A tokenizer gets its chat template: the one that is saved and served, and the one that training renders."""

import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from sft_recipes.encoding.answer_spans import PLAIN, QUESTION, SAID, describe_answers
from sft_recipes.encoding.rendering import (
    READ_TEXT_AS_PARTS,
    check_settings,
    fix_date,
    remove_markers,
    render_template,
    set_defaults,
    special_tokens,
)
from sft_recipes.errors import ConfigError, DataError, did_you_mean, one_line

# A comment with this, looked for from one comment to the next: through the rest of the file for each would take minutes
DECLARED_TOKENS = re.compile(r"\{#(?:(?!\{#|control tokens:).)*control tokens:([^#]*)#\}", re.DOTALL)
TEMPLATES_FOLDER = Path(__file__).parent / "templates"
PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|padding|>", "<pad>", "[PAD]", "<|endoftext|>", "<unk>")


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerFast,
    choice: str | None = None,
    any_stop: bool = False,
    settings: Mapping[str, Any] | None = None,
    day: str | None = None,
    bos: str = "auto",
) -> tuple[str, list[int]]:
    """The chat template that training renders, and the ids of the control tokens that the tokenizer did not have.

    `choice` is the name of one of ours, a path, or None for the tokenizer's own. Afterwards the tokenizer carries the
    same template without markers, the template's control tokens are single special ids, and there is a pad token.
    `settings` are variables of the template that serving has, too, since the tokenizer's template sets them. Where it
    writes today's date, training writes `day` (2026-11-26), or the day it starts; the tokenizer's own stays.
    `bos` is auto, always or never: a BOS before every conversation where the tokenizer writes one, or in any case, or
    not; serving does the same, since the template carries it.
    `any_stop` lets pass a stop token behind the markers, on which no loss is taken: the supervision ledger counts it.
    Raises ConfigError for a template whose answers cannot be told from the prompt or have no stop token.
    """
    template = load_template(choice, tokenizer)
    new = add_control_tokens(tokenizer, template)
    if not writes_text(tokenizer, template) and writes_text(tokenizer, READ_TEXT_AS_PARTS + template):
        template = READ_TEXT_AS_PARTS + template
    check_settings("model.chat_template_kwargs", settings or {}, template)
    template = set_defaults(template, settings or {})
    day = date.fromisoformat(day) if day else date.today()
    answers = describe_answers(tokenizer, fix_date(template, day))
    text, spans = render_template(
        tokenizer, fix_date(template, day), [QUESTION, PLAIN], settings=answers.switches[False]
    )
    if spans and not any_stop and not text[: spans[-1][1]].rstrip().endswith(answers.stops):
        raise ConfigError(
            f"model.chat_template has its stop token {answers.stops[0]} behind the {{% generation %}} block, so the "
            "model would not learn to stop. Write it inside."
        )
    template = prepend_bos(tokenizer, template, bos)
    tokenizer.chat_template = remove_markers(template)
    if tokenizer.pad_token is None:
        known = tokenizer.get_vocab()
        tokenizer.pad_token = next((token for token in PAD_TOKENS if token in known), tokenizer.eos_token)
    return fix_date(template, day), new


def load_template(choice: str | None, tokenizer: PreTrainedTokenizerFast) -> str:
    """The chosen template's text; raises ConfigError where there is none."""
    if choice is None:
        return tokenizer_template(tokenizer)
    try:
        for path in (TEMPLATES_FOLDER / f"{choice}.jinja", Path(choice)):
            if path.is_file():
                return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:  # also of a name that is too long, such as a template itself
        raise ConfigError(f"model.chat_template={choice} cannot be read: {one_line(error)}.") from error
    names = [path.stem for path in TEMPLATES_FOLDER.glob("*.jinja")]
    raise ConfigError(f"model.chat_template={choice} is no template and no file.{did_you_mean(choice, names)}")


def tokenizer_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """The tokenizer's own template, with its markers again where it is one of ours."""
    text = tokenizer.chat_template
    if isinstance(text, dict):
        text = text.get("default")
    if not text:
        raise ConfigError("model.chat_template is null and the tokenizer has none. Write model.chat_template=chatml.")
    for ours in (path.read_text(encoding="utf-8") for path in sorted(TEMPLATES_FOLDER.glob("*.jinja"))):
        if text.endswith(remove_markers(ours)):
            return text.removesuffix(remove_markers(ours)) + ours
    return text


def writes_text(tokenizer: PreTrainedTokenizerFast, template: str) -> bool:
    """Whether the template writes an answer that is a text, rather than a list of parts."""
    try:
        return SAID in render_template(tokenizer, template, [QUESTION, PLAIN])[0]
    except DataError:
        return False


def add_control_tokens(tokenizer: PreTrainedTokenizerFast, template: str) -> list[int]:
    """Makes every control token of the template one special id, and gives the ids that are new.

    Our templates name theirs in the first comment (`control tokens: …`). A template without that comment is refused
    with a ConfigError when it writes something like `<|user|>` that the tokenizer does not know.
    """
    if declared := DECLARED_TOKENS.search(template):
        known = [*special_tokens(tokenizer), "none"]
        missing = [token for token in declared[1].rstrip().removesuffix("-").split() if token not in known]
        size = len(tokenizer)
        tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
        return list(range(size, len(tokenizer)))
    unknown = sorted(set(re.findall(r"<\|\w+\|>", template)) - set(tokenizer.get_vocab()))
    if unknown:
        raise ConfigError(
            f"model.chat_template writes {' '.join(unknown)}, which the tokenizer does not know as single tokens. Name "
            "those to be added in its first line: {#- control tokens: … -#} (or none)."
        )
    return []


def prepend_bos(tokenizer: PreTrainedTokenizerFast, template: str, choice: str = "auto") -> str:
    """The template with a BOS in front where it is wanted and the template does not write it.

    Raises ConfigError where `choice` is `always` and there is no BOS token, or `never` and the template writes one.
    """
    bos = tokenizer.bos_token
    if choice == "always" and bos is None:
        raise ConfigError("model.bos=always, but the tokenizer has no BOS token. Write model.bos=auto.")
    if bos is None or (choice == "auto" and tokenizer("a").input_ids[:1] != [tokenizer.bos_token_id]):
        return template
    text, _ = render_template(tokenizer, template, [QUESTION, PLAIN])
    if choice == "never" and text.startswith(bos):
        raise ConfigError("model.bos=never, but model.chat_template writes a BOS itself. Take one of ours, or auto.")
    return template if choice == "never" or text.startswith(bos) else "{{- bos_token }}" + template
