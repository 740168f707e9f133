"""Tokenizer, chat template and weights, from the config's `model`."""

import logging
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sft_recipes.binding import ConfigError, one_line
from sft_recipes.chat_template import prepare

log = logging.getLogger(__name__)


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
        tokenizer = AutoTokenizer.from_pretrained(
            model_folder(id), revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise not_found(id, error) from error
    return tokenizer, *prepare(tokenizer, chat_template, any_stop=True)


def model_folder(id: str) -> str:
    """`model/` of a finished run's folder; anything else is the id of a model already."""
    inside = Path(id) / "model"
    return str(inside) if (inside / "tokenizer_config.json").is_file() else id


def adapter_base(id: str) -> PeftConfig | None:
    """The config of the adapter in this folder, which names its base; None where there are weights."""
    folder = Path(model_folder(id))
    return PeftConfig.from_pretrained(folder) if (folder / "adapter_config.json").is_file() else None


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
) -> PreTrainedModel | PeftModel:
    """The base model, with an embedding for every token and the stop token in its generation config."""
    model = load_weights(options, quantization, frozen, tokenizer, new)
    stop_id = tokenizer.convert_tokens_to_ids(stop)
    others = model.generation_config.eos_token_id
    others = others if isinstance(others, list) else [] if others is None else [others]
    model.generation_config.eos_token_id = list(dict.fromkeys([stop_id, *others]))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def load_weights(
    options: dict[str, Any],
    quantization: BitsAndBytesConfig | None,
    frozen: bool,
    tokenizer: PreTrainedTokenizerFast,
    new: list[int],
    dequantize: bool = False,
) -> PreTrainedModel | PeftModel:
    """The model of `model.id`, with an embedding for every token.

    Weights are fp32 when they are trained; the base that an adapter leaves `frozen` is bf16 on a GPU that has it.
    The folder of an adapter run gives that run's base with its adapter on it, ready to be trained on; `dequantize`
    gives the base the values of its 4-bit weights in full precision before that.
    """
    folder, carried = model_folder(options["id"]), adapter_base(options["id"])
    id = carried.base_model_name_or_path if carried else folder
    rest = {key: options[key] for key in ("revision", "trust_remote_code", "attn_implementation") if key in options}
    rest |= {"revision": carried.revision} if carried else {}
    id = str(Path(id).resolve()) if Path(id).is_dir() else id  # an adapter keeps it, to be loaded from anywhere
    half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    dtype = options.get("dtype") or ("bfloat16" if frozen and half else "float32")
    try:
        model = AutoModelForCausalLM.from_pretrained(id, dtype=dtype, quantization_config=quantization, **rest)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"model: {one_line(error)[:300]}") from error
    except OSError as error:
        raise not_found(id, error) from error
    no_repacking(model)
    if dequantize:
        model = model.dequantize(getattr(torch, dtype))
    if carried:
        return with_adapter(model, folder, tokenizer, new)
    add_rows(model, new)
    return model


def no_repacking(model: torch.nn.Module) -> None:
    """Leaves 4-bit weights as they are: bitsandbytes 0.50 repacks them for a CPU's AVX512 when a model is evaluated.

    It fails on widths that are no multiple of 64, and DoRA then reads the repacked ones (logits change by 0.3 to 1).
    Goes when Linear4bit.forward, bitsandbytes/nn/modules.py, leaves `weight` alone.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def with_adapter(
    base: PreTrainedModel, folder: str, tokenizer: PreTrainedTokenizerFast, new: list[int] | None = None
) -> PeftModel:
    """The base with the adapter of `folder` on it, as many rows as its tokenizer has tokens, and its generation config.

    Raises ConfigError for `new` tokens: the adapter has no rows for them.
    """
    if new:
        raise ConfigError(
            f"model.chat_template has {len(new)} tokens that {folder} was not trained with. Write "
            "model.chat_template=null, which takes the run's own."
        )
    add_rows(base, list(range(base.get_input_embeddings().num_embeddings, len(tokenizer))))
    if (Path(folder) / "generation_config.json").is_file():
        base.generation_config = GenerationConfig.from_pretrained(folder)
    prompts = PeftConfig.from_pretrained(folder).is_prompt_learning  # which PEFT saves as what comes out of them
    model = PeftModel.from_pretrained(base, folder, is_trainable=not prompts)
    give_head_a_bias(model)
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


def keep_in_fp32(model: torch.nn.Module) -> None:
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


def give_head_a_bias(model: torch.nn.Module) -> None:
    """No bias, said aloud: TRL's fused LM head reads `lm_head.bias`, which PEFT's TrainableTokensWrapper does not know.

    Goes when PEFT passes `bias` on to the wrapped layer: peft/utils/other.py, TrainableTokensWrapper._hasattr_wrapped.
    """
    head = model.get_output_embeddings()
    if not hasattr(head, "bias"):
        head.bias = None
