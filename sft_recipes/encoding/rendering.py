"""A chat template's text for a conversation, and what is written in front of a template or taken out of it."""

import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from typing import Any

from jinja2 import TemplateSyntaxError, meta
from transformers import PreTrainedTokenizerFast

from sft_recipes.encoding.template_limits import LimitedEnvironment, render_within_limits, template_limits
from sft_recipes.errors import ConfigError, DataError, did_you_mean, one_line

TODAY = re.compile(r"""strftime_now\(\s*(['"])((?:(?!\1).)*)\1\s*\)""")  # a call with a format that is written out
# A vision model's template reads a list of parts where every other one, and every client, has a text
READ_TEXT_AS_PARTS = (
    "{%- set as_parts = namespace(messages=[]) %}{%- for message in messages %}{%- set as_parts.messages = "
    "as_parts.messages + [dict(message, content=[{'type': 'text', 'text': message.content}] if message.content is "
    "string else message.content)] %}{%- endfor %}{%- set messages = as_parts.messages -%}"
)


def render_template(
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: list | None = None,
    settings: Mapping[str, Any] | None = None,
    prompt: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation's text, and the spans of characters that the template marks as the assistant's.

    `settings` are variables of the template, as `chat_template_kwargs` of a row has them; `prompt` adds what serving
    shows before an answer. Raises DataError where the template fails, and ConfigError where it has no end.
    """
    try:
        texts, spans = render_within_limits(
            conversations=[messages],
            tools=tools or None,
            chat_template=template,
            return_assistant_tokens_mask="endgeneration" in template,
            add_generation_prompt=prompt,
            **tokenizer.special_tokens_map | dict(settings or {}),
        )
    except ConfigError:  # every other row would take as long
        raise
    except Exception as error:  # whatever a template's own lines raise
        raise DataError(f"the chat template refuses it: {one_line(error)}") from error
    return texts[0], spans[0] if spans else []


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Every token that the tokenizer calls special, the named ones and the rest."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def list_strings(value: Any) -> list[str]:
    """Every string in a nest of mappings and lists, those of an inner level behind those of an outer one."""
    rest, found = [value], []
    for item in rest:  # which grows meanwhile: a generator that calls itself takes four times as long
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, (list, tuple)):
            rest += item
        elif isinstance(item, (dict, Mapping)):  # in this order: Mapping takes ten times as long as dict
            rest += item.values()
    return found


def remove_markers(template: str) -> str:
    """The same template without `{% generation %}`, for serving engines that do not know it; the text is the same.

    >>> remove_markers("{%- generation -%} yes {% endgeneration %}")
    '{%- if true -%} yes {% endif %}'
    """
    template = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", template)


def set_defaults(template: str, settings: Mapping[str, Any]) -> str:
    """The template with variables set in front of it, so that whatever serves it uses them, too; a caller's win."""
    lines = (f"{{%- if {key} is not defined %}}{{%- set {key} = {value!r} %}}{{%- endif -%}}"
             for key, value in settings.items())  # fmt: skip
    return "".join(lines) + template


def check_settings(where: str, settings: Mapping[str, Any], template: str) -> None:
    """Raises ConfigError for a variable that the template does not read, and for a template that is no Jinja."""
    environment = LimitedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:  # what can be computed without a row is computed here
        parsed = template_limits(environment.parse, remove_markers(template))
        known = template_limits(meta.find_undeclared_variables, parsed)
    except TemplateSyntaxError as error:
        raise ConfigError(f"model.chat_template, line {error.lineno}: {error.message}") from error
    except ConfigError:
        raise
    except (RecursionError, ValueError) as error:  # nested too deeply, a number of 5,000 digits
        raise ConfigError(f"model.chat_template cannot be read: {one_line(error)}.") from error
    known -= {"messages", "tools", "raise_exception", "strftime_now"}
    for key in settings.keys() - known:
        raise ConfigError(f"{where}.{key}: the chat template does not read {key}.{did_you_mean(key, known)}")


def fix_date(template: str, day: date) -> str:
    """The template with `day` in place of today, so that a run's rows are the same on every day.

    >>> fix_date("{{ strftime_now('%d %b %Y') }}", date(2026, 11, 3))
    "{{ '03 Nov 2026' }}"
    """
    midnight = datetime.combine(day, time())
    fixed = TODAY.sub(lambda call: repr(midnight.strftime(call[2])), template)
    if re.search(r"strftime_now\s*\(", fixed):
        raise ConfigError(
            "model.chat_template writes today's date in a format that it computes (strftime_now), so that it cannot be "
            "fixed. Give the path of a copy with a date, or one of ours."
        )
    return fixed
