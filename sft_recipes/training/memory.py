"""The estimated peak memory of a run on one device, and what to change in a config that does not fit.

Parameters, gradients and the optimizer's state are counted on the meta device, activations by `activation_memory`. What
saving the model takes is not counted. `benchmarks/memory.py` compares the estimate with measured runs.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from transformers import PretrainedConfig
from transformers.utils import is_torch_optimi_available
from trl import SFTConfig

from sft_recipes.config.options import AdapterOptions
from sft_recipes.config.schema import Config
from sft_recipes.errors import ConfigError, one_line
from sft_recipes.modeling.loading import load_model_config
from sft_recipes.modeling.workarounds import whole_under_zero3
from sft_recipes.training.activation_memory import StepShape, build_meta_model, peak_bytes
from sft_recipes.training.sharding import is_sharded, is_sharded_by_fsdp2

log = logging.getLogger(__name__)
CUDA_CONTEXT_BYTES = 2**29  # of a GPU, taken before the first tensor; an assumption, not measured
# Bytes of state for every trained number, by the optimizer's name in transformers; other names count as AdamW's 8
OPTIMIZER_BYTES = {"sgd": 0, "adafactor": 0, "lion_32bit": 4, "rmsprop": 4, "adagrad": 4, "adamw_torch_4bit": 1}


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
    model_config: PretrainedConfig | None = None,
) -> StepShape:
    """The step of a run whose longest row has `length` tokens, on a GPU where there is one.

    `model_config` is the model's config, else read from model.id.
    """
    in_fp32 = (
        config.adapter.type == "none" and config.model.dtype != "float32" and not trains_in_bf16(config, arguments)
    )
    return StepShape(
        model=replace(config.model, dtype=None) if in_fp32 else config.model,  # whatever model.dtype says
        adapter=config.adapter,
        model_config=model_config or load_model_config(config.model),
        new_token_ids=tuple(new_token_ids),
        gpu=torch.cuda.is_available(),
        rows=arguments.per_device_train_batch_size,
        length=length,
        packing=arguments.packing,
        accumulation_steps=arguments.gradient_accumulation_steps,
        activation_checkpointing=arguments.activation_checkpointing
        or bool((arguments.fsdp_config or {}).get("activation_checkpointing")),
        optimizer=str(arguments.optim.value),
        shards=arguments.world_size if is_sharded(arguments) else 1,
        fp16=arguments.fp16,
    )


def trains_in_bf16(config: Config, arguments: SFTConfig) -> bool:
    """Whether weights that are trained in full stay bf16: where model.dtype says so and the optimizer can do that."""
    return config.adapter.type == "none" and config.model.dtype == "bfloat16" and keeps_small_updates(arguments)


def keeps_small_updates(arguments: SFTConfig) -> bool:
    """Whether the optimizer can train bf16 weights, which stand still where AdamW's small updates are rounded away.

    One sums up what was rounded off (Kahan summation, pip install torch-optimi), two round at random, up as often as
    the update says (pip install torchao). FSDP2 has them in fp32 where bf16 is computed in (accelerate 1.15).
    """
    if arguments.bf16 and is_sharded_by_fsdp2(arguments):
        return False
    if arguments.optim in ("adamw_torch_8bit", "adamw_torch_4bit"):
        return "bf16_stochastic_round=true" in (arguments.optim_args or "").replace(" ", "").lower().split(",")
    return arguments.optim == "stable_adamw"


@whole_under_zero3()
def estimate_memory(step: StepShape) -> MemoryEstimate:
    """The peak of a run on one device."""
    with torch.device("meta"):
        model = build_meta_model(step)
    weights, dequantized = weight_bytes(model, step.adapter.quantization or {})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    optimizer = sum(optimizer_state_bytes(step.optimizer, parameter) for parameter in trained)
    try:
        activations = max(peak_bytes(step) - gradients, 0) + dequantized
    except (RuntimeError, NotImplementedError):  # mixtures of experts route by values, which fake tensors lack
        activations = None
    parts = (part // step.shards for part in (weights, gradients, optimizer))
    numbers = (sum(weight.numel() for weight in some) for some in (model.parameters(), trained))
    return MemoryEstimate(*numbers, *parts, activations)


def estimate_if_possible(step: StepShape) -> MemoryEstimate | None:
    """The estimate; None, which the log explains, where such a model cannot be built without its weights.

    An estimate never decides what is possible.
    """
    try:
        return estimate_memory(step)
    except Exception as error:  # whatever PEFT or a model's own code raises on the meta device
        log.warning("Memory cannot be estimated for this run (%s: %s).", type(error).__name__, one_line(error)[:120])
        return None


def weight_bytes(model: torch.nn.Module, quantization: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of all parameters as they are stored, and of the largest quantized layer in bf16, in which it computes.

    bitsandbytes quantizes all linear layers except the LM head and the adapter's own. Tied parameters count once.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    linear = (module for module in model.modules() if isinstance(module, torch.nn.Linear) and quantization)
    layers = [layer for layer in linear if layer is not base.get_output_embeddings() and not layer.weight.requires_grad]
    each = 1.0 if quantization.get("load_in_8bit") else 0.5
    each += 0.0159 if quantization.get("bnb_4bit_use_double_quant") else 0.0625  # scales of blocks of 64 weights
    quantized = {id(layer.weight): layer.weight.numel() for layer in layers}
    rest = sum(weight.numel() * weight.element_size() for weight in model.parameters() if id(weight) not in quantized)
    return rest + int(each * sum(quantized.values())), 2 * max(quantized.values(), default=0)


def optimizer_state_bytes(name: str, parameter: torch.Tensor) -> int:
    """Bytes of state that an optimizer, by its name in transformers, keeps for a parameter.

    >>> weight = torch.empty(8, 4)
    >>> optimizer_state_bytes("adamw_torch_fused", weight), optimizer_state_bytes("paged_adamw_8bit", weight)
    (256, 64)
    """
    if name == "adafactor":  # a row and a column of second moments
        return 4 * sum(parameter.shape[-2:]) if parameter.dim() > 1 else 4 * parameter.numel()
    if name == "stable_adamw" and parameter.dtype == torch.bfloat16:  # two moments and what was rounded off, as wide
        return 6 * parameter.numel()
    return parameter.numel() * OPTIMIZER_BYTES.get(name, 2 if "8bit" in name else 8)


def available_memory() -> int:
    """Bytes that a run can use here: of the GPU where there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory - CUDA_CONTEXT_BYTES
    return psutil.virtual_memory().available


