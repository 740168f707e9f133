"""What a config leaves to the hardware: rows of a micro-batch, and whether activations are kept. Named values stand.

The attention is chosen in `trainer.select_attention`, when the model is on its device.
"""

import logging
from bisect import bisect_left
from dataclasses import replace
from typing import Any

from trl import SFTConfig, SFTTrainer

from sft_recipes.config.schema import Config
from sft_recipes.training.activation_memory import StepShape
from sft_recipes.training.memory import available_memory, describe_step, estimate_memory, format_bytes

log = logging.getLogger(__name__)
ROOM = 0.8  # of the available memory: measured runs of benchmarks/memory.py are within 15 % of their estimates


def fits(step: StepShape) -> bool:
    """Whether a step takes at most ROOM of the memory here; False where its activations cannot be estimated."""
    estimate = estimate_memory(step)
    return estimate.activations is not None and estimate.total <= ROOM * available_memory()


def choose_batch_size(config: Config, arguments: SFTConfig, longest: int) -> None:
    """Sets the most rows of a micro-batch that fit, and the accumulation steps that keep the effective batch.

    Fewer, larger micro-batches use a GPU better. Activations are kept where one row allows it. Nothing is set unless
    trainer.per_device_train_batch_size is auto.
    """
    if config.trainer.per_device_train_batch_size != "auto":
        return
    rows = arguments.gradient_accumulation_steps * arguments.per_device_train_batch_size  # a step's on one device
    sizes = [size for size in range(1, rows + 1) if rows % size == 0]
    step = describe_step(config, arguments, longest)
    if config.trainer.activation_checkpointing == "auto":
        step = replace(step, activation_checkpointing=not fits(replace(step, rows=1, activation_checkpointing=False)))
    parts = [replace(step, rows=size, accumulation_steps=rows // size) for size in sizes]
    size = sizes[max(bisect_left(parts, True, key=lambda part: not fits(part)) - 1, 0)]
    arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps = size, rows // size
    log.info("A micro-batch has %d of a step's %d rows on a device, the most that fit.", size, rows)


def keep_activations_that_fit(config: Config, arguments: SFTConfig, step: StepShape) -> bool:
    """Whether trainer.activation_checkpointing=auto lets activations stay in memory, which is then set.

    They are computed again where they would not fit: a third more time, the same numbers. Several processes on a CPU
    could see other memory each, and they have to agree.
    """
    # FSDP may do it by itself, and has then switched the trainer's off
    is_open = config.trainer.activation_checkpointing == "auto" and arguments.activation_checkpointing
    if not is_open or (arguments.world_size > 1 and not step.gpu):
        return False
    try:
        kept = fits(replace(step, activation_checkpointing=False))
    except Exception:  # whatever PEFT or a model's own code raises on the meta device; check_memory says it
        kept = False
    arguments.activation_checkpointing = not kept
    how = "kept, they fit" if kept else "computed again, which takes a third more time: kept, they might not fit"
    log.info("Activations are %s into %s of memory.", how, format_bytes(int(ROOM * available_memory())))
    return kept


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
