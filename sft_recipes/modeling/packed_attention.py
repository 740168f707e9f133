"""Attention for packed rows: its choice, and the check that packed documents do not attend to each other."""

import logging
from importlib.util import find_spec
from typing import Any

import torch
from peft import PeftModel
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sft_recipes.errors import ConfigError, one_line
from sft_recipes.modeling.inference import bf16_autocast, eval_mode

log = logging.getLogger(__name__)
BY_DOCUMENT = "sdpa_by_document"
# The largest change of a logit that is taken for rounding: a kernel rounds otherwise at other shapes
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.2, torch.float16: 0.02}
PROBE_LENGTH = 24  # tokens of each of the two documents that the check packs


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


def choose_attention(model: PreTrainedModel | PeftModel, device: torch.device) -> str:
    """The attention implementation for packed rows on the device that the model trains on.

    On a CPU sdpa document by document where the model takes any implementation and has no sliding window (which the
    model's own mask carries). On a GPU flash attention where it is installed, else the model's own choice: we have
    measured nothing else there.
    """
    config = model.config
    if device.type != "cpu":
        return "flash_attention_2" if find_spec("flash_attn") else config._attn_implementation
    is_plain = config._attn_implementation == "sdpa" and getattr(config, "sliding_window", None) is None
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    return BY_DOCUMENT if is_plain and layers == {"full_attention"} else config._attn_implementation


@torch.no_grad()
def check_no_cross_document_attention(model: PreTrainedModel | PeftModel) -> float:
    """The largest change that another first document makes to the logits of the second in one packed row.

    The model has to be where it trains, since kernels differ between devices. Raises ConfigError where the change is
    more than rounding: then packed documents attend to each other.
    """
    device, length = model.device, PROBE_LENGTH
    vocabulary = model.config.get_text_config().vocab_size  # not the embedding's rows, of which FSDP leaves a part here
    first, other, second = torch.randint(vocabulary, (3, 1, length), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0, length, 2 * length], dtype=torch.int32, device=device)
    boundaries = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": length, "max_length_k": length}
    sequence = torch.repeat_interleave(torch.arange(2, dtype=torch.int32), length)[None].to(device)
    positions = torch.arange(length).repeat(2)[None].to(device)

    def second_logits(document: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([document, second], dim=1).to(device)
        out = model(input_ids=ids, position_ids=positions, seq_idx=sequence, use_cache=False, **boundaries)
        return out.logits[:, length:]

    try:
        with eval_mode(model), bf16_autocast(model):  # flash attention takes no fp32
            one, two = second_logits(first), second_logits(other)
    except TypeError as error:
        raise ConfigError(refuse_packing(model, "takes no position_ids")) from error
    except ValueError as error:  # transformers' own refusal, of short convolutions without their kernels
        raise ConfigError(refuse_packing(model, f"cannot ({one_line(error).rstrip('.')})")) from error
    change = (one.float() - two.float()).abs().max().item()
    if not change <= TOLERANCE.get(one.dtype, 1e-5):  # NaN compares false
        raise ConfigError(refuse_packing(model, f"lets one document change the logits of the next by {change:.1g}"))
    log.info(
        "Packing check passed: packed documents do not attend to each other (%s attention on %s, largest change of a "
        "logit %.1g).",
        model.config._attn_implementation,
        device.type,
        change,
    )
    return change


def refuse_packing(model: PreTrainedModel | PeftModel, why: str) -> str:
    """The error line for a model whose packed documents cannot be kept apart."""
    return (
        f"trainer.packing=true: {model.config.model_type} with {model.config._attn_implementation} attention {why}. "
        "Write trainer.packing=false, or a model.attn_implementation that keeps documents apart (flash_attention_2)."
    )
