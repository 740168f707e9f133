"""A tokenizer gets its chat template: with `{% generation %}` markers to train, the same without them to serve."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from sft_recipes.errors import ConfigError, did_you_mean

TEMPLATES_FOLDER = Path(__file__).parent / "templates"
PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|padding|>", "<pad>", "[PAD]", "<|endoftext|>", "<unk>")


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerFast, choice: str | None = None, any_stop: bool = False, bos: str = "auto"
) -> tuple[str, list[int]]:
    """The chat template with markers, and the ids of the control tokens that the tokenizer did not have.

    `choice` is the name of one of ours, a path, or None for the tokenizer's own. Afterwards the tokenizer carries the
    same template without markers, the template's control tokens are single special ids, and there is a pad token.
    Raises ConfigError for a template without markers, without a stop token, or that depends on today's date.
    `bos` is auto, always or never: a BOS before every conversation where the tokenizer writes one, or in any case, or
    not; serving does the same, since the template carries it.
    `any_stop` lets pass a stop token behind the markers, on which no loss is taken: the supervision ledger counts it.
    """
    template = load_template(choice, tokenizer)
    new = add_control_tokens(tokenizer, template)
    template = prepend_bos(tokenizer, template, bos)
    find_stop_token(tokenizer, template, any_stop)
    tokenizer.chat_template = remove_markers(template)
    if tokenizer.pad_token is None:
        known = tokenizer.get_vocab()
        tokenizer.pad_token = next((token for token in PAD_TOKENS if token in known), tokenizer.eos_token)
    return template, new


def load_template(choice: str | None, tokenizer: PreTrainedTokenizerFast) -> str:
    """The chosen template's text; raises ConfigError where there is none, or where it depends on today's date."""
    if choice is None:
        text = tokenizer_template(tokenizer)
    elif (TEMPLATES_FOLDER / f"{choice}.jinja").is_file():
        text = (TEMPLATES_FOLDER / f"{choice}.jinja").read_text(encoding="utf-8")
    elif Path(choice).is_file():
        text = Path(choice).read_text(encoding="utf-8")
    else:
        names = [path.stem for path in TEMPLATES_FOLDER.glob("*.jinja")]
        raise ConfigError(f"model.chat_template={choice} is no template and no file.{did_you_mean(choice, names)}")
    if not has_generation_markers(text):
        raise ConfigError(
            "model.chat_template has no {% generation %} markers around what the assistant says. Choose one of ours "
            "(model.chat_template=chatml) or give the path of a copy with markers."
        )
    if "strftime_now" in text:
        raise ConfigError(
            "model.chat_template writes today's date into the prompt (strftime_now), so that every day trains another "
            "text. Give a copy with a fixed date, or one of ours."
        )
    return text


def tokenizer_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """The tokenizer's own template where it has markers, else the marked one of ours or of TRL that it comes from."""
    text = tokenizer.chat_template
    if isinstance(text, dict):
        text = text.get("default")
    if not text:
        raise ConfigError("model.chat_template is null and the tokenizer has none. Write model.chat_template=chatml.")
    if has_generation_markers(text):
        return text
    ours = (path.read_text(encoding="utf-8") for path in sorted(TEMPLATES_FOLDER.glob("*.jinja")))
    twin = next((template for template in ours if text.endswith(remove_markers(template))), None)
    try:
        return twin or get_training_chat_template(tokenizer) or text
    except ValueError as error:
        raise ConfigError(
            "model.chat_template is null, and the tokenizer's own has no {% generation %} markers around the answers "
            "and no marked twin in TRL. Write model.chat_template=chatml, or the path of a copy with markers."
        ) from error


def add_control_tokens(tokenizer: PreTrainedTokenizerFast, template: str) -> list[int]:
    """Makes every control token of the template one special id, and gives the ids that are new.

    Our templates name theirs in the first comment (`control tokens: …`). A template without that comment is refused
    with a ConfigError when it writes something like `<|user|>` that the tokenizer does not know.
    """
    if declared := re.search(r"\{#-?.*?control tokens:([^#]*?)-?#\}", template, re.DOTALL):
        known = [*special_tokens(tokenizer), "none"]
        missing = [token for token in declared[1].split() if token not in known]
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


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Every token that the tokenizer calls special, the named ones and the rest."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def prepend_bos(tokenizer: PreTrainedTokenizerFast, template: str, choice: str = "auto") -> str:
    """The template with a BOS in front where it is wanted and the template does not write it.

    Raises ConfigError where `choice` is `always` and there is no BOS token, or `never` and the template writes one.
    """
    bos = tokenizer.bos_token
    if choice == "always" and bos is None:
        raise ConfigError("model.bos=always, but the tokenizer has no BOS token. Write model.bos=auto.")
    if bos is None or (choice == "auto" and tokenizer("a").input_ids[:1] != [tokenizer.bos_token_id]):
        return template
    text, _ = render_template(tokenizer, template, [{"role": "user", "content": "?"}])
    if choice == "never" and text.startswith(bos):
        raise ConfigError("model.bos=never, but model.chat_template writes a BOS itself. Take one of ours, or auto.")
    return template if choice == "never" or text.startswith(bos) else "{{- bos_token }}" + template


def find_stop_token(tokenizer: PreTrainedTokenizerFast, template: str, anywhere: bool = True) -> str:
    """The special token that the template writes behind an answer; raises ConfigError where that is not one.

    It stands within the markers, or right behind them if it may stand `anywhere`.
    """
    answer = "\u00a7"
    text, spans = render_template(
        tokenizer, template, [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    )
    if not spans:
        raise ConfigError("model.chat_template marks nothing in a question and its answer with {% generation %}.")
    start, end = spans[-1]
    stop = text[start:end].rpartition(answer)[2].strip()
    if anywhere and not stop:
        stop = text[end:].strip()
    if stop not in special_tokens(tokenizer):
        raise ConfigError(
            f"model.chat_template ends an answer with {stop!r}, which is not one special token of the tokenizer, so "
            "the model would not learn to stop. Write the stop token inside the {% generation %} block."
        )
    return stop


def render_template(
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    messages: list,
    tools: list | None = None,
    settings: Mapping[str, Any] | None = None,
) -> tuple:
    """A conversation's text, and the spans of characters that the template marks as the assistant's.

    `settings` are variables of the template, as `chat_template_kwargs` of a row has them.
    """
    texts, spans = render_jinja_template(
        conversations=[messages],
        tools=tools or None,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map | dict(settings or {}),
    )
    return texts[0], spans[0]


def remove_markers(template: str) -> str:
    """The same template without `{% generation %}`, for serving engines that do not know it; the text is the same.

    >>> remove_markers("{%- generation -%} yes {% endgeneration %}")
    '{%- if true -%} yes {% endif %}'
    """
    template = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", template)
