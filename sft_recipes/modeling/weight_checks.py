"""What is wrong with a base model before it is trained: weights that are no numbers, or none at all."""

import math

import torch
from transformers import PreTrainedModel

from sft_recipes.errors import ConfigError


@torch.no_grad()
def check_weights(model: PreTrainedModel, id: str) -> None:
    """Raises ConfigError for a matrix of zeros and for weights that are not finite, by their name.

    An adapter's own matrices may be zero before they are trained.
    """
    for name, value in model.named_parameters():
        if not value.is_floating_point() or value.is_meta or not value.numel():
            continue
        low, high = (end.item() for end in (value.float() if value.itemsize == 1 else value).aminmax())  # NaN stays NaN
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ConfigError(
                f"model.id={id}: {name} has values that are not finite (NaN or infinity), so no loss could be. Its "
                "file is damaged, or its training failed: take another copy."
            )
        if low == high == 0 and value.ndim > 1 and "lora_" not in name:
            raise ConfigError(f"model.id={id}: {name} is all zeros. Its file is not whole: take another copy.")
