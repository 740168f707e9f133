"""Tokenizer, chat template and weights, from the config's `model`."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sft_recipes.config.options import ModelOptions
from sft_recipes.encoding.chat_template import prepare_tokenizer
from sft_recipes.errors import ConfigError, explained_files_of, plural
from sft_recipes.modeling.embeddings import add_embedding_rows
from sft_recipes.modeling.inference import stop_token_ids
from sft_recipes.modeling.model_files import check_config_sizes, explained_model
from sft_recipes.modeling.workarounds import disable_bnb_cpu_repacking, ensure_lm_head_bias, whole_under_zero3

log = logging.getLogger(__name__)


def load_tokenizer(model: ModelOptions) -> tuple[PreTrainedTokenizerFast, str, list[int]]:
    """The tokenizer as it is saved and served, the chat template with its markers, and the ids of new tokens."""
    tokenizer = load_own_tokenizer(model)
    template, new = prepare_with(tokenizer, model)
    return tokenizer, template, tokens_without_rows(model, tokenizer, new)


def has_own_template(model: ModelOptions) -> bool:
    """Whether the model came with a chat template; a base model that has none has never seen one."""
    return bool(load_own_tokenizer(model).chat_template)


def load_own_tokenizer(model: ModelOptions) -> PreTrainedTokenizerFast:
    """The tokenizer that the model came with, as it is; raises ConfigError where it has none."""
    id, revision = model_folder(model.id), model.revision
    with explained_model(model.id):
        check_config_sizes(id, revision)  # which decides a tokenizer's class
        return AutoTokenizer.from_pretrained(id, revision=revision, trust_remote_code=model.trust_remote_code)


def prepare_with(tokenizer: PreTrainedTokenizerFast, model: ModelOptions) -> tuple[str, list[int]]:
    """What `prepare_tokenizer` gives for the config's `model`."""
    settings, day = model.chat_template_kwargs, model.template_date
    return prepare_tokenizer(tokenizer, model.chat_template, True, settings, day, bos=model.bos)


def tokens_without_rows(options: ModelOptions, tokenizer: PreTrainedTokenizerFast, new: list[int]) -> list[int]:
    """The `new` tokens and, before them, those of the tokenizer that the base has no embedding row for.

    All of them are filled and trained alike, and an adapter saves them: rows that were filled one way in training and
    another when the model is loaded would make two models.
    """
    try:
        rows = load_model_config(options).get_text_config().vocab_size
    except ConfigError:  # a tokenizer alone
        return new
    missing = range(rows, len(tokenizer) - len(new))
    if not missing or load_adapter_config(options.id):  # which has the rows
        return new
    log.warning(
        "%s has embedding rows for %d of its tokenizer's %d tokens. The others get rows, which are trained as those of "
        "new tokens are.", options.id, rows, missing.stop,
    )  # fmt: skip
    return [*missing, *new]


def model_folder(id: str) -> str:
    """`model/` in the folder of a finished run; any other id as it is."""
    inside = Path(id) / "model"
    return str(inside) if (inside / "tokenizer_config.json").is_file() else id


def load_adapter_config(id: str) -> PeftConfig | None:
    """The config of the adapter in this folder, which names its base; None for a folder or id of full weights."""
    folder = Path(model_folder(id))
    with explained_files_of(folder):
        return PeftConfig.from_pretrained(folder) if (folder / "adapter_config.json").is_file() else None


def find_weights(options: ModelOptions) -> tuple[str, dict[str, Any]]:
    """Where the weights are that `model.id` names (of an adapter run those of its base), and how they are loaded."""
    adapter = load_adapter_config(options.id)
    id, revision = model_folder(options.id), options.revision
    if adapter:
        id, revision = adapter.base_model_name_or_path, adapter.revision
    how = {"revision": revision, "trust_remote_code": options.trust_remote_code}
    if options.max_position_embeddings:
        how["max_position_embeddings"] = options.max_position_embeddings
    return id, how


def load_model_config(options: ModelOptions) -> PretrainedConfig:
    """The config of the weights that `model.id` names; raises ConfigError where it has none."""
    id, how = find_weights(options)
    with explained_model(id):
        check_config_sizes(id, how["revision"])
        return AutoConfig.from_pretrained(id, **how)


def build_empty_model(options: ModelOptions) -> PreTrainedModel:
    """The architecture that `model.id` names, with its module names and without memory for weights.

    Raises ConfigError for one that is no causal language model, and for an attention that it cannot have here.
    """
    rest = {"trust_remote_code": options.trust_remote_code, "attn_implementation": options.attn_implementation}
    with explained_model(options.id, found=True), torch.device("meta"), whole_under_zero3():
        return AutoModelForCausalLM.from_config(load_model_config(options), **rest)


