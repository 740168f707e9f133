"""The config's `trainer` as TRL's arguments, and the name of the objective."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback
from trl import SFTConfig

from sft_recipes.config.hydra_plugin import objective_direction
from sft_recipes.config.schema import Config
from sft_recipes.config.validation import call_validated, matches_type
from sft_recipes.errors import ConfigError, did_you_mean
from sft_recipes.training.argument_checks import check_libraries
from sft_recipes.training.callbacks import LossLogger, load_callbacks

log = logging.getLogger(__name__)


def build_arguments(config: Config, folder: Path) -> tuple[SFTConfig, list[TrainerCallback]]:
    """TRL's arguments, checked, and the callbacks; rows are encoded and packed before TRL sees them."""
    values, effective = dict(config.trainer.fields), config.trainer.effective_batch_size
    processes = int(os.environ.get("WORLD_SIZE", 1))
    values |= accumulation_steps(effective, values, processes)
    if effective:
        steps = values.get("gradient_accumulation_steps")
        log.info("Effective batch of %d rows on %d process(es): %s accumulated.", effective, processes, steps)
    callbacks = [LossLogger(), *load_callbacks(config.callbacks)]
    stopping = config.trainer.early_stopping()
    if stopping:
        callbacks.append(EarlyStoppingCallback(**stopping))
    if stopping or values.get("load_best_model_at_end"):
        kind = "epoch" if values.get("eval_strategy", "no") == "no" else values["eval_strategy"]
        values |= {"eval_strategy": kind, "save_strategy": kind, "load_best_model_at_end": True}
        metric = values.setdefault("metric_for_best_model", "eval_loss")
        # transformers maximises every metric whose name does not end in "loss", loss_turn_later, too
        values.setdefault("greater_is_better", objective_direction(str(metric).rpartition(".")[2]) == "maximize")
    values.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    if "bf16" not in values and "fp16" not in values:
        values["bf16"] = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    # a loss that is not finite should be seen, and the filter looks at every micro-batch, which waits for the GPU
    values.setdefault("logging_nan_inf_filter", False)
    values.setdefault("run_name", f"{config.name} {folder.name}")  # in a tracker
    if config.streamed:
        values |= streaming_arguments(values)
    resume = values.pop("resume_from_checkpoint", None)  # true or a path, transformers' hint has text only
    if not isinstance(resume, bool | str | None):
        raise ConfigError(f"trainer.resume_from_checkpoint should be true, false or a checkpoint, not {resume!r}.")
    own = {"output_dir": str(folder), "seed": config.seed, "dataset_kwargs": {"skip_prepare_dataset": True}}
    arguments = call_validated(SFTConfig, values | own, "trainer")
    if processes > 1 and arguments.world_size == 1:  # or each would train a model of its own
        raise ConfigError(f"torchrun started {processes} processes without a GPU. Write trainer.use_cpu=true.")
    if arguments.packing and arguments.max_length is None:
        raise ConfigError("trainer.packing needs trainer.max_length, the length of a packed row.")
    arguments.resume_from_checkpoint = resume
    arguments.push_to_hub = False  # the run does it: transformers would push the log and the answers, too
    if config.mode == "train":  # a preview may be of a run on another machine
        check_libraries(arguments)
    precision = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "fp32"
    log.info("Computing in %s on this hardware; trained weights are fp32.", precision)
    return arguments, callbacks


def accumulation_steps(effective: int | None, values: Mapping[str, Any], processes: int) -> dict[str, int]:
    """The accumulation steps with which a step has `effective` rows over all processes; empty where it is None.

    Raises ConfigError where the rows cannot be divided among processes and batches.

    >>> accumulation_steps(128, {"per_device_train_batch_size": 4}, processes=8)
    {'gradient_accumulation_steps': 4}
    """
    rows = values.get("per_device_train_batch_size", SFTConfig.per_device_train_batch_size)
    if effective is None or not matches_type(rows, int):  # SFTConfig's own check reports a wrong type
        return {}
    steps, rest = divmod(effective, rows * processes)
    if rest:
        each, left = divmod(effective, processes)
        batch = max((size for size in range(1, rows + 1) if each % size == 0), default=1)
        near = max(effective - left, processes)
        instead = f"effective_batch_size={near}" if left else f"per_device_train_batch_size={batch}"
        raise ConfigError(
            f"trainer.effective_batch_size={effective} is no multiple of {rows} rows on {processes} "
            f"process{'es' * (processes > 1)}. Write trainer.{instead}."
        )
    return {"gradient_accumulation_steps": steps}


def streaming_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a streamed dataset needs; raises ConfigError for values that it cannot work with."""
    if values.get("max_steps", -1) <= 0:
        raise ConfigError("trainer.max_steps is missing: a stream has no length. Write trainer.max_steps=1000.")
    if values.get("dataloader_num_workers"):
        raise ConfigError("trainer.dataloader_num_workers should be 0 for a stream, whose rows are counted as read.")
    return {"train_sampling_strategy": "random"}  # the stream shuffles, and its lengths are not known


def resolve_objective(name: str | None, measured: list[str]) -> str | None:
    """The entry of metrics.json that Hydra's sweepers get, one of those that will be measured; None where none will.

    Raises ConfigError for an objective that is not among them.
    """
    if name is None:
        return next((key for key in ("eval_loss", "train_loss", *measured) if key in measured), None)
    if name not in measured and not ("eval_loss" in measured and name.startswith("eval_loss_")):
        raise ConfigError(f"objective={name} is not measured in this run.{did_you_mean(name, measured)}")
    return name


def check_objective(name: str | None, metrics: Mapping[str, Any]) -> None:
    """Raises ConfigError where a finished run has no number for its objective."""
    if name and metrics.get(name) is None:
        why = " No held-out answer has a supervised stop token." if name == "p_stop" else ""
        raise ConfigError(f"objective={name} could not be measured in this run.{why}")
