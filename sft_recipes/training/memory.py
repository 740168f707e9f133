"""The estimated peak memory of a run on one device, and what to change in a config that does not fit.

Parameters, gradients and the optimizer's state are counted on the meta device, activations by `activation_memory`. What
saving the model takes is not counted. `benchmarks/memory.py` compares the estimate with measured runs.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig
from trl import SFTConfig

from sft_recipes.config.options import AdapterOptions
from sft_recipes.config.schema import Config
from sft_recipes.errors import ConfigError, one_line
from sft_recipes.modeling.loading import load_model_config
from sft_recipes.training.activation_memory import StepShape, build_meta_model, peak_bytes

log = logging.getLogger(__name__)
CUDA_CONTEXT_BYTES = 2**29  # of a GPU, taken before the first tensor; an assumption, not measured
# Bytes of state for every trained number, by the optimizer's name in transformers; other names count as AdamW's 8
OPTIMIZER_BYTES = {"sgd": 0, "adafactor": 0, "lion_32bit": 4, "rmsprop": 4, "adagrad": 4}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak on one device; `activations` is the rest of it, besides weights, gradients and optimizer."""

    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    activations: int | None  # None where the architecture cannot be run with fake tensors

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + (self.activations or 0)


def describe_step(
    config: Config,
    arguments: SFTConfig,
    length: int,
    new_token_ids: Sequence[int] = (),
    gpu: bool | None = None,
    model_config: PretrainedConfig | None = None,
) -> StepShape:
    """The step of a run whose longest row has `length` tokens, on a GPU if `gpu` (None: where there is one).

    `model_config` is the model's config, else read from model.id.
    """
    return StepShape(
        model=config.model,
        adapter=config.adapter,
        model_config=model_config or load_model_config(config.model),
        new_token_ids=tuple(new_token_ids),
        gpu=torch.cuda.is_available() if gpu is None else gpu,
        rows=arguments.per_device_train_batch_size,
        length=length,
        packing=arguments.packing,
        accumulation_steps=arguments.gradient_accumulation_steps,
        activation_checkpointing=arguments.activation_checkpointing,
        optimizer=str(arguments.optim.value),
        shards=arguments.world_size if arguments.fsdp or arguments.deepspeed else 1,
    )


