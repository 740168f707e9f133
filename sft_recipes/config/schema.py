"""Hydra's side of the house: where the YAML lives, and one composed config as checked, plain Python."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from sft_recipes.config.renamed_options import UNSUPPORTED_OPTIONS
from sft_recipes.config.validation import validate_kwargs
from sft_recipes.errors import ConfigError, did_you_mean

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """One composed run as plain dicts, numbers and strings."""

    name: str
    model: dict[str, Any]
    data: dict[str, Any]
    formatter: dict[str, Any]
    adapter: dict[str, Any]
    trainer: dict[str, Any]
    evaluate: dict[str, Any]
    supervision: dict[str, Any] = field(default_factory=dict)
    preview: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    mode: Literal["train", "preview", "evaluate"] = "train"
    seed: int = 42
    objective: str | None = None
    smoke: bool = False
    lr_find: dict[str, float] | None = None


@dataclass(frozen=True)
class AdapterOptions:
    """The config's `adapter` group."""

    type: str  # none, lora, or another of PEFT's methods: ia3, vera, prompt_tuning …
    lora: dict[str, Any] | None = None  # fields of peft.LoraConfig; another type has its own: ia3, of peft.IA3Config
    loraplus_lr_ratio: float | None = None  # LoRA+: so many times the learning rate on the B matrices
    quantization: dict[str, Any] | None = None  # fields of transformers.BitsAndBytesConfig


@dataclass(frozen=True)
class Provenance:
    """The config's `provenance`: what a recipe's source says, as data, and where the recipe departs from it."""

    source: str
    confidence: Literal["A", "B", "C", "ours"]  # A read in the source itself, B quoted from it, C unsure
    model: str  # the source's base model, by the name that it has there
    data: dict[str, Any]  # id, licence and rows of what the source trained on; null is unknown
    devices: int | None  # the source's, by which the effective batch is reached; null is unknown
    values: dict[str, Any]  # the source's own, by dotted key; and effective_batch_size
    departures: dict[str, str]  # why a value, or something that has no key, is another one here
    unknown: list[str]  # what the source does not say
    needs: str  # memory on one device


# Numbers that only a mistake makes 0 or less; the classes take them and fail long after.
POSITIVE_FIELDS = {
    "trainer": ("learning_rate", "max_length", "per_device_train_batch_size", "per_device_eval_batch_size",
                "gradient_accumulation_steps", "effective_batch_size"),
    "evaluate": ("batch_size", "max_new_tokens"),
}  # fmt: skip


def from_hydra(composed: DictConfig) -> Config:
    """The composed config, resolved; raises ConfigError for an unknown root key, a wrong type or an unknown mode."""
    for key in map(str, composed):
        if "." in key:
            raise ConfigError(
                f"{key}: keys are nested in YAML. Write {': {'.join(key.split('.'))}: …{'}' * key.count('.')}."
            )
    for key in sorted(OmegaConf.missing_keys(composed)):
        raise ConfigError(f"{key} is missing. Write {key}=…")
    values = OmegaConf.to_container(composed, resolve=True)
    validate_kwargs(Config, values, "")
    config = Config(**values)
    if not isinstance(config.formatter.get("name"), str):
        raise ConfigError("formatter.name should be the name of a formatter. Write formatter=auto.")
    check_ranges(config)
    check_adapter(config.adapter, packing=config.trainer.get("packing") is True)
    if config.provenance:
        validate_kwargs(Provenance, config.provenance, "provenance")
    return config


def check_ranges(config: Config) -> None:
    """Raises ConfigError for a field that has no use here, and for a number that would fail after all is loaded."""
    for key in config.trainer:
        if key in UNSUPPORTED_OPTIONS:
            raise ConfigError(f"trainer.{key} is not used here. {UNSUPPORTED_OPTIONS[key]}")
    for group, names in POSITIVE_FIELDS.items():
        for name in names:
            value = getattr(config, group).get(name)
            if isinstance(value, int | float) and value <= 0:
                raise ConfigError(f"{group}.{name} should be above 0, not {value}.")


