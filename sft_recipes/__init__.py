"""A thin, TRL-based recipe library for supervised fine-tuning.

The public surface is what `__all__` names; everything else may change without notice. Formatters need the standard
library only, the rest is imported when it is first asked for.

    from sft_recipes import compose, train
    config = compose("lima", "trainer.learning_rate=1e-5", data={"file": {"data_files": "my.jsonl"}})
    run = train(config, "outputs/mine")  # run.metrics, run.model, run.tokenizer, run.folder
"""

import logging
import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sft_recipes.data.formatters import alpaca, chatml, prompt_completion, sharegpt, text
from sft_recipes.errors import ConfigError, DataError

if TYPE_CHECKING:
    from sft_recipes.config.compose import compose
    from sft_recipes.config.schema import Config
    from sft_recipes.data.collator import CompletionOnlyCollator
    from sft_recipes.data.mask_view import show_mask
    from sft_recipes.encoding.encoder import Encoder
    from sft_recipes.evaluate import evaluate
    from sft_recipes.merge import merge
    from sft_recipes.modeling.save_load import load_run
    from sft_recipes.modeling.workarounds import complete_reference
    from sft_recipes.preview import preview
    from sft_recipes.train import train
    from sft_recipes.training.setup import Run

__version__ = "0.1.0"
__all__ = [
    "CompletionOnlyCollator", "Config", "ConfigError", "DataError", "Encoder", "Run", "alpaca", "chatml",
    "complete_reference", "compose", "evaluate", "load_run", "merge", "preview", "prompt_completion", "sharegpt",
    "show_mask", "text", "train",
]  # fmt: skip
HOMES = {
    "CompletionOnlyCollator": "data.collator",
    "Config": "config.schema",
    "Encoder": "encoding.encoder",
    "Run": "training.setup",
    "complete_reference": "modeling.workarounds",
    "compose": "config.compose",
    "load_run": "modeling.save_load",
    "show_mask": "data.mask_view",
}
if sys.argv[:1] == ["-m"]:  # python -m puts the working folder first, where a datasets.py of the user's hides datasets
    sys.path.append(sys.path.pop(0))
VERBS = ("evaluate", "merge", "preview", "train")  # modules of their own, with a command or a mode of this name
# What our dependencies say of each other: bitsandbytes advises a package that is not published; PEFT 0.21 and TRL 1.16
# ask models by a name that transformers 5.23 has deprecated, and when they ask by the new one, that line goes
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def __getattr__(name: str) -> Any:
    """What needs torch or transformers is imported when it is asked for, so that `--help` stays light."""
    if name in VERBS:
        return import_module(f"sft_recipes.{name}")
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"sft_recipes.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# `sft_recipes.train(config)` calls a function, and `python -m sft_recipes.merge` needs a module of such a name
class _Verb(ModuleType):
    """A module that can be called as the function of its name: `sft_recipes.train` is both."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(ModuleType):
    """Makes the modules of verbs callable, since an imported submodule takes the place of a function of its name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in VERBS and isinstance(value, ModuleType):
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
