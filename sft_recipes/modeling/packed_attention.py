"""Attention for packed rows: which implementation, and the proof that documents do not see each other."""

import logging
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sft_recipes.errors import ConfigError, one_line

log = logging.getLogger(__name__)
BY_DOCUMENT = "sdpa_by_document"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.2, torch.float16: 0.02}  # rounding that another kernel shape brings


def sdpa_by_document(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """torch's sdpa document by document, at the boundaries that TRL's padding-free collator provides.

    Tensors are (1, heads, tokens, width), as transformers gives them to every attention function. A dense mask over a
    packed row computes every pair of tokens, also those of two documents.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, *part, None, **arguments)[0] for part in parts]
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(BY_DOCUMENT, sdpa_by_document)
AttentionMaskInterface.register(BY_DOCUMENT, sdpa_mask)  # generation pads, and then the mask is needed


def choose_attention(model: PreTrainedModel) -> str:
    """The attention implementation for packed rows on this machine.

    On a CPU sdpa document by document where the model takes any implementation and has no sliding window (which the
    model's own mask carries). On a GPU flash attention where it is installed, else the model's own choice: nothing else
    has been measured there by us.
    """
    if model.device.type == "cpu":
        plain = model.config._attn_implementation == "sdpa" and getattr(model.config, "sliding_window", None) is None
        layers = set(getattr(model.config, "layer_types", None) or ["full_attention"])
        return BY_DOCUMENT if plain and layers == {"full_attention"} else model.config._attn_implementation
    return "flash_attention_2" if find_spec("flash_attn") else model.config._attn_implementation


def select_packed_attention(model: PreTrainedModel, given: str | None) -> None:
    """Chooses the attention for packed rows unless one is `given`, and proves that documents are kept apart."""
    if given is None:
        model.set_attn_implementation(choose_attention(model))
    change = check_no_cross_document_attention(model)
    log.info(
        "Packed documents are apart: another first one changes the second's logits by %.1g (%s attention).",
        change,
        model.config._attn_implementation,
    )


@torch.no_grad()
def check_no_cross_document_attention(model: PreTrainedModel, length: int = 24) -> float:
    """The largest change that another first document makes to the logits of the second in one packed row.

    Raises ConfigError where it is more than rounding: then packed documents read each other.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    size = model.get_input_embeddings().weight.shape[0]
    first, other, second = torch.randint(size, (3, 1, length), generator=generator)
    ends = torch.tensor([0, length, 2 * length], dtype=torch.int32, device=model.device)
    boundaries = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": length, "max_length_k": length}
    sequence = torch.repeat_interleave(torch.arange(2, dtype=torch.int32), length)[None].to(model.device)
    positions = torch.arange(length).repeat(2)[None].to(model.device)

    def logits(document: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([document, second], dim=1).to(model.device)
        out = model(input_ids=ids, position_ids=positions, seq_idx=sequence, use_cache=False, **boundaries)
        return out.logits[:, length:].float()

    try:
        change = (logits(first) - logits(other)).abs().max().item()
    except TypeError as error:
        raise ConfigError(packing_refusal(model, "takes no position_ids")) from error
    except ValueError as error:  # transformers' own refusal, of short convolutions without their kernels
        raise ConfigError(packing_refusal(model, f"cannot ({one_line(error).rstrip('.')})")) from error
    model.train(was_training)
    if not change <= TOLERANCE.get(model.dtype, 1e-5):
        raise ConfigError(packing_refusal(model, f"lets one document change the logits of the next by {change:.1g}"))
    return change


def packing_refusal(model: PreTrainedModel, why: str) -> str:
    """The line for a model whose packed documents cannot be kept apart."""
    return (
        f"trainer.packing=true: {model.config.model_type} with {model.config._attn_implementation} attention {why}. "
        "Write trainer.packing=false, or a model.attn_implementation that keeps documents apart (flash_attention_2)."
    )