def estimate_memory(step: StepShape) -> MemoryEstimate:
    """The peak of a run on one device."""
    with torch.device("meta"):
        model = build_meta_model(step)
    weights = sum(stored_bytes(model, step.adapter.quantization or {}).values())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = 4 * sum(parameter.numel() for parameter in trained)
    optimizer = sum(optimizer_state_bytes(step.optimizer, parameter) for parameter in trained)
    try:
        activations = max(peak_bytes(step) - gradients, 0) + dequantized_bytes(model, step.adapter.quantization)
    except (RuntimeError, NotImplementedError):  # mixtures of experts route by values, which fake tensors lack
        activations = None
    parts = (part // step.shards for part in (weights, gradients, optimizer))
    return MemoryEstimate(count_parameters(model), sum(p.numel() for p in trained), *parts, activations)


def stored_bytes(model: torch.nn.Module, quantization: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of every parameter as it is stored: quantized linear layers in 4 or 8 bits, tied parameters once."""
    packed = quantization.get("load_in_4bit") or quantization.get("load_in_8bit")
    each = 1.0 if quantization.get("load_in_8bit") else 0.5
    each += 0.0159 if quantization.get("bnb_4bit_use_double_quant") else 0.0625  # scales of blocks of 64 weights
    linear = {id(layer.weight) for layer in frozen_linear_layers(model)} if packed else set()
    return {
        name: int(parameter.numel() * (each if id(parameter) in linear else parameter.element_size()))
        for name, parameter in model.named_parameters()
    }


def frozen_linear_layers(model: torch.nn.Module) -> list[torch.nn.Linear]:
    """The layers that bitsandbytes would quantize: all linear ones except the LM head and the adapter's own."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings()
    linear = (module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head)
    return [layer for layer in linear if not layer.weight.requires_grad]


def dequantized_bytes(model: torch.nn.Module, quantization: Mapping[str, Any] | None) -> int:
    """Bytes of the largest quantized layer in bf16, to which it is converted to be multiplied."""
    return 2 * max((layer.weight.numel() for layer in frozen_linear_layers(model)), default=0) if quantization else 0


def optimizer_state_bytes(name: str, parameter: torch.Tensor) -> int:
    """Bytes of state that an optimizer, by its name in transformers, keeps for a parameter.

    >>> weight = torch.empty(8, 4)
    >>> optimizer_state_bytes("adamw_torch_fused", weight), optimizer_state_bytes("paged_adamw_8bit", weight)
    (256, 64)
    """
    if name == "adafactor":  # a row and a column of second moments
        return 4 * sum(parameter.shape[-2:]) if parameter.dim() > 1 else 4 * parameter.numel()
    return parameter.numel() * OPTIMIZER_BYTES.get(name, 2 if "8bit" in name else 8)


def count_parameters(model: torch.nn.Module) -> int:
    """The number of parameters, including an adapter's."""
    return sum(parameter.numel() for parameter in model.parameters())


def available_memory() -> int:
    """Bytes that a run can use here: of the GPU where there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory - CUDA_CONTEXT_BYTES
    try:
        with open("/proc/meminfo", encoding="utf-8") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(step: StepShape, memory: int | None = None) -> MemoryEstimate | None:
    """The estimate; raises ConfigError with advice where it exceeds `memory`, in bytes (None: what is available).

    None where a model of this kind cannot be built without its weights: the estimate never decides what is possible.
    """
    memory = available_memory() if memory is None else memory
    try:
        estimate = estimate_memory(step)
    except Exception as error:  # whatever PEFT or a model's own code raises on the meta device
        log.warning("Memory cannot be estimated for this run (%s: %s).", type(error).__name__, one_line(error)[:120])
        return None
    if estimate.total > memory:
        raise ConfigError(
            f"This run needs an estimated {format_bytes(estimate.total)} of memory, of {format_bytes(memory)} "
            f"available: {describe_parts(estimate)}. {memory_advice(step, memory)} "
            "Or trainer.check_memory=false, which trains anyway."
        )
    return estimate


def describe_out_of_memory(step: StepShape, doing: str) -> str:
    """The line for a run that ran out of memory: at what, what was estimated, and what to change, in order."""
    try:
        estimate = f"it was estimated at {format_bytes(estimate_memory(step).total)}"
    except Exception:
        estimate = "it could not be estimated"
    half = max(1, step.rows // 2)
    batch = (
        f"trainer.per_device_train_batch_size={half} with trainer.gradient_accumulation_steps="
        f"{step.accumulation_steps * step.rows // half}, the same step in smaller parts"
    )
    advice = [] if step.rows == 1 else [batch]
    advice += [] if step.activation_checkpointing else ["trainer.activation_checkpointing=true"]
    advice += [f"trainer.max_length={max(1, step.length // 2)}"]
    advice += [] if step.adapter.quantization else ["adapter=lora" if step.adapter.type == "none" else "adapter=qlora"]
    listed = "; ".join(f"{place}. {what}" for place, what in enumerate(advice[:3], start=1))
    return f"Out of memory {doing}: {estimate}. What helps, in this order: {listed}."


def memory_advice(step: StepShape, memory: int) -> str:
    """What to write for the first of a few changes with which the run would fit."""
    lora = AdapterOptions("lora", {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"})
    qlora = replace(lora, quantization={"load_in_4bit": True, "bnb_4bit_use_double_quant": True})
    batch = ("trainer.per_device_train_batch_size=1", {"rows": 1})
    recomputed = ("trainer.activation_checkpointing=true", {"activation_checkpointing": True})
    changes = [change for change in (batch, recomputed) if replace(step, **change[1]) != step]
    tries = [[change] for change in changes] + [changes] * (len(changes) > 1)
    if step.adapter.type == "none":
        tries += [[*some, ("adapter=lora", {"adapter": lora})] for some in ([], changes)]
    if not step.adapter.quantization:
        tries += [[*some, ("adapter=qlora", {"adapter": qlora})] for some in ([], changes)]
    for some in tries:
        tried = replace(step, **{key: value for _, change in some for key, value in change.items()})
        if estimate_memory(tried).total <= memory:
            return f"Write {' '.join(what for what, _ in some)}."
    return "Take a smaller model or a shorter trainer.max_length, or shard the model over devices with trainer.fsdp."


def describe_memory(estimate: MemoryEstimate, memory: int | None = None) -> str:
    """The estimate in two lines, for the preview."""
    trained = f", {estimate.trainable:,} of them trained" if estimate.trainable < estimate.parameters else ""
    available = "" if memory is None else f" of {format_bytes(memory)} available"
    peak = f"Estimated peak memory {format_bytes(estimate.total)}{available}"
    return f"{estimate.parameters:,} parameters{trained}. {peak}:\n  {describe_parts(estimate)}."


def describe_parts(estimate: MemoryEstimate) -> str:
    """The parts of the estimate, each with its size."""
    sizes = {name: getattr(estimate, name) for name in ("weights", "gradients", "optimizer", "activations")}
    return ", ".join(
        f"{name} {'not estimated' if size is None else format_bytes(size)}" for name, size in sizes.items()
    )


def format_bytes(size: int) -> str:
    """Bytes in MiB or GiB.

    >>> format_bytes(3 * 2**29), format_bytes(50 * 2**20), format_bytes(2**19)
    ('1.5 GiB', '50 MiB', '0.5 MiB')
    """
    if size >= 2**30:
        return f"{size / 2**30:.1f} GiB"
    return f"{size / 2**20:.0f} MiB" if size >= 10 * 2**20 else f"{size / 2**20:.1f} MiB"
