"""What a training step's activations take, from the model's config alone: no weights are loaded, nothing is computed.

torch's fake tensors go through a forward and a backward, op by op, in a model of three layers and in one of six; a
layer's share is the difference. Attention is sdpa with a mask of length × length, which padded rows and packed ones
have; flash attention has none.
"""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig
from trl.trainer import utils

from sft_recipes.config.options import AdapterOptions, ModelOptions
from sft_recipes.modeling.adapters import build_peft_config, train_new_tokens
from sft_recipes.modeling.workarounds import ensure_lm_head_bias


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


def peak_bytes(step: StepShape) -> int:
    """The most bytes that a step holds at once, without parameters and the optimizer's state.

    What forward and backward hold grows with the layers in two straight lines, so each is drawn through two points.
    """
    layers = step.model_config.get_text_config().num_hidden_layers
    few, more = (3, 6) if layers > 6 else (max(layers - 1, 1), layers)
    least, most = (step_bytes(step, number) for number in (few, more))
    lines = zip(least, most, strict=True)
    return max(end + (end - start) * (layers - more) // max(more - few, 1) for start, end in lines)


def step_bytes(step: StepShape, layers: int) -> tuple[int, int]:
    """The most bytes that forward and backward hold, those of a step's second batch where gradients are accumulated."""
    with torch.device("meta"):
        model = build_meta_model(step, layers)
    vocabulary = step.model_config.get_text_config().vocab_size
    with FakeTensorMode(allow_non_fake_inputs=True), lm_head_of_device(step.gpu, vocabulary):
        make_fake_tensors(model)
        size = (1, step.rows * step.length) if step.packing else (step.rows, step.length)
        ids = torch.zeros(size, dtype=torch.long)
        with LiveBytes([*model.parameters(), *model.buffers(), ids]) as live:
            for _ in range(min(2, step.accumulation_steps)):
                live.peak = live.now
                with torch.autocast("cpu", torch.bfloat16, enabled=step.gpu):
                    loss = model(input_ids=ids, labels=ids, fused_lm_head=True, use_cache=False).loss
                forward, live.peak = live.peak, live.now
                loss.backward()
                del loss
    return forward, live.peak


def build_meta_model(step: StepShape, layers: int | None = None) -> torch.nn.Module:
    """The model as a run trains it, of so many layers: dtype, adapter, new tokens, checkpointing and TRL's LM head."""
    adapter = build_peft_config(step.adapter)
    dtype = step.model.dtype or ("bfloat16" if adapter and step.gpu else "float32")
    shape = step.model_config if layers is None else shorten_config(step.model_config, layers)
    options = {"trust_remote_code": step.model.trust_remote_code}
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
    """The same architecture with the first so many layers."""
    shape = copy.deepcopy(shape)
    text = shape.get_text_config()
    whole = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return shape


def make_fake_tensors(model: torch.nn.Module) -> None:
    """Gives every parameter and buffer of a model on the meta device a fake tensor on the CPU; tied ones share it."""
    fakes: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None and id(old) not in fakes:
                    new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                    fakes[id(old)] = (
                        torch.nn.Parameter(new, old.requires_grad) if tensors is module._parameters else new
                    )
                tensors[name] = old if old is None else fakes[id(old)]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that ops make, from their first tensor until the last one is gone."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.freed, storage._cdata)
        return result

    def freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


@contextmanager
def lm_head_of_device(gpu: bool, vocabulary: int) -> Iterator[None]:
    """TRL's LM head as it takes memory: on a GPU one kernel works on a tile of logits in place, on a CPU ops copy it.

    A CPU's memory is taken when it is written to, so that of a tile wider than the vocabulary only a part is.
    """
    where = "trl.kernels.chunked_logprob"
    if gpu:
        with patch(f"{where}._forward_tile"), patch(f"{where}._backward_tile"):
            yield
    else:
        width = min(utils._CHUNKED_LOGPROB_CHUNK_SIZE, vocabulary)
        with patch.object(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", width):
            yield