def check_memory(step: StepShape, memory: int | None = None) -> MemoryEstimate | None:
    """The estimate; raises ConfigError with advice where it exceeds `memory`, in bytes (None: what is available)."""
    memory = available_memory() if memory is None else memory
    estimate = estimate_if_possible(step)
    if estimate and estimate.total > memory:
        raise ConfigError(
            f"This run needs an estimated {format_bytes(estimate.total)} of memory, of {format_bytes(memory)} "
            f"available: {describe_parts(estimate)}. {memory_advice(step, memory)} "
            "Or trainer.check_memory=false, which trains anyway."
        )
    return estimate


def describe_out_of_memory(step: StepShape, doing: str) -> str:
    """The line for a run that ran out of memory: at what, what was estimated, and what to change, in order."""
    estimate = estimate_if_possible(step)
    known = f"it was estimated at {format_bytes(estimate.total)}" if estimate else "it could not be estimated"
    listed = "; ".join(f"{place}. {what}" for place, (what, _) in enumerate(smaller_steps(step)[:3], start=1))
    return f"Out of memory {doing}: {known}. What helps, in this order: {listed}."


def memory_advice(step: StepShape, memory: int) -> str:
    """What to write for the first of a few changes with which the run would fit: one alone, or with those before."""
    changes = smaller_steps(step)
    alone_or_with = [[[one], changes[:number]] for number, one in enumerate(changes, start=1)]
    for some in sum(alone_or_with, [])[1:]:  # the first is the same alone
        written = {tuple(change): what for what, change in some}  # QLoRA in LoRA's place
        fields = {key: value for _, change in some for key, value in change.items()}
        if estimate_memory(replace(step, **fields)).total <= memory:
            return f"Write {' '.join(written.values())}."
    return "Take a smaller model or a shorter trainer.max_length, or shard the model over devices with trainer.fsdp."


def smaller_steps(step: StepShape) -> list[tuple[str, dict[str, Any]]]:
    """What makes a step take less memory, the cheapest first: what to write, and the fields that it changes."""
    lora = AdapterOptions("lora", {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"})
    qlora = replace(lora, quantization={"load_in_4bit": True, "bnb_4bit_use_double_quant": True})
    accumulated, half = step.accumulation_steps * step.rows, max(1, step.length // 2)
    same_step = f"trainer.per_device_train_batch_size=1 trainer.gradient_accumulation_steps={accumulated}"
    trained = {"model": step.model, "optimizer": step.optimizer, "adapter": step.adapter}  # in one another's place
    install = "" if is_torch_optimi_available() else " (pip install 'sft-recipes[bf16]')"
    changes = [
        (same_step, {"rows": 1, "accumulation_steps": accumulated}),
        ("trainer.activation_checkpointing=true", {"activation_checkpointing": True}),
        (f"model.dtype=bfloat16 trainer.optim=stable_adamw{install}", trained | step.in_bf16),
        ("adapter=lora", trained | {"adapter": lora if step.adapter.type == "none" else step.adapter}),
        ("adapter=qlora", trained | {"adapter": step.adapter if step.adapter.quantization else qlora}),
        (f"trainer.max_length={half}", {"length": half}),
    ]
    return [(what, change) for what, change in changes if replace(step, **change) != step]


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
