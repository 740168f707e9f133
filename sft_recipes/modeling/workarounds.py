"""Every workaround for a fault of TRL, transformers, PEFT or bitsandbytes, with the condition for its removal."""

import logging

import torch
from peft import PeftModel

log = logging.getLogger(__name__)


def disable_bnb_cpu_repacking(model: torch.nn.Module) -> None:
    """Leaves 4-bit weights as they are: bitsandbytes 0.50 repacks them for a CPU's AVX512 when a model is evaluated.

    It fails on widths that are no multiple of 64, and DoRA then reads the repacked ones (logits change by 0.3 to 1).
    Goes when Linear4bit.forward, bitsandbytes/nn/modules.py, leaves `weight` alone.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def cast_trainable_to_fp32(model: torch.nn.Module) -> None:
    """Trained weights as fp32: TRL casts QLoRA adapters to bf16, where small updates are rounded away.

    A checkpoint that is trained whole gets fp32 weights in the same way, whatever `model.dtype` says. The cast of
    adapters goes when TRL leaves them alone: SFTTrainer.__init__, "PEFT adapter weights are converted to bf16".
    """
    number = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            number += parameter.numel()
    size = 16 * number / 2**20
    size = f"{size / 1024:.1f} GiB" if size > 1024 else f"{size:.1f} MiB"
    log.info("Trained weights are fp32 and take %s with their gradients and AdamW's two moments, which are fp32, too.",
             size)  # fmt: skip


def ensure_lm_head_bias(model: torch.nn.Module) -> None:
    """No bias, said aloud: TRL's fused LM head reads `lm_head.bias`, which PEFT's TrainableTokensWrapper does not know.

    Goes when PEFT passes `bias` on to the wrapped layer: peft/utils/other.py, TrainableTokensWrapper._hasattr_wrapped.
    """
    head = model.get_output_embeddings()
    if not hasattr(head, "bias"):
        head.bias = None


def complete_reference(model: PeftModel) -> None:
    """The rows of new tokens in the reference adapter that TRL's DPOTrainer makes: it copies all but those.

    Goes when TRL copies what ends in `.default`, too: trl/trainer/dpo_trainer.py, `model.add_adapter("ref"`.
    """
    parameters = dict(model.named_parameters())
    for name, value in parameters.items():
        if name.endswith(".default"):
            parameters[name.removesuffix("default") + "ref"].data.copy_(value.data)
