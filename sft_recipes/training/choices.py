"""What a config leaves to the hardware: rows of a micro-batch, whether activations are kept, and bf16 weights.

Named values stand. The attention is chosen in `trainer.select_attention`, when the model is on its device.
"""

import logging
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.training_args import OptimizerNames
from transformers.utils import CONFIG_NAME, is_torch_optimi_available
from trl import SFTConfig, SFTTrainer

from sft_recipes.config.schema import Config
from sft_recipes.config.validation import matches_type
from sft_recipes.errors import ConfigError, plural
from sft_recipes.reporting.run_folder import read_json
from sft_recipes.training.activation_memory import StepShape
from sft_recipes.training.checkpoints import newest_first
from sft_recipes.training.memory import available_memory, check_memory, describe_step, estimate_memory, format_bytes

log = logging.getLogger(__name__)
ROOM = 0.8  # of the available memory: measured runs of benchmarks/memory.py are within 15 % of their estimates


def accumulation_steps(effective: int | None, rows: int, processes: int) -> dict[str, int]:
    """The accumulation steps with which a step has `effective` rows, from micro-batches of `rows` on each process.

    Empty where `effective` is None. Raises ConfigError where the rows cannot be divided among processes and batches.

    >>> accumulation_steps(128, 4, processes=8)
    {'gradient_accumulation_steps': 4}
    """
    if effective is None:
        return {}
    steps, rest = divmod(effective, rows * processes)
    if rest:
        each, left = divmod(effective, processes)
        batch = max((size for size in range(1, rows + 1) if each % size == 0), default=1)
        near = max(effective - left, processes)
        instead = f"effective_batch_size={near}" if left else f"per_device_train_batch_size={batch}"
        raise ConfigError(
            f"trainer.effective_batch_size={effective} is no multiple of {plural(rows, 'row')} on "
            f"{plural(processes, 'process', 'processes')}. Write trainer.{instead}."
        )
    return {"gradient_accumulation_steps": steps}


def fits(step: StepShape, room: float = ROOM) -> bool:
    """Whether a step takes at most `room` of the memory here; False where its activations cannot be estimated."""
    try:
        estimate = estimate_memory(step)
    except Exception:  # whatever PEFT or a model's own code raises on the meta device; check_memory says it
        return False
    return estimate.activations is not None and estimate.total <= room * available_memory()


