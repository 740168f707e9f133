"""A model while it answers or is measured: without dropout, in bf16 on a GPU that has it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel


@contextmanager
def eval_mode(model: PreTrainedModel, use_cache: bool | None = None) -> Iterator[None]:
    """The model without dropout and, unless None, with `use_cache` in its config; afterwards both are as before.

    An exception inside restores them, too: the run that catches it goes on training the same model.
    """
    was_training, old_cache = model.training, getattr(model.config, "use_cache", None)
    model.eval()
    if use_cache is not None:
        model.config.use_cache = use_cache
    try:
        yield
    finally:
        if use_cache is not None:
            model.config.use_cache = old_cache
        model.train(was_training)


def stop_token_ids(config: GenerationConfig | PretrainedConfig) -> list[int]:
    """The ids at which an answer ends, which a config has as a list, as a number or not at all."""
    ids = config.eos_token_id
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def bf16_autocast(model: PreTrainedModel) -> AbstractContextManager:
    """bf16 on a GPU that has it, as in training; nothing changes elsewhere."""
    enabled = model.device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=enabled)