def load_model(
    options: ModelOptions,
    quantization: BitsAndBytesConfig | None,
    frozen: bool,
    tokenizer: PreTrainedTokenizerFast,
    stops: Sequence[str],
    new: list[int],
) -> PreTrainedModel | PeftModel:
    """The base model, with an embedding for every token and the stop tokens in its generation config."""
    model = load_weights(options, quantization, frozen, tokenizer, new)
    check_weights(model, options.id)
    ids = [*tokenizer.convert_tokens_to_ids(list(stops)), *stop_token_ids(model.generation_config)]
    model.generation_config.eos_token_id = list(dict.fromkeys(ids))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


@torch.no_grad()
def check_weights(model: PreTrainedModel | PeftModel, id: str) -> None:
    """Raises ConfigError for weights that are not finite and for an embedding of zeros; the log names other matrices of
    zeros, which a module may begin with on purpose, as an adapter's do."""
    zeros, layers = [], (model.get_input_embeddings(), model.get_output_embeddings())  # of which there may be one alone
    for name, value in model.named_parameters():
        if not value.is_floating_point() or value.is_meta or not value.numel():
            continue
        low, high = (end.item() for end in (value.float() if value.itemsize == 1 else value).aminmax())  # NaN stays NaN
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ConfigError(
                f"model.id={id}: {name} has values that are not finite (NaN or infinity), so no loss could be. Its "
                "file is damaged, or its training failed: take another copy."
            )
        if low == high == 0 and any(value is getattr(layer, "weight", None) for layer in layers):
            raise ConfigError(f"model.id={id}: {name} is all zeros. Its file is not whole: take another copy.")
        if low == high == 0 and value.ndim > 1 and "lora_" not in name:
            zeros.append(name)
    if zeros:
        log.warning("%s: %s all zeros (%s …). Where that is not on purpose, its file is not whole.",
                    id, plural(len(zeros), "matrix is", "matrices are"), zeros[0])  # fmt: skip


def load_weights(
    options: ModelOptions,
    quantization: BitsAndBytesConfig | None,
    frozen: bool,
    tokenizer: PreTrainedTokenizerFast,
    new: list[int],
    dequantize: bool = False,
) -> PreTrainedModel | PeftModel:
    """The model of `model.id`, with an embedding for every token.

    Trained weights are fp32; a base that an adapter leaves `frozen` is bf16 on a GPU that has it. The folder of an
    adapter run gives that run's base with its adapter on it, which can be trained further; `dequantize` first converts
    the base's 4-bit weights to full precision.
    """
    id, how = find_weights(options)
    how |= {"attn_implementation": options.attn_implementation, "quantization_config": quantization}
    id = str(Path(id).resolve()) if Path(id).is_dir() else id  # saved in the adapter's config, which may move
    half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    dtype = options.dtype or ("bfloat16" if frozen and half else "float32")
    with explained_model(id, found=True):
        model = AutoModelForCausalLM.from_pretrained(id, dtype=dtype, **how)  # pickles are read as tensors alone
    disable_bnb_cpu_repacking(model)
    if dequantize:
        model = model.dequantize(getattr(torch, dtype))
    if load_adapter_config(options.id):
        return attach_adapter(model, model_folder(options.id), tokenizer, new)
    add_embedding_rows(model, new)
    return model


def attach_adapter(base: PreTrainedModel, folder: str, tokenizer: PreTrainedTokenizerFast, new: list[int]) -> PeftModel:
    """The base with the adapter of `folder` on it, an embedding row for every token, and the run's generation config.

    Raises ConfigError for `new` tokens, which the adapter has no rows for.
    """
    if new:
        raise ConfigError(
            f"model.chat_template has {plural(len(new), 'token')} that {folder} was not trained with. Write "
            "model.chat_template=null, which takes the run's own."
        )
    add_embedding_rows(base, list(range(base.get_input_embeddings().num_embeddings, len(tokenizer))))
    if (Path(folder) / "generation_config.json").is_file():
        base.generation_config = GenerationConfig.from_pretrained(folder)
    with explained_files_of(folder):
        prompts = PeftConfig.from_pretrained(folder).is_prompt_learning  # PEFT saves their final embeddings only
        model = PeftModel.from_pretrained(base, folder, is_trainable=not prompts)
    ensure_lm_head_bias(model)
    return model
