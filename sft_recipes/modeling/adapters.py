"""Adapters: PEFT's config from the config's `adapter`, checked against one model and completed for its new tokens."""

import copy
import logging
import re
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import BitsAndBytesConfig, PreTrainedModel

from sft_recipes.config.options import AdapterOptions
from sft_recipes.config.validation import call_validated
from sft_recipes.errors import ConfigError, did_you_mean, one_line, plural

log = logging.getLogger(__name__)
PEFT_CONFIGS = {kind.value.lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
INITS_FROM_DATA = ("eva", "corda", "lora_ga", "loftq")  # what PEFT prepares from rows or from the base before training
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
# The first two need a task's number with every row, xlora trained adapters, the others go past TRL's fused LM head
UNSUPPORTED_TYPES = ("poly", "multitask_prompt_tuning", "xlora", "cpt", "adaption_prompt")
READING_BASE_WEIGHTS = {  # that 4 or 8 bits pack: each fails on a Linear4bit with PEFT 0.21, most in the first step
    "adamss", "deft", "delora", "frod", "glora", "hra", "loha", "lokr", "osf", "peanut", "psoft", "supertuning",
    "tinylora",
}  # fmt: skip


def build_quantization_config(adapter: AdapterOptions) -> BitsAndBytesConfig | None:
    """The 4-bit or 8-bit config of `adapter.quantization`, if there is one."""
    values = adapter.quantization
    if values is None:
        return None
    dtypes = ("bfloat16", "float16", "float32")
    for name, known in {"bnb_4bit_quant_type": ("nf4", "fp4"), "bnb_4bit_compute_dtype": dtypes}.items():
        if values.get(name) is not None and values[name] not in known:  # the class takes any text and fails long after
            raise ConfigError(f"adapter.quantization.{name} cannot be {values[name]!r}. Choices: {', '.join(known)}.")
    return call_validated(BitsAndBytesConfig, values, "adapter.quantization")


def build_peft_config(adapter: AdapterOptions) -> PeftConfig | None:
    """The adapter's PEFT config, or None for full fine-tuning; raises ConfigError for an unknown type or field."""
    kind = adapter.type
    if kind == "none":
        return None
    if kind in UNSUPPORTED_TYPES:
        raise ConfigError(f"adapter.type={kind} cannot be trained here. Write adapter=lora.")
    if adapter.quantization and kind in READING_BASE_WEIGHTS:
        raise ConfigError(f"adapter.type={kind} computes with the base's weights, which cannot be quantized for it.")
    peft = call_validated(PEFT_CONFIGS[kind], {"task_type": "CAUSAL_LM"} | adapter.settings, f"adapter.{kind}")
    if peft.task_type != "CAUSAL_LM":
        raise ConfigError(f"adapter.{kind}.task_type should be CAUSAL_LM, the one that is trained here. Leave it out.")
    if getattr(peft, "num_virtual_tokens", 1) is None:  # PEFT computes with it all the same
        raise ConfigError(f"adapter.{kind}.num_virtual_tokens is missing. Write adapter.{kind}.num_virtual_tokens=20.")
    for name in ("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"):
        if peft.is_prompt_learning and getattr(peft, name) is not None:  # each is then out of step with another
            raise ConfigError(f"adapter.{kind}.{name} is read from the model. Leave it out.")
    bias = getattr(peft, "bias", "none")
    if bias not in ("none", "all") and str(bias).lower() != f"{kind}_only":  # most classes take any text
        raise ConfigError(f"adapter.{kind}.bias cannot be {bias!r}. Choices: all, {kind}_only, none.")
    start = getattr(peft, "init_lora_weights", True)
    if start in INITS_FROM_DATA:
        raise ConfigError(f"adapter.{kind}.init_lora_weights={start} needs a pass over data first, which no run makes.")
    if adapter.quantization and changes_base_weights(peft):
        raise ConfigError(f"adapter.{kind}.init_lora_weights={start} changes the base, which 4 bits do not allow.")
    return peft


def changes_base_weights(peft: PeftConfig) -> bool:
    """Whether the adapter's initialization takes parts of the base's weights out of the base (PiSSA, OLoRA)."""
    return str(getattr(peft, "init_lora_weights", "")).startswith(BASE_CHANGING_INITS)


def prepare_peft_config(
    peft: PeftConfig | None, model: PreTrainedModel | PeftModel, new: list[int], revision: str | None = None
) -> PeftConfig | None:
    """The config that TRL gets: every module name in it exists in the model, and the rows of `new` tokens are trained.

    None for full fine-tuning, and for a model that has the adapter already (`model.id=RUN` of an adapter run).
    """
    if isinstance(model, PeftModel):
        check_same_adapter(peft, model.active_peft_config)
        return None
    if peft is not None:
        check_module_names(peft, model, new)
        train_new_tokens(peft, model, new)
        peft.revision = revision  # of the base, or the adapter would later be loaded onto another one
    return peft


def check_same_adapter(peft: PeftConfig | None, loaded: PeftConfig) -> None:
    """Raises ConfigError where the config's adapter differs from the one `loaded` with the run to train further."""
    merge = "or merge that run first (python -m sft_recipes.merge RUN --out DIR, model.id=DIR)."
    kind = loaded.peft_type.value.lower()
    if peft is None or peft.peft_type != loaded.peft_type:
        raise ConfigError(f"model.id is an adapter run, which goes on with adapter.type={kind}. Write that, {merge}")
    if loaded.is_prompt_learning:
        raise ConfigError(f"model.id is a run of adapter.type={kind}, which PEFT cannot train further.")
    values, own = peft.to_dict(), loaded.to_dict()
    for field in ("target_modules", "exclude_modules"):
        if values.get(field) == "all-linear":  # the saved config has the names
            values[field] = own[field]
    other = [
        f"adapter.{kind}.{field}={own[field]}"
        for field in values
        if field not in BOOKKEEPING_FIELDS and to_sorted_list(values[field]) != to_sorted_list(own[field])
    ]
    if other:
        raise ConfigError(f"model.id is an adapter run with {', '.join(other)}. Write that, {merge}")


def to_sorted_list(value: Any) -> Any:
    """A list, tuple or set as a sorted list of texts, to be compared without order; other values as they are."""
    return sorted(map(str, value)) if isinstance(value, list | tuple | set) else value


# fields that PEFT or a run fills in by itself
BOOKKEEPING_FIELDS = {
    "base_model_name_or_path", "revision", "inference_mode", "trainable_token_indices", "auto_mapping", "peft_version",
    "ensure_weight_tying", "init_lora_weights", "modules_to_tie", "target_modules_to_tie",
}  # fmt: skip


def check_adapter(peft: PeftConfig, model: PreTrainedModel, new: list[int]) -> None:
    """Raises ConfigError for an adapter that PEFT or TRL would refuse once the weights are loaded.

    `model` is on the meta device and gets the adapter. Methods that compute with weights at the start cannot be tried
    there, and are not refused.
    """
    where, peft = f"adapter.{peft.peft_type.value.lower()}", copy.deepcopy(peft)
    check_module_names(peft, model, new)
    rows, given = model.get_input_embeddings().num_embeddings + len(new), getattr(peft, "trainable_token_indices", None)
    for id in chain.from_iterable(given.values()) if isinstance(given, dict) else given or []:
        if id >= rows:
            raise ConfigError(f"{where}.trainable_token_indices should be below {rows}, not {id}.")
    train_new_tokens(peft, model, new)
    model.config.use_cache = False  # as in training
    try:
        with torch.device("meta"):
            adapted = get_peft_model(model, peft, autocast_adapter_dtype=False)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"{where}: {one_line(error)}") from error
    except RuntimeError as error:
        if "meta" not in str(error).lower():  # it is not that there are no weights
            raise ConfigError(f"{where}: {one_line(error)}") from error
        return
    if isinstance(adapted.get_output_embeddings(), BaseTunerLayer):
        raise ConfigError(f"{where} changes the LM head, whose weight the loss uses directly. Write adapter=lora.")
    if not any(parameter.requires_grad for parameter in adapted.parameters()):
        raise ConfigError(f"{where} trains nothing as it is set.")


