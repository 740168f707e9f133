"""A thin, TRL-based recipe library for supervised fine-tuning: formatters and encoding for notebooks."""

from sft_recipes.binding import ConfigError
from sft_recipes.formatters import DataError, alpaca, chatml, prompt_completion, sharegpt, text

__all__ = ["ConfigError", "DataError", "alpaca", "chatml", "prompt_completion", "sharegpt", "text"]
__version__ = "0.1.0"


def __getattr__(name: str):
    """What needs torch or transformers is imported when it is asked for, so that `--help` stays light."""
    homes = {"CompletionOnlyCollator": "collator", "Encoder": "encoding", "show_mask": "mask"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"sft_recipes.{homes[name]}"), name)