def choose_step(config: Config, arguments: SFTConfig, longest: int, new_token_ids: Sequence[int] = ()) -> Config:
    """Sets what is left to the hardware, in `arguments` and the config it returns; raises ConfigError where none fits.

    Activations are kept where they fit, those of one row where rows are open, too. The rows of a micro-batch are the
    most that fit, with the accumulation steps that keep the effective batch, since fewer, larger ones use a GPU better.
    A run that is resumed keeps the rows that it had, whose sums round as they did.
    """
    if config.mode == "evaluate":
        return config
    open_rows = config.trainer.per_device_train_batch_size == "auto"
    rows = arguments.gradient_accumulation_steps * arguments.per_device_train_batch_size  # a step's on one device
    known = resumed_batch_size(arguments) if open_rows else arguments.per_device_train_batch_size
    known = known if known and rows % known == 0 else None
    step = describe_step(config, arguments, longest, new_token_ids)
    step = replace(step, rows=known or 1, accumulation_steps=rows // (known or 1))
    if takes_bf16(config, arguments, step):
        step = replace(step, **step.in_bf16)
        config, arguments.optim = replace(config, model=step.model), OptimizerNames(step.optimizer)
    kept = keep_activations_that_fit(config, arguments, step)
    step = replace(step, activation_checkpointing=step.activation_checkpointing and not kept)
    if known is None:
        step = most_rows_that_fit(step, rows)
    if open_rows:
        if torch.distributed.is_initialized():  # processes on a CPU could see other memory each
            torch.distributed.broadcast_object_list(shared := [step.rows], 0)
            step = replace(step, rows=shared[0], accumulation_steps=rows // shared[0])
        arguments.per_device_train_batch_size = step.rows
        arguments.gradient_accumulation_steps = step.accumulation_steps
        log.info("A micro-batch has %d of a step's %d rows on a device.", step.rows, rows)
    if config.mode == "train" and config.trainer.check_memory and not kept:
        check_memory(step)
    return config


def takes_bf16(config: Config, arguments: SFTConfig, step: StepShape) -> bool:
    """Whether full fine-tuning takes bf16 weights: where on a GPU they fit, and fp32 ones with not even one row.

    A run that is resumed keeps the dtype that it had.
    """
    named = config.model.dtype or any(field.startswith("optim") for field in config.trainer.fields)
    if named or arguments.deepspeed or not step.in_bf16:
        return False
    had, why = read_checkpoint(arguments, CONFIG_NAME, "dtype", str), "as in the checkpoint"
    rows = step.rows * step.accumulation_steps
    least = replace(step, rows=1, accumulation_steps=rows, activation_checkpointing=True)
    may = not had and config.trainer.check_memory and step.gpu and arguments.bf16 and is_torch_optimi_available()
    if may and not fits(least, room=1) and fits(replace(least, **step.in_bf16), room=1):
        needed, available = (format_bytes(size) for size in (estimate_memory(least).total, available_memory()))
        had, why = "bfloat16", f"fp32 ones would need an estimated {needed} of {available}, with one row at a time"
    if had == "bfloat16" and not is_torch_optimi_available():
        raise ConfigError("The checkpoint's bf16 weights need torch-optimi. Try pip install 'sft-recipes[bf16]'.")
    if had == "bfloat16":
        log.info("Trained weights are bf16 instead, with Kahan summation (trainer.optim=stable_adamw), 10 bytes a "
                 "parameter instead of 16: %s.", why)  # fmt: skip
    return had == "bfloat16"


def keep_activations_that_fit(config: Config, arguments: SFTConfig, step: StepShape) -> bool:
    """Whether trainer.activation_checkpointing=auto lets activations stay in memory, which is then set.

    Else they are computed again: a third more time, the same numbers.
    """
    # FSDP may do that by itself, and has then switched the trainer's off
    is_open = config.trainer.activation_checkpointing == "auto" and arguments.activation_checkpointing
    if not is_open or (arguments.world_size > 1 and not step.gpu):  # processes on a CPU have to agree
        return False
    kept = fits(replace(step, activation_checkpointing=False))
    arguments.activation_checkpointing = not kept
    how = "kept, they fit" if kept else "computed again, which takes a third more time: kept, they might not fit"
    log.info("Activations are %s into %s of memory.", how, format_bytes(int(ROOM * available_memory())))
    return kept


def most_rows_that_fit(step: StepShape, rows: int) -> StepShape:
    """The step with the most rows of a micro-batch that fit, of those that divide a step's `rows`; one at least."""
    sizes = [size for size in range(1, rows + 1) if rows % size == 0]
    parts = [replace(step, rows=size, accumulation_steps=rows // size) for size in sizes]
    return parts[max(bisect_left(parts, True, key=lambda part: not fits(part)) - 1, 0)]


def resumed_batch_size(arguments: SFTConfig) -> int | None:
    """The rows of a micro-batch in the checkpoints of the run that is resumed; None where there is none."""
    size = read_checkpoint(arguments, TRAINER_STATE_NAME, "train_batch_size", int) or 0
    return max(size, 0) // max(1, arguments.n_gpu) or None


def read_checkpoint(arguments: SFTConfig, file: str, key: str, kind: type) -> Any:
    """The value under `key` in a file of the newest checkpoint of the resumed run that has it; None where none has."""
    resume = arguments.resume_from_checkpoint
    for checkpoint in newest_first(Path(arguments.output_dir)) if resume is True else [Path(resume)] if resume else []:
        with suppress(ConfigError, OSError):  # a damaged one, which is passed over later
            if matches_type(value := read_json(checkpoint / file).get(key), kind):
                return value
    return None


def describe_choices(trainer: SFTTrainer) -> dict[str, Any]:
    """What was chosen or named, for metrics.json and the report."""
    arguments = trainer.args
    trained = next(weight.dtype for weight in trainer.model.parameters() if weight.requires_grad)
    return {
        "trained weights": str(trained).removeprefix("torch."),
        "attention": trainer.model.config._attn_implementation,
        "rows of a micro-batch": arguments.per_device_train_batch_size,
        "rows side by side without padding": trainer.padding_free,
        "activations computed again": bool(arguments.activation_checkpointing),
        "optimizer": str(arguments.optim.value),
        "torch.compile": arguments.torch_compile,
        "Liger kernels": arguments.use_liger_kernel,
    }