def check_adapter(adapter: dict[str, Any], packing: bool = False) -> None:
    """Raises ConfigError for an unknown key and for values that train nothing; warns of fields that are not used."""
    kind = adapter.get("type")
    validate_kwargs(
        AdapterOptions, {key: value for key, value in adapter.items() if key != kind or key == "lora"}, "adapter"
    )
    if kind in PEFT_VARIANTS:
        raise ConfigError(f"adapter.type cannot be {kind!r}. Write {PEFT_VARIANTS[kind]}.")
    if kind not in ("none", *PEFT_TYPES):
        raise ConfigError(f"adapter.type cannot be {kind!r}.{did_you_mean(kind, ['none', *PEFT_TYPES])}")
    lora = adapter.get("lora") if kind == "lora" else {}
    if kind == "lora" and not lora:
        raise ConfigError("adapter.type=lora needs adapter.lora. Write adapter=lora.")
    for name in ("r", "lora_alpha"):
        if lora.get(name) == 0:
            raise ConfigError(f"adapter.lora.{name} should be above 0, not 0.")
    dropout = lora.get("lora_dropout", 0)
    if isinstance(dropout, int | float) and not 0 <= dropout < 1:
        raise ConfigError(f"adapter.lora.lora_dropout should be from 0 to below 1, not {dropout}.")
    ratio = adapter.get("loraplus_lr_ratio")
    if ratio is not None and (kind != "lora" or ratio <= 0):
        raise ConfigError("adapter.loraplus_lr_ratio should be above 0, and adapter.type should be lora.")
    if kind in PROMPT_LEARNING_TYPES and packing:
        raise ConfigError(
            f"adapter.type={kind} puts tokens of its own before every row, so rows cannot be joined. Write "
            "trainer.packing=false."
        )
    if kind == "none" and adapter.get("quantization"):
        raise ConfigError("adapter.quantization freezes the base, so that an adapter is needed. Write adapter=qlora.")
    if kind == "none" and len(adapter) > 1:
        log.warning("adapter=none trains every weight, the fields of adapter.lora are not used. Or write adapter=lora.")
    elif kind != "lora" and adapter.get("lora"):
        log.warning("adapter.type=%s does not use the fields of adapter.lora. Its own are adapter.%s.", kind, kind)


# PEFT's methods, by their names in lower case; a test holds them against PEFT, which takes seconds to import
PEFT_TYPES = [
    "adalora",
    "adamss",
    "adaption_prompt",
    "beft",
    "boft",
    "c3a",
    "cartridge",
    "cpt",
    "deft",
    "delora",
    "fourierft",
    "frod",
    "glora",
    "gralora",
    "hira",
    "hra",
    "ia3",
    "lily",
    "ln_tuning",
    "loha",
    "lokr",
    "lora",
    "miss",
    "multitask_prompt_tuning",
    "oft",
    "osf",
    "p_tuning",
    "peanut",
    "poly",
    "prefix_tuning",
    "prompt_tuning",
    "psoft",
    "pvera",
    "randlora",
    "road",
    "shadow",
    "shira",
    "supertuning",
    "tinylora",
    "trainable_tokens",
    "unilora",
    "vblora",
    "vera",
    "waveft",
    "xlora",
]
# What other tools call a type of its own
PEFT_VARIANTS = {
    "dora": "adapter.lora.use_dora=true",
    "rslora": "adapter.lora.use_rslora=true",
    "pissa": "adapter.lora.init_lora_weights=pissa",
    "olora": "adapter.lora.init_lora_weights=olora",
    "loraplus": "adapter.loraplus_lr_ratio=16",
    "qlora": "adapter=qlora",
    "full": "adapter=none",
}
# PEFT's methods that put trained tokens before a row
PROMPT_LEARNING_TYPES = ("prompt_tuning", "prefix_tuning", "p_tuning", "multitask_prompt_tuning", "cpt", "cartridge")


def root_keys(groups: Iterable[str] = ()) -> list[str]:
    """What a key can begin with: the fields of a config, and a + with one of these groups."""
    return [*(field.name for field in fields(Config)), "hydra", *(f"+{group}" for group in groups)]
