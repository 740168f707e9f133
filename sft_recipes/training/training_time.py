"""How long a training will take, and what it will cost, by its floating-point operations and a device's rate."""

import time

import torch

from sft_recipes.config.options import PreviewOptions
from sft_recipes.reporting.text import format_duration
from sft_recipes.training.memory import MemoryEstimate

UTILISATION = 0.4  # of a device's rate of matrix products that training reaches: a rule of thumb, often 0.3 to 0.5
MATRIX = {"cpu": 1024, "cuda": 8192}  # rows of the square matrices that are multiplied to measure a device


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
    matrix, times = torch.ones(side, side, device=device, dtype=dtype), 0
    float((matrix @ matrix)[0, 0])  # the first one also loads the library
    start = time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        float((matrix @ matrix)[0, 0])  # which waits for the result
        times += 1
    return times * 2 * side**3 / passed


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