def check_module_names(peft: PeftConfig, model: PreTrainedModel, new: list[int]) -> None:
    """Raises ConfigError for a module name that matches nothing, and for an adapter on a layer that would ignore it.

    PEFT itself says nothing of a name that matches no module as long as another one does.
    """
    where = f"adapter.{peft.peft_type.value.lower()}"
    modules = [name for name, _ in model.named_modules() if name]
    known = {name.rpartition(".")[2] for name in modules if not name.rpartition(".")[2].isdigit()}
    numbers = [name for name, _ in model.named_parameters()]
    for field in ("target_modules", "feedforward_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        names = numbers if field == "target_parameters" else modules
        wanted = getattr(peft, field, None)
        for name in [wanted] if isinstance(wanted, str) else sorted(wanted or []):
            if name != "all-linear" and not match_module_names(wanted if isinstance(wanted, str) else [name], names):
                hint = f" Write [{name}]." if match_module_names([name], names) else did_you_mean(name, known)
                raise ConfigError(f"{where}.{field}: no module of this model is called {name!r}.{hint}")
    targets = getattr(peft, "target_modules", None)
    if targets is None or targets == "all-linear":
        return
    inputs, head = embedding_names(model)
    excluded = match_module_names(getattr(peft, "exclude_modules", None) or [], modules)
    targeted = set(match_module_names(targets, modules)) - set(excluded)
    if head in targeted:
        raise ConfigError(
            f"{where}.target_modules names {head}: the loss uses its weight directly, without an adapter. Write "
            f"{where}.modules_to_save=[{head}], which trains it in full, or leave it out."
        )
    if new and inputs in targeted:
        raise ConfigError(
            f"{where}.target_modules names {inputs}, whose rows of new tokens are trained already. Leave it out, or "
            f"write {where}.modules_to_save=[{inputs}], which trains it in full."
        )


def embedding_names(model: PreTrainedModel) -> tuple[str, str]:
    """The names of the input embedding and of the LM head."""
    names = {id(module): name for name, module in model.named_modules()}
    return names[id(model.get_input_embeddings())], names[id(model.get_output_embeddings())]


def match_module_names(wanted: str | Iterable[str], names: list[str]) -> list[str]:
    """The module names that PEFT would match: a text is a pattern for whole names, a list holds the ends of names."""
    if isinstance(wanted, str):
        return [name for name in names if re.fullmatch(wanted, name)]
    return [name for name in names if any(f".{name}".endswith(f".{end}") for end in wanted)]


def train_new_tokens(peft: PeftConfig, model: PreTrainedModel, new: list[int]) -> None:
    """Makes an adapter train the embedding rows of new tokens, also in an untied LM head.

    LoRA trains those rows only. Other methods cannot and train both layers in full; where they were tied, they no
    longer are. Raises ConfigError for a method that changes no module (prompt tuning), and for a head with a bias.
    """
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    tied, layers = outputs.weight is inputs.weight, list(embedding_names(model))
    whole = match_module_names(getattr(peft, "modules_to_save", None) or [], layers)
    if tied and whole and hasattr(peft, "ensure_weight_tying"):
        peft.ensure_weight_tying, peft.modules_to_tie, peft.target_modules_to_tie = True, None, None
        whole = layers
    if not new:
        return
    if hasattr(peft, "trainable_token_indices"):
        given = peft.trainable_token_indices or {}
        given = given if isinstance(given, dict) else {layers[0]: given}
        rows = {layer: sorted({*given.get(layer, []), *new}) for layer in (layers[:1] if tied else layers)}
        peft.trainable_token_indices = given | {layer: ids for layer, ids in rows.items() if layer not in whole} or None
        if getattr(outputs, "bias", None) is not None and layers[1] not in whole:  # see workarounds.ensure_lm_head_bias
            raise ConfigError(
                f"{layers[1]} has a bias, which PEFT drops where an adapter trains the rows of new tokens. Write "
                f"adapter.{peft.peft_type.value.lower()}.modules_to_save=[{layers[1]}], which trains it in full."
            )
    elif hasattr(peft, "modules_to_save") and not peft.is_prompt_learning:
        peft.modules_to_save = list(dict.fromkeys([*(peft.modules_to_save or []), *layers]))
        number = sum(layer.weight.numel() for layer in (inputs, outputs))
        log.warning("%s trains both embeddings in full, for %s: %d parameters more.",
                    peft.peft_type.value, plural(len(new), "new token"), number)  # fmt: skip
    else:
        raise ConfigError(
            f"adapter.type={peft.peft_type.value.lower()} cannot train the {plural(len(new), 'token')} that the chat "
            "template adds. Write adapter=lora, or a model.chat_template of tokens that the tokenizer has."
        )
