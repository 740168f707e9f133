"""The memory that a training step's activations take, from the model's config alone: no weights are loaded.

torch's fake tensors, which have shapes but no values, go through a forward and a backward pass op by op, in a model of
three layers and in one of six; a layer's share is the difference. Attention is sdpa with a mask of length × length, as
for padded and for packed rows; flash attention makes no such mask and takes less.
"""

import copy
import weakref
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import DEFAULT, patch

import torch
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PretrainedConfig
from trl.trainer import utils

from sft_recipes.config.options import AdapterOptions, ModelOptions
from sft_recipes.modeling.adapters import build_peft_config, train_new_tokens
from sft_recipes.modeling.model_files import explained_model
from sft_recipes.modeling.workarounds import ensure_lm_head_bias

ADAMW = {"adamw_torch", "adamw_torch_fused", "adamw_apex_fused", "paged_adamw_32bit"}  # with 8 bytes of state a number
LEAST_LAYERS, MOST_LAYERS = 3, 6  # of the two models whose difference gives a layer's share


@dataclass(frozen=True)
class StepShape:
    """What decides how much memory a training step takes."""

    model: ModelOptions
    adapter: AdapterOptions
    model_config: PretrainedConfig
    new_token_ids: tuple[int, ...]  # an adapter trains their rows through copies of the whole embedding
    gpu: bool  # with bf16 autocast and the fused LM head, else on a CPU in fp32
    rows: int  # in a micro-batch
    length: int  # tokens of the longest row
    packing: bool
    accumulation_steps: int
    activation_checkpointing: bool
    optimizer: str  # by its name in transformers
    shards: int  # processes that share weights, gradients and optimizer state
    fp16: bool = False  # computed in by autocast, on a GPU that may lack bf16

    @property
    def in_bf16(self) -> dict[str, Any]:
        """The fields that change where weights that AdamW trains in fp32 are trained in bf16, by Kahan summation.

        That is 10 bytes a parameter instead of 16. Empty for any other step, and for shards and fp16, not tried.
        """
        by_adamw = self.adapter.type == "none" and self.optimizer in ADAMW and self.shards == 1 and not self.fp16
        in_fp32 = by_adamw and self.model.dtype != "bfloat16"
        return {"model": replace(self.model, dtype="bfloat16"), "optimizer": "stable_adamw"} if in_fp32 else {}


def peak_bytes(step: StepShape) -> int:
    """The most bytes that a step holds at once besides parameters and the optimizer's state, gradients included.

    Forward and backward each grow linearly with the number of layers, so a line through two depths gives any other.
    """
    layers = step.model_config.get_text_config().num_hidden_layers
    if layers <= MOST_LAYERS:
        return max(step_bytes(step, layers))
    low, high = (step_bytes(step, number) for number in (LEAST_LAYERS, MOST_LAYERS))
    slopes = ((end - start, end) for start, end in zip(low, high, strict=True))
    return max(end + rise * (layers - MOST_LAYERS) // (MOST_LAYERS - LEAST_LAYERS) for rise, end in slopes)


def step_bytes(step: StepShape, layers: int) -> tuple[int, int]:
    """The most bytes that forward and backward hold; where gradients are accumulated, in a step's second batch."""
    with torch.device("meta"):
        model = build_meta_model(step, layers)
    vocabulary = step.model_config.get_text_config().vocab_size
    with FakeTensorMode(allow_non_fake_inputs=True), lm_head_of_device(step.gpu, vocabulary):
        tensors = [*model.named_parameters(), *model.named_buffers()]
        fakes = {name: torch.empty_like(one, device="cpu", requires_grad=one.requires_grad) for name, one in tensors}
        size = (1, step.rows * step.length) if step.packing else (step.rows, step.length)
        ids = torch.zeros(size, dtype=torch.long)
        with _reparametrize_module(model, fakes, tie_weights=True), LiveBytes([*fakes.values(), ids]) as live:
            for _ in range(min(2, step.accumulation_steps)):
                live.peak = live.now
                with torch.autocast("cpu", torch.bfloat16, enabled=step.gpu):
                    loss = model(input_ids=ids, labels=ids, fused_lm_head=True, use_cache=False).loss
                forward, live.peak = live.peak, live.now
                loss.backward()
                del loss
    return forward, live.peak


def build_meta_model(step: StepShape, layers: int | None = None) -> torch.nn.Module:
    """The model as a run trains it, with so many layers: dtype, adapter, new tokens, checkpointing, TRL's LM head."""
    adapter = build_peft_config(step.adapter)
    dtype = step.model.dtype or ("bfloat16" if adapter and step.gpu else "float32")
    shape = step.model_config if layers is None else shorten_config(step.model_config, layers)
    options = {"trust_remote_code": step.model.trust_remote_code}
    with explained_model(step.model.id, found=True):
        model = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, dtype), **options)
    model.train()
    if step.activation_checkpointing:
        model.activation_checkpointing_enable()
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    if adapter:
        train_new_tokens(adapter, model, list(step.new_token_ids))
        model = get_peft_model(model, adapter, autocast_adapter_dtype=False)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    ensure_lm_head_bias(model)
    return model


def shorten_config(shape: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same architecture with its first so many layers."""
    shape = copy.deepcopy(shape)
    text = shape.get_text_config()
    depth = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == depth:  # such as layer_types
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return shape


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that an op makes, from its first tensor until its last one is freed."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        # the storages themselves are kept, since the id of one that is freed is given to another
        self.known = {id(tensor.untyped_storage()): tensor.untyped_storage() for tensor in known}
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self.known and id(storage) not in self.sizes:
                    self.sizes[id(storage)] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.free, id(storage))
        return result

    def free(self, key: int) -> None:
        """Takes off a storage's bytes."""
        self.now -= self.sizes.pop(key, 0)


def lm_head_of_device(gpu: bool, vocabulary: int) -> AbstractContextManager:
    """TRL's LM head with the memory that it takes: on a GPU a kernel computes a tile of logits in place.

    On a CPU ops copy the tile. Memory is taken there when it is written to, so a tile that is wider than the vocabulary
    takes a part of its size.
    """
    if gpu:
        return patch.multiple("trl.kernels.chunked_logprob", _forward_tile=DEFAULT, _backward_tile=DEFAULT)
    return patch.object(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", min(utils._CHUNKED_LOGPROB_CHUNK_SIZE, vocabulary))
