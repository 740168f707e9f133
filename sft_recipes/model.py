"""Tokenizer, chat template, weights and adapter, from the config's `model` and `adapter`."""

from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sft_recipes.binding import ConfigError, call, one_line
from sft_recipes.chat_template import prepare


def load_tokenizer(
    id: str,
    chat_template: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedTokenizerFast, str, list[int]]:
    """The tokenizer as it is saved and served, the chat template with markers, and the new tokens' ids.

    The signature is the config's `model` group; `dtype` and `attn_implementation` are the weights'.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(id, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise not_found(id, error) from error
    return tokenizer, *prepare(tokenizer, chat_template)


def not_found(id: str, error: Exception) -> ConfigError:
    """The line for a model that is neither a folder here nor in the hub's reach."""
    if id.startswith((".", "/", "~")) and not Path(id).exists():
        return ConfigError(f"model.id={id}: there is no such folder.")
    if Path(id).exists():
        return ConfigError(f"model.id={id} is not a folder with a model and its tokenizer: {one_line(error)[:200]}")
    return ConfigError(
        f"model.id={id} could not be loaded. Offline, give a folder: model=local model.id=path/to/model. Gated or "
        f"private models need `hf auth login`. ({one_line(error)[:120]}…)"
    )


def load_model(
    options: dict[str, Any],
    quantization: BitsAndBytesConfig | None,
    frozen: bool,
    tokenizer: PreTrainedTokenizerFast,
    stop: str,
    new: list[int],
) -> PreTrainedModel:
    """The base model, with an embedding for every token and the stop token in its generation config.

    Weights are fp32 when they are trained; the base that an adapter leaves `frozen` is bf16 on a GPU that has it.
    """
    half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    dtype = options.get("dtype") or ("bfloat16" if frozen and half else "float32")
    rest = {key: options[key] for key in ("revision", "trust_remote_code", "attn_implementation") if key in options}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            options["id"], dtype=dtype, quantization_config=quantization, **rest
        )
    except (ImportError, ValueError) as error:
        raise ConfigError(f"model: {one_line(error)[:300]}") from error
    except OSError as error:
        raise not_found(options["id"], error) from error
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes 0.50 repacks 4-bit weights for a CPU's AVX512 when they are evaluated, and fails on widths
            # that are no multiple of 64. Goes when bitsandbytes/nn/modules.py, Linear4bit.forward, checks the shape.
            module.support_avx512bf16_for_cpu = False
    add_rows(model, new)
    stop_id = tokenizer.convert_tokens_to_ids(stop)
    others = model.generation_config.eos_token_id
    others = others if isinstance(others, list) else [] if others is None else [others]
    model.generation_config.eos_token_id = list(dict.fromkeys([stop_id, *others]))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def add_rows(model: PreTrainedModel, new: list[int]) -> None:
    """Gives every new token an embedding of its own: spare rows first, more rows only where those run out.

    Spare rows that differ from each other stay as they are. Other new rows are the mean of the rows before them and 0.3
    of their spread as noise: the mean alone, transformers' default, makes two control tokens equal to 3e-6, and the
    whole spread makes a base model say them (the tiny model's loss on raw text goes from 0.812 to 1.557; with 0.3 it is
    0.814).
    """
    if not new:
        return
    spare = new[-1] < model.get_input_embeddings().num_embeddings
    if not spare:
        model.resize_token_embeddings(new[-1] + 1, mean_resizing=False)
    generator = torch.Generator().manual_seed(0)
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    with torch.no_grad():
        for weight in {id(layer.weight): layer.weight for layer in layers}.values():  # one, where they are tied
            if spare and distinct(weight[new].float()):
                continue
            known = weight[: new[0]].float()
            noise = torch.randn(len(new), known.shape[1], generator=generator).to(known.device)
            weight[new] = (known.mean(0) + 0.3 * known.std(0) * noise).to(weight.dtype)


def distinct(rows: torch.Tensor) -> bool:
    """Whether no two rows point the same way and none is zero."""
    unit = torch.nn.functional.normalize(rows, dim=1)
    return bool(
        (unit @ unit.T - 2 * torch.eye(len(rows), device=rows.device)).max() < 0.95 and rows.norm(dim=1).min() > 0
    )


def quantization_config(adapter: dict[str, Any]) -> BitsAndBytesConfig | None:
    """The 4-bit or 8-bit config of `adapter.quantization`, if there is one."""
    if adapter.get("quantization") is None:
        return None
    return call(BitsAndBytesConfig, adapter["quantization"], "adapter.quantization")


def peft_config(adapter: dict[str, Any]) -> PeftConfig | None:
    """The adapter's PEFT config, or None for full fine-tuning; raises ConfigError for an unknown type or field."""
    if adapter["type"] == "none":
        return None
    return call(LoraConfig, {"task_type": "CAUSAL_LM", **adapter["lora"]}, "adapter.lora")


def train_new_tokens(peft: PeftConfig, model: PreTrainedModel, new: list[int]) -> None:
    """Lets an adapter train the rows of new tokens, in the input embedding and in an untied output embedding."""
    if not new:
        return
    names = {id(module): name for name, module in model.named_modules()}
    layers = [model.get_input_embeddings()]
    if model.get_output_embeddings().weight is not layers[0].weight:
        layers.append(model.get_output_embeddings())
    peft.trainable_token_indices = {names[id(layer)]: new for layer in layers}


def keep_in_fp32(model: torch.nn.Module) -> None:
    """Trained weights as fp32: TRL casts QLoRA adapters to bf16, where small updates are rounded away.

    Goes when TRL leaves them alone: SFTTrainer.__init__, "PEFT adapter weights are converted to bf16".
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def give_head_a_bias(model: torch.nn.Module) -> None:
    """No bias, said aloud: TRL's fused LM head reads `lm_head.bias`, which PEFT's TrainableTokensWrapper does not know.

    Goes when PEFT passes `bias` on to the wrapped layer: peft/utils/other.py, TrainableTokensWrapper._hasattr_wrapped.
    """
    head = model.get_output_embeddings()
    if not hasattr(head, "bias"):
        head.bias = None
