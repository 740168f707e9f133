"""Config values become checked arguments: `call(SFTConfig, {"learning_rate": 2e-5}, "trainer")`."""

import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, Union, get_args, get_origin, get_type_hints

# Keys that other versions and other tools know, and what to write here instead.
RETIRED = {
    "warmup_ratio": "warmup_steps (a float below 1 is a share of all steps)",
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "overwrite_output_dir": "nothing: every run has a folder of its own",
    "output_dir": "hydra.run.dir",
    "torch_dtype": "dtype",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "scheduler": "lr_scheduler_type",
    "no_cuda": "use_cpu",
    "dataset_batch_size": "nothing: rows are encoded in batches of a fixed size",
    "completion_only_loss": "data.<name>.supervise (assistant, last or all)",
    "assistant_only_loss": "data.<name>.supervise (assistant, last or all)",
    "chat_template_path": "model.chat_template",
    "eos_token": "nothing: the chat template names its stop token",
    "neftune_alpha": "neftune_noise_alpha",
    "model_name_or_path": "id",
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "load_in_4bit": "adapter=qlora",
}


class ConfigError(ValueError):
    """A fault in the configuration that the user can mend, in one line: where, what was found, what to write."""


def call(target: Callable[..., Any], values: Mapping[str, Any], where: str) -> Any:
    """What `target(**values)` returns, once every name is in its signature and every value fits its type hint.

    `where` is the place of `values` in the config (`trainer`, `adapter.lora`) and opens every error message.
    Raises ConfigError for an unknown or missing name, for a value of another type, and for what `target` itself
    refuses with a ValueError, TypeError or ImportError.

    >>> call(dict, {}, "trainer")
    {}
    """
    check(target, values, where)
    try:
        return target(**values)
    except ConfigError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"{where}: {one_line(error)}") from error


def check(target: Callable[..., Any], values: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for the first name or value that `target` would not take."""
    parameters = inspect.signature(target).parameters
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    for name, value in values.items():
        if name not in parameters:
            raise ConfigError(unknown(f"{where}.{name}", name, parameters, getattr(target, "__name__", where)))
        if not fits(value, hints.get(name, Any)):
            raise ConfigError(f"{where}.{name} should be {wording(hints[name])}, not {value!r}.")
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    for name in missing:
        if name not in values:
            raise ConfigError(f"{where}.{name} is missing. Write {where}.{name}=…")


def unknown(path: str, name: str, known: Iterable[str], owner: str) -> str:
    """The line for a name that is not in `known`: its successor, else the closest known one, else the known ones.

    >>> unknown("trainer.lr", "lr", ["learning_rate"], "SFTConfig")
    'trainer.lr is not a field of SFTConfig. Write learning_rate.'
    >>> unknown("trainer.learning_ratee", "learning_ratee", ["learning_rate"], "SFTConfig")
    'trainer.learning_ratee is not a field of SFTConfig. Did you mean learning_rate?'
    """
    known = list(known)
    start = f"{path} is not a field of {owner}."
    if name in RETIRED:
        return f"{start} Write {RETIRED[name]}."
    return f"{start}{did_you_mean(name, known)}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error line: the closest known names, or all of them when they are few and none is close.

    >>> did_you_mean("lim", ["lima", "alpaca"])
    ' Did you mean lima?'
    """
    known = sorted(known)
    close = get_close_matches(name, known, n=3, cutoff=0.6) or [k for k in known if name and k.startswith(name)][:3]
    if close:
        return f" Did you mean {' or '.join(close)}?"
    return f" Choices: {', '.join(known)}." if len(known) <= 40 else ""


def fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML is of the hinted type; hints that YAML cannot express (classes, callables) fit all.

    >>> fits("no", bool), fits(1, float), fits(True, int), fits(None, int | None), fits("auto", int | str)
    (False, True, False, True, True)
    """
    if get_origin(hint) in (Union, types.UnionType):
        return any(fits(value, part) for part in get_args(hint))
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    if hint in (None, types.NoneType):
        return value is None
    origin = get_origin(hint) or hint
    if origin in (list, tuple, set):
        return isinstance(value, list | tuple)
    if origin is dict:
        return isinstance(value, Mapping)
    return True


def wording(hint: Any) -> str:
    """A type hint as a reader of YAML would say it.

    >>> wording(bool), wording(float | None)
    ('true or false', 'a number or null')
    """
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(wording(part) for part in get_args(hint)))
    origin = get_origin(hint) or hint
    return names.get(origin) or {list: "a list", tuple: "a list", dict: "a mapping"}.get(origin, str(hint))


def one_line(error: BaseException) -> str:
    """An exception's message without its line breaks."""
    return " ".join(str(error).split())
