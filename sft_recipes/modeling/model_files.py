"""What is wrong with the files of a model, which somebody else may have made, as one line."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from sft_recipes.errors import ConfigError, one_line

# By how their names end in a config. Llama 3.1 405B has 126 layers of 16,384 numbers, Switch-C 2,048 experts,
# XLM-V 901,629 tokens
MOST = {"layer": 1000, "layers": 1000, "hidden_size": 1_000_000, "experts": 10_000, "vocab_size": 10_000_000}


def check_config_sizes(id: str, revision: str | None) -> None:
    """Raises ConfigError for a config.json with more or wider layers, experts or tokens than any model has.

    They are made one by one before there is a weight: transformers' config of Qwen 3 takes two minutes for 10,000,000
    layers, and a model longer. So the file is looked at before either is built.
    """
    values: Mapping[str, Any] = {}
    with suppress(OSError):  # there is none, which whoever needs one says
        values, _ = PretrainedConfig.get_config_dict(id, revision=revision)
    for name, size in iterate_numbers(values):
        most = next((most for end, most in MOST.items() if name.endswith(end)), size)
        if size > most:
            raise ConfigError(
                f"model.id={id}: {name} in its config.json is more than {most:,}, which no model has. The file is "
                "damaged, or made to do harm: take another copy."
            )


def iterate_numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The whole numbers of a config and of those within it, as a model of images and texts has them, by name."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from iterate_numbers(value)
        elif isinstance(value, int):
            yield name, value


@contextmanager
def explained_model(id: str, found: bool = False) -> Iterator[None]:
    """Whatever is wrong with a model's files becomes a ConfigError of one line; of memory that runs out, others tell.

    `found` says that its config was read, so that a wrong value is no sign of a wrong name.
    """
    try:
        yield
    except Exception as error:
        memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
        if isinstance(error, ConfigError) or memory:
            raise
        if "trust_remote_code" in str(error):  # of the tokenizer, the config, or the model alone
            raise ConfigError(
                f"{id} brings code of its own. If you trust its authors, write model.trust_remote_code=true (chat, "
                "merge: --trust-remote-code; in Python: trust_remote_code=True)."
            ) from error
        if isinstance(error, OSError) or (isinstance(error, ValueError) and not found):
            raise model_not_found(id, error) from error
        raise ConfigError(f"model: {one_line(error)[:300]}") from error


def model_not_found(id: str, error: Exception) -> ConfigError:
    """The error line for a model that could be loaded neither from a folder nor from the hub."""
    said = one_line(error)[:200]
    if Path(id).exists():
        return ConfigError(f"model.id={id} is not a folder with a model and its tokenizer: {said}")
    if id.startswith((".", "/", "~")):
        return ConfigError(f"model.id={id}: there is no such folder.")
    if getattr(error, "errno", None):  # of the system, not of the hub
        return ConfigError(f"model.id={id}: {said}. HF_HOME names the folder for downloads and caches.")
    if "gated" in said.lower() or "401" in said:
        return ConfigError(f"model.id={id} is gated or private. Accept its terms, then `hf auth login`. ({said}…)")
    return ConfigError(
        f"model.id={id} is no folder here and could not be downloaded. Check its name, or give a folder: model=local "
        f"model.id=path/to/model. ({said}…)"
    )
