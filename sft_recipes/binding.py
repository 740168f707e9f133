"""Config values become checked arguments: `call(SFTConfig, {"learning_rate": 2e-5}, "trainer")`."""

import inspect
import json
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from difflib import get_close_matches
from reprlib import repr as short
from typing import Any, Union, get_args, get_origin, get_type_hints

# Names that other versions, other tools or another place in the config know, and what to write here. They are looked up
# for names that the class at hand does not have.
RETIRED = {
    "warmup_ratio": "trainer.warmup_steps (a float below 1 is a share of all steps)",
    "warmup": "trainer.warmup_steps (a float below 1 is a share of all steps)",
    "max_seq_length": "trainer.max_length",
    "max_seq_len": "trainer.max_length",
    "cutoff_len": "trainer.max_length",
    "sequence_len": "trainer.max_length",
    "evaluation_strategy": "trainer.eval_strategy",
    "group_by_length": "trainer.train_sampling_strategy=group_by_length",
    "overwrite_output_dir": "nothing: every run has a folder of its own",
    "output_dir": "hydra.run.dir",
    "logging_dir": "hydra.run.dir",
    "save_safetensors": "nothing: weights are always saved as safetensors",
    "learning_rate": "trainer.learning_rate",
    "lr": "trainer.learning_rate",
    "num_train_epochs": "trainer.num_train_epochs",
    "epochs": "trainer.num_train_epochs",
    "num_epochs": "trainer.num_train_epochs",
    "max_steps": "trainer.max_steps",
    "max_length": "trainer.max_length",
    "packing": "trainer.packing",
    "sample_packing": "trainer.packing",
    "per_device_train_batch_size": "trainer.per_device_train_batch_size",
    "batch_size": "trainer.per_device_train_batch_size",
    "micro_batch_size": "trainer.per_device_train_batch_size",
    "train_batch_size": "trainer.per_device_train_batch_size",
    "per_gpu_train_batch_size": "trainer.per_device_train_batch_size",
    "eval_batch_size": "trainer.per_device_eval_batch_size",
    "per_gpu_eval_batch_size": "trainer.per_device_eval_batch_size",
    "gradient_accumulation_steps": "trainer.gradient_accumulation_steps",
    "grad_accum": "trainer.gradient_accumulation_steps",
    "gradient_checkpointing": "trainer.activation_checkpointing",
    "optimizer": "trainer.optim",
    "scheduler": "trainer.lr_scheduler_type",
    "lr_scheduler": "trainer.lr_scheduler_type",
    "label_smoothing": "trainer.label_smoothing_factor",
    "neftune_alpha": "trainer.neftune_noise_alpha",
    "gradient_clipping": "trainer.max_grad_norm",
    "no_cuda": "trainer.use_cpu",
    "push_to_hub_token": "trainer.hub_token",
    "patience": "trainer.early_stopping_patience",
    "dataset_batch_size": "nothing: rows are encoded in batches of a fixed size",
    "torch_dtype": "model.dtype",
    "dtype": "model.dtype",
    "model_name_or_path": "model.id",
    "model_name": "model.id",
    "base_model": "model.id",
    "attn_implementation": "model.attn_implementation",
    "chat_template": "model.chat_template",
    "template": "model.chat_template",
    "use_flash_attention_2": "model.attn_implementation=flash_attention_2",
    "flash_attn": "model.attn_implementation=flash_attention_2",
    "r": "adapter.lora.r",
    "rank": "adapter.lora.r",
    "lora_r": "adapter.lora.r",
    "lora_rank": "adapter.lora.r",
    "lora_alpha": "adapter.lora.lora_alpha",
    "alpha": "adapter.lora.lora_alpha",
    "lora_dropout": "adapter.lora.lora_dropout",
    "dropout": "adapter.lora.lora_dropout",
    "target_modules": "adapter.lora.target_modules",
    "lora_target": "adapter.lora.target_modules",
    "use_peft": "adapter=lora",
    "load_in_4bit": "adapter=qlora",
    "dataset_name": "data.NAME.path",
    "data_files": "data.NAME.data_files",
    "train_on_inputs": "data.NAME.supervise=all",
    "supervise": "data.NAME.supervise (assistant, last or all)",
    "val_size": "data.held_out",
    "test_size": "data.held_out",
    "held_out": "data.held_out",
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
    """Raises ConfigError for the first name or value that `target` would not take.

    Positional-only parameters are the caller's own and no fields. An empty `where` is the root of the config.
    """
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    fields = {name: field for name, field in inspect.signature(target).parameters.items() if field.kind in named}
    hints = type_hints(target)
    for name, value in values.items():
        path = f"{where}.{name}".lstrip(".")
        if name not in fields:
            raise ConfigError(unknown(path, name, fields, owner(target, where)))
        if not fits(value, hints.get(name, Any)):
            raise ConfigError(f"{path} should be {wording(hints[name])}, not {shown(value)}.")
    for name, field in fields.items():
        if field.default is field.empty and name not in values:
            path = f"{where}.{name}".lstrip(".")
            raise ConfigError(f"{path} is missing. Write {path}=…")


def type_hints(target: Callable[..., Any]) -> dict[str, Any]:
    """The types of a function's parameters or of a class's fields; none where they name what is not imported."""
    is_plain_class = inspect.isclass(target) and not is_dataclass(target)
    try:
        return get_type_hints(target.__init__ if is_plain_class else target)
    except NameError:  # imported for type checkers only
        return {}


def owner(target: Callable[..., Any], where: str) -> str:
    """Whose fields they are in a user's words: SFTConfig's, a formatter's; our other functions are their place's."""
    ours = target.__module__.startswith("sft_recipes.") and not target.__module__.endswith(".formatters")
    return (where or "the config") if ours else target.__name__


def unknown(path: str, name: str, known: Iterable[str], owner: str) -> str:
    """The line for a name that is not in `known`: what to write instead, else the closest known one, else the known ones.

    >>> unknown("trainer.lr", "lr", ["learning_rate"], "SFTConfig")
    'trainer.lr is not a field of SFTConfig. Write trainer.learning_rate.'
    >>> unknown("trainer.learning_ratee", "learning_ratee", ["learning_rate"], "SFTConfig")
    'trainer.learning_ratee is not a field of SFTConfig. Did you mean learning_rate?'
    """
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
    close = (
        get_close_matches(name, known, n=1, cutoff=0.8)
        or get_close_matches(name, known, n=3, cutoff=0.6)
        or [k for k in known if name and k.startswith(name)][:3]
    )
    if close:
        return f" Did you mean {' or '.join(close)}?"
    return f" Choices: {', '.join(known)}." if 0 < len(known) <= 40 else ""


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


def shown(value: Any) -> str:
    """A value that was found, as YAML writes it, and cut where it is long.

    >>> shown(None), shown(False), shown("no")
    ('null', 'false', "'no'")
    """
    return json.dumps(value) if value is None or isinstance(value, bool) else short(value)


def one_line(error: BaseException) -> str:
    """An exception's message without its line breaks."""
    return " ".join(str(error).split())
