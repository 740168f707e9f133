"""A thin, TRL-based recipe library for supervised fine-tuning: formatters and encoding for notebooks."""

import logging
import warnings

from sft_recipes.data.formatters import alpaca, chatml, prompt_completion, sharegpt, text
from sft_recipes.errors import ConfigError, DataError

__all__ = ["ConfigError", "DataError", "alpaca", "chatml", "prompt_completion", "sharegpt", "text"]
__version__ = "0.1.0"
# What our dependencies say of each other: bitsandbytes advises a package that is not published; PEFT 0.21 and TRL 1.16
# ask models by a name that transformers 5.23 has deprecated, and when they ask by the new one, that line goes
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def __getattr__(name: str):
    """What needs torch or transformers is imported when it is asked for, so that `--help` stays light."""
    homes = {"CompletionOnlyCollator": "data.collator", "Encoder": "encoding.encoder", "show_mask": "data.mask_view"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"sft_recipes.{homes[name]}"), name)
