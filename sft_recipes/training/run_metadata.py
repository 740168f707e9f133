"""What a run is about to do and how long that will take, what it took, and on which machine."""

import logging
import math
import os
import platform
import resource
import subprocess
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch.utils.benchmark import Timer
from transformers.trainer_utils import TrainOutput
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import compute_flops_per_token, compute_mfu, get_peak_flops

from sft_recipes.config.options import PreviewOptions
from sft_recipes.data.packing import padding_share
from sft_recipes.errors import ConfigError, plural
from sft_recipes.reporting.text import format_duration
from sft_recipes.training.memory import MemoryEstimate

log = logging.getLogger(__name__)
UTILISATION = 0.4  # of a device's rate of matrix products that training reaches: a rule of thumb, often 0.3 to 0.5
MATRIX = {"cpu": 1024, "cuda": 8192}  # rows of the square matrices that are multiplied to measure a device


def training_cost(trainer: SFTTrainer, result: TrainOutput) -> dict[str, Any]:
    """Size, time, speed and memory for metrics.json; `mfu` is None where TRL does not know the hardware's peak."""
    seconds, model = result.metrics["train_runtime"], trainer.model
    tokens = max((entry.get("num_tokens", 0) for entry in trainer.state.log_history), default=0)
    rate, mfu, (parameters, trained) = tokens / seconds, None, count_parameters(model)
    dtype = "bfloat16" if trainer.args.bf16 else "float16" if trainer.args.fp16 else "float32"
    peak = get_peak_flops(torch.cuda.get_device_name(), dtype) if torch.cuda.is_available() else None
    if peak:
        each = compute_flops_per_token(model.config.get_text_config(), trainer.args.max_length or 2048)
        # of a forward and two backward products, frozen weights need one less
        each *= 1 if trained > 0.5 * model.num_parameters() else 2 / 3
        mfu = compute_mfu(each, rate, trainer.args.world_size, peak) / 100
    return {
        "parameters": parameters,
        "trainable_parameters": trained,
        "train_seconds": seconds,
        "train_tokens": int(tokens),
        "tokens_per_second": rate,
        "peak_memory_gib": peak_memory_gib(),
        "mfu": mfu,
    }


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """The number of all parameters, as they are stored, and of those that are trained."""
    # of which DeepSpeed leaves a part here
    sizes = [(getattr(weight, "ds_numel", weight.numel()), weight.requires_grad) for weight in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def peak_memory_gib() -> float:
    """The highest memory use so far, in GiB: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def describe_environment() -> dict[str, Any]:
    """Python, system, processors, threads, GPUs, processes, and this library's commit where it is a checkout."""
    gpus = torch.cuda.device_count()
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if gpus else None,
        "gpus": gpus,
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "commit": commit,
    }


def measure_padding(rows: Dataset, arguments: SFTConfig) -> float:
    """The share of padding among the tokens that the model will read; 0 with packing."""
    if arguments.packing:
        return 0.0
    grouped = arguments.train_sampling_strategy == "group_by_length"
    batch, accumulated = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    share = padding_share(rows, batch, accumulated, grouped, arguments.seed)
    log.info("%.1f %% of the tokens the model reads are padding; trainer.packing=true needs none.", 100 * share)
    return share


def training_summary(trainer: SFTTrainer, audit: dict[str, dict]) -> str:
    """One line on what is about to be trained."""
    total = {key: sum(part[key] for part in audit.values()) for key in ("kept", "tokens", "supervised_tokens")}
    tokens = f"{total['tokens']:,} tokens, {total['supervised_tokens']:,} of them supervised"
    if isinstance(trainer.train_dataset, IterableDataset):
        rows = f"streamed rows, the first {total['kept']:,} of which have {tokens}"
    else:
        packed_rows = f", packed into {len(trainer.train_dataset):,}" if trainer.args.packing else ""
        rows = f"{plural(total['kept'], 'row')}{packed_rows}, {tokens}"
    *_, batch, _, steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    parameters, trained = count_parameters(trainer.model)
    return (
        f"Training {trained:,} of {parameters:,} parameters on {rows}: "
        f"{plural(steps, 'step')} of {plural(batch, 'row')}."
    )


def smoke_result(metrics: dict[str, Any], answers: list[dict[str, Any]]) -> str:
    """The result of a +debug=smoke run in a line; raises ConfigError for a loss that is not finite or does not fall."""
    losses = [entry["loss"] for entry in metrics["history"] if "loss" in entry]
    if len(losses) < 2:
        raise ConfigError("Smoke test: too few steps to see the loss fall. Raise trainer.max_steps.")
    first, last = losses[0], sum(losses[-3:]) / len(losses[-3:])
    if not math.isfinite(last) or last >= first:
        raise ConfigError(f"Smoke test failed: the loss went from {first:.3f} to {last:.3f}.")
    example = answers[0]["tuned"] if answers else ""
    return (
        f"Smoke test passed: the loss fell from {first:.3f} to {last:.3f} in {metrics['steps']} steps, peak memory "
        f"{metrics['peak_memory_gib']:.1f} GiB" + (f", it answers {example[:60]!r}." if answers else ".")
    )


def training_operations(tokens: float, estimate: MemoryEstimate, activation_checkpointing: bool) -> float:
    """Floating-point operations of training on so many tokens (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).

    Two a parameter and token forward, two for the gradients of activations, two for those of weights that are trained,
    and two more where activations are computed again. Attention, which grows with the length of rows, is not counted.

    >>> training_operations(10, MemoryEstimate(100, 100, 0, 0, 0, 0), False) == 6 * 10 * 100
    True
    """
    passes = 6 if activation_checkpointing else 4
    return tokens * (passes * estimate.parameters + 2 * estimate.trainable)


def measure_rate(seconds: float = 0.3) -> float:
    """Operations a second of matrix products here: in bf16 on a GPU, in fp32 on a CPU."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    side = MATRIX[device]
    values = {"matrix": torch.ones(side, side, device=device, dtype=dtype)}
    timer = Timer("matrix @ matrix", globals=values, num_threads=torch.get_num_threads())  # which waits for a GPU
    return 2 * side**3 / timer.blocked_autorange(min_run_time=seconds).mean


def describe_time(tokens: float, estimate: MemoryEstimate, options: PreviewOptions, again: bool, devices: int) -> str:
    """The training's time in a line, and its price where that of an hour of all devices is known."""
    operations = training_operations(tokens, estimate, again)
    rate = options.tflops * 1e12 if options.tflops else measure_rate()
    seconds = operations / (rate * UTILISATION * devices)
    hourly = options.price_per_hour
    price = f", {hourly * seconds / 3600:,.2f} at {hourly:g} an hour" if hourly else ""
    source = "as preview.tflops says" if options.tflops else "measured here; preview.tflops=312 states an A100's"
    return (
        f"About {format_duration(seconds)} of training{price}, by {tokens:,.0f} tokens and "
        f"{UTILISATION:.0%} of {rate / 1e12:.3g} TFLOP/s ({source}). A rule of thumb: +debug=smoke measures."
    )
