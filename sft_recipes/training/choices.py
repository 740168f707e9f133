"""What a config leaves to the hardware: rows of a micro-batch, and whether activations are kept. Named values stand.

The attention is chosen in `trainer.select_attention`, when the model is on its device.
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
from trl import SFTConfig, SFTTrainer

from sft_recipes.config.schema import Config
from sft_recipes.config.validation import matches_type
from sft_recipes.errors import ConfigError, plural
from sft_recipes.reporting.run_folder import read_json
from sft_recipes.training.activation_memory import StepShape
from sft_recipes.training.checkpoints import newest_first
from sft_recipes.training.memory import (
    available_memory,
    check_memory,
    describe_step,
    estimate_memory,
    format_bytes,
)

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


def fits(step: StepShape) -> bool:
    """Whether a step takes at most ROOM of the memory here; False where its activations cannot be estimated."""
    try:
        estimate = estimate_memory(step)
    except Exception:  # whatever PEFT or a model's own code raises on the meta device; check_memory says it
        return False
    return estimate.activations is not None and estimate.total <= ROOM * available_memory()


def choose_step(config: Config, arguments: SFTConfig, longest: int, new_token_ids: Sequence[int] = ()) -> None:
    """Sets what the config leaves to the hardware, and raises ConfigError where the step would not fit into memory.

    Activations are kept where they fit, those of one row where rows are open, too. The rows of a micro-batch are the
    most that fit, with the accumulation steps that keep the effective batch, since fewer, larger ones use a GPU better.
    A run that is resumed keeps the rows that it had, whose sums round as they did.
    """
    if config.mode == "evaluate":
        return
    open_rows = config.trainer.per_device_train_batch_size == "auto"
    rows = arguments.gradient_accumulation_steps * arguments.per_device_train_batch_size  # a step's on one device
    known = resumed_batch_size(arguments) if open_rows else arguments.per_device_train_batch_size
    known = known if known and rows % known == 0 else None
    step = describe_step(config, arguments, longest, new_token_ids)
    step = replace(step, rows=known or 1, accumulation_steps=rows // (known or 1))
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
    resume = arguments.resume_from_checkpoint
    for checkpoint in newest_first(Path(arguments.output_dir)) if resume is True else [Path(resume)] if resume else []:
        with suppress(ConfigError, OSError):  # a damaged one, which is passed over later
            size = read_json(checkpoint / TRAINER_STATE_NAME).get("train_batch_size")
            if matches_type(size, int) and size >= max(1, arguments.n_gpu):
                return size // max(1, arguments.n_gpu)
    return None


def describe_choices(trainer: SFTTrainer) -> dict[str, Any]:
    """What was chosen or named, for metrics.json and the report."""
    arguments = trainer.args
    return {
        "attention": trainer.model.config._attn_implementation,
        "rows of a micro-batch": arguments.per_device_train_batch_size,
        "rows side by side without padding": trainer.padding_free,
        "activations computed again": bool(arguments.activation_checkpointing),
        "optimizer": str(arguments.optim.value),
        "torch.compile": arguments.torch_compile,
        "Liger kernels": arguments.use_liger_kernel,
    }
