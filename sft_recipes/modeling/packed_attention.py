"""Attention for packed rows: its choice, and the check that packed documents do not attend to each other."""

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from peft import PeftModel
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.flash_attention import get_target_dtype
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sft_recipes.errors import ConfigError, one_line
from sft_recipes.modeling.inference import bf16_autocast, eval_mode

log = logging.getLogger(__name__)
BY_DOCUMENT, VARLEN = "sdpa_by_document", "torch_varlen"
VARLEN_LAYERS = {"full_attention", "sliding_attention"}
ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")  # each model's config has one
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


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    position_ids: torch.Tensor | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """torch's own flash attention over all documents of a row at once (`torch.nn.attention.varlen`), in half precision.

    The same tensors as above. Keys that queries share are not repeated. `sliding_window` counts the token itself and
    torch's window only those before it. Generation and padded rows, which have no boundaries, go to sdpa.
    """
    if cu_seq_lens_q is None:
        looks = attention_mask is None and position_ids is not None and query.shape[2] > 1  # which waits for the GPU
        if looks and (position_ids.diff() < 0).any():
            raise ValueError("Packed rows need cu_seq_lens_q, as trl's collator gives it with padding_free=True.")
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **arguments)
    half = get_target_dtype(query, module) or query.dtype  # norms and rotations of queries may be fp32
    query, key, value = (tensor[0].transpose(0, 1).to(half) for tensor in (query, key, value))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    ends, longest, shared = cu_seq_lens_q, max_length_q, query.shape[1] != key.shape[1]
    output = varlen_attn(
        query, key, value, ends, ends, longest, longest, scale=scaling, window_size=window, enable_gqa=shared
    )
    return output[None], None


def mask_of_padding(
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **options: Any,
) -> torch.Tensor | None:
    """sdpa's mask, but none for packed rows, which are told by their positions: it would have every pair of tokens."""
    if attention_mask is None and not allow_is_causal_skip and not use_vmap and q_length == kv_length:
        return None
    options |= {"allow_is_causal_skip": allow_is_causal_skip, "use_vmap": use_vmap}
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **options)


AttentionInterface.register(BY_DOCUMENT, sdpa_by_document)
AttentionMaskInterface.register(BY_DOCUMENT, sdpa_mask)  # generation pads, and then the mask is needed
AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, mask_of_padding)


def attention_choices(model: PreTrainedModel | PeftModel, device: torch.device, half: bool) -> list[str]:
    """The attention implementations for packed rows on the device that the model trains on, the best first.

    The last is the model's own. On a CPU sdpa document by document comes first where the model takes any implementation
    and has no sliding window (which the model's own mask carries). On a GPU, with `half` precision, torch's own flash
    attention does, then flex attention and the package flash-attn. That order is by what they compute: no GPU was there
    to measure it.
    """
    config = model.config.get_text_config()
    own, layers = config._attn_implementation, set(getattr(config, "layer_types", None) or ["full_attention"])
    if device.type == "cpu":
        is_plain = own == "sdpa" and getattr(config, "sliding_window", None) is None and layers == {"full_attention"}
        return [BY_DOCUMENT, own] if is_plain else [own]
    if device.type != "cuda":
        return [own]
    drops = any(getattr(config, name, 0) for name in ATTENTION_DROPOUTS)  # as neither kernel does
    is_plain = own == "sdpa" and not drops and not getattr(config, "attn_logit_softcapping", None)
    takes_lengths = is_plain and model._supports_flash_attn and layers <= VARLEN_LAYERS
    flash, flex = half and find_spec("flash_attn"), model._supports_flex_attn and not drops and find_spec("triton")
    named = {VARLEN: half and takes_lengths, "flex_attention": flex, "flash_attention_2": flash, own: True}
    return [name for name, possible in named.items() if possible]


def take_first_that_isolates(
    model: PreTrainedModel | PeftModel, names: Sequence[str], last_is_checked: bool = True
) -> str:
    """Gives the model the first of these attentions that runs on its device and keeps packed documents apart.

    Raises what the last of them raises; rows that it will see padded need no check of it.
    """
    for name in names:
        try:
            model.set_attn_implementation(name)
            if last_is_checked or name != names[-1]:
                check_no_cross_document_attention(model)
            break
        except Exception as error:  # each kernel and its compiler have errors of their own
            if name == names[-1]:
                raise
            log.info("Not with %s attention: %s", name, one_line(error)[:200])
    return name


@torch.no_grad()
def check_no_cross_document_attention(model: PreTrainedModel | PeftModel) -> float:
    """The largest change that another first document makes to the logits of the second in one packed row.

    The model has to be where it trains, since kernels differ between devices. Raises ConfigError where the change is
    more than rounding, or the second's logits have a gradient at the first's tokens: then packed documents attend to
    each other. What a kernel's way back raises, as on a GPU that it was not made for, is raised here, too.
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

    def gradient_at_first() -> float:
        embedded = []  # of which alone a gradient is computed, so that no weight takes memory for one

        def keep(_module: torch.nn.Module, _ids: Any, output: torch.Tensor) -> None:
            embedded.append(output if output.requires_grad else output.requires_grad_())

        handle = model.get_input_embeddings().register_forward_hook(keep)
        try:
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(second_logits(first).float().sum(), embedded)
        finally:
            handle.remove()
        return gradient[:, :length].abs().max().item()

    try:
        with eval_mode(model), bf16_autocast(model):  # flash attention takes no fp32
            one, two = second_logits(first), second_logits(other)
            change = (one.float() - two.float()).abs().max().item()
            is_apart = change <= TOLERANCE.get(one.dtype, 1e-5)  # NaN compares false
            # DeepSpeed gathers weights on the way back of its own steps only
            leak = gradient_at_first() if is_apart and not is_deepspeed_zero3_enabled() else 0.0
    except (TypeError, ValueError) as error:  # it takes no position_ids, or has short convolutions without kernels
        why = f"cannot keep documents apart ({one_line(error).rstrip('.')})"
    else:
        if is_apart and leak == 0:
            how = model.config._attn_implementation, device.type, change
            log.info("Packing check passed: packed documents do not attend to each other (%s attention on %s, largest "
                     "change of a logit %.1g).", *how)  # fmt: skip
            return change
        why = f"lets a document change the logits of the next by {change:.1g}"
        if is_apart:
            why = f"keeps logits of packed documents apart, but those of one have a gradient of {leak:.1g} in another"
    raise ConfigError(
        f"trainer.packing=true: {model.config.model_type} with {model.config._attn_implementation} attention {why}. "
        "Write trainer.packing=false, or a model.attn_implementation that keeps documents apart (flash_attention_2)."
    )
