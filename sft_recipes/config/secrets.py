"""Secrets in a config: refused where one is typed, and hidden in all that a run saves or logs."""

import logging
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from sft_recipes.config.hydra_plugin import terminal_width
from sft_recipes.config.nested_values import iterate_leaves
from sft_recipes.errors import TOKEN, ConfigError, cut_middle, mask_secrets, printable

# Not every token: a config has eos_token, typed_control_token, tokens_per_second
SECRET_NAME = re.compile(
    r"(?i:(^|[_.])(secret|password|passwd|credentials?|(api|access|secret|private)_?key)|(^|\.)token|"
    r"(hub|hf|access|auth|api|bearer|refresh|session|wandb)_token)$|[A-Z]_TOKEN$"
)


class MaskingFormatter(logging.Formatter):
    """Formats what is logged, tracebacks included, without secrets, what a terminal would obey and endless lines."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(cut_middle, printable(mask_secrets(super().format(record))).split("\n")))


class TerminalFormatter(MaskingFormatter):
    """The same for stderr, whose long lines are folded on a terminal, but for a traceback's."""

    def format(self, record: logging.LogRecord) -> str:
        text, width = super().format(record), terminal_width()
        if record.exc_info or not sys.stderr.isatty():
            return text
        fold = partial(textwrap.fill, width=width, break_long_words=False, break_on_hyphens=False)
        return "\n".join(line if len(line) <= width else fold(line) for line in text.split("\n"))


def check_no_secrets(values: Any, where: str = "") -> None:
    """Raises ConfigError for a field that is made for a secret, and for a text that is one; neither is printed.

    `${oc.env:NAME}` is allowed: it is saved as it stands.
    """
    for path, value in iterate_leaves(values, where, into_lists=True):
        harmless = value in (None, "") or isinstance(value, bool) or "${oc.env:" in str(value)
        if not harmless and (SECRET_NAME.search(path) or TOKEN.search(str(value))):
            raise ConfigError(
                f"{mask_secrets(path)} holds a secret, which would be saved with the run. Leave it out: log in with "
                "`hf auth login`, or put it into the environment (HF_TOKEN, WANDB_API_KEY), from where a config takes "
                "it as ${oc.env:NAME}."
            )


def check_typed_secrets(overrides: Iterable[str]) -> None:
    """Raises ConfigError for a secret among `key=value` overrides, before Hydra saves them."""
    for override in overrides:
        key, _, value = override.partition("=")
        try:
            check_no_secrets(yaml.safe_load(value), key)
        except yaml.YAMLError:
            check_no_secrets(value, key)


def saved_form(raw: Any, value: Any, environment: Mapping[str, str] | None = None) -> Any:
    """A resolved config as a run's files hold it: what came from the environment is `${oc.env:NAME}` again.

    `raw` is the same config before it was resolved; `environment` holds the variables that it names.
    """
    if environment is None:
        names = set(re.findall(r"oc\.env:\s*[\"']?(\w+)", str(raw)))
        environment = {name: os.environ[name] for name in names if os.environ.get(name)}
    if isinstance(value, Mapping):
        raws = raw if isinstance(raw, Mapping) else dict.fromkeys(value, raw)
        return {key: saved_form(raws.get(key), item, environment) for key, item in value.items()}
    if isinstance(value, list):
        raws = raw if isinstance(raw, list) else [raw] * len(value)
        return [saved_form(*pair, environment) for pair in zip(raws, value, strict=True)]
    if not isinstance(value, str):
        return value
    for name, secret in environment.items() if "${" in str(raw) else ():
        value = value.replace(secret, f"${{oc.env:{name}}}")
    return mask_secrets(value)


def mask_files(files: Iterable[Path]) -> None:
    """Hides the secrets in files that Hydra has written."""
    for file in files:
        text = file.read_text(encoding="utf-8")
        if (masked := mask_secrets(text)) != text:
            file.write_text(masked, encoding="utf-8")
