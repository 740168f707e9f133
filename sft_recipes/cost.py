"""What training took: seconds, tokens, memory, and the share of the hardware's peak."""

import resource
from typing import Any

import torch
from transformers.trainer_utils import TrainOutput
from trl import SFTTrainer
from trl.trainer.utils import compute_flops_per_token, compute_mfu, get_peak_flops


def cost(trainer: SFTTrainer, result: TrainOutput) -> dict[str, Any]:
    """The entries of metrics.json; `mfu` is None where the hardware's peak is not known to TRL."""
    seconds, model = result.metrics["train_runtime"], trainer.model
    tokens = max((entry.get("num_tokens", 0) for entry in trainer.state.log_history), default=0)
    rate, mfu = tokens / seconds, None
    dtype = "bfloat16" if trainer.args.bf16 else "float16" if trainer.args.fp16 else "float32"
    peak = get_peak_flops(torch.cuda.get_device_name(), dtype) if torch.cuda.is_available() else None
    if peak:
        each = compute_flops_per_token(model.config.get_text_config(), trainer.args.max_length or 2048)
        each *= 1 if trainable(model) > 0.5 * model.num_parameters() else 2 / 3  # frozen weights need no gradients
        mfu = compute_mfu(each, rate, trainer.args.world_size, peak) / 100
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable_parameters": trainable(model),
        "train_seconds": seconds,
        "train_tokens": int(tokens),
        "tokens_per_second": rate,
        "peak_memory_gib": peak_memory(),
        "mfu": mfu,
    }


def trainable(model: torch.nn.Module) -> int:
    """The number of parameters that training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def peak_memory() -> float:
    """The most memory the run has held so far, in GiB: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
