"""Hydra's side of the house: where the YAML lives, and one composed config as checked, plain Python."""

import logging
import re
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from sft_recipes.binding import ConfigError, check, did_you_mean

log = logging.getLogger(__name__)
OPEN_GROUPS = ("model", "data", "formatter", "adapter", "trainer", "evaluate")


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
class Adapter:
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


# Fields of SFTConfig that a run sets itself or has no use for, since rows are encoded before TRL sees them.
NOT_HERE = {
    "output_dir": "Write hydra.run.dir.",
    "seed": "Write seed.",
    "dataset_kwargs": "It is set by the run.",
    "dataset_num_proc": "Rows are encoded in batches, on all cores.",
    "dataset_text_field": "Write data.NAME.formatter={name: text, text: COLUMN}.",
    "completion_only_loss": "Write data.NAME.supervise=assistant (or last, or all).",
    "assistant_only_loss": "Write data.NAME.supervise=assistant (or last, or all).",
    "truncation_mode": "Write data.max_length_policy=drop (or keep, or raise).",
    "shuffle_dataset": "Rows are always shuffled, with the run's seed.",
    "packing_strategy": "Write trainer.packing=true, which keeps rows whole.",
    "chat_template_path": "Write model.chat_template.",
    "eos_token": "The chat template names its stop token.",
    "pad_token": "The tokenizer's own is used, or a spare token.",
    "model_init_kwargs": "Write model.dtype or model.attn_implementation.",
    "trust_remote_code": "Write model.trust_remote_code.",
}
# Numbers that only a mistake makes 0 or less; the classes take them and fail long after.
ABOVE_ZERO = {
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
    check(Config, values, "")
    config = Config(**values)
    if not isinstance(config.formatter.get("name"), str):
        raise ConfigError("formatter.name should be the name of a formatter. Write formatter=auto.")
    check_values(config)
    check_adapter(config.adapter, packing=config.trainer.get("packing") is True)
    if config.provenance:
        check(Provenance, config.provenance, "provenance")
    return config


def check_values(config: Config) -> None:
    """Raises ConfigError for a field that has no use here, and for a number that would fail after all is loaded."""
    for key in config.trainer:
        if key in NOT_HERE:
            raise ConfigError(f"trainer.{key} is not used here. {NOT_HERE[key]}")
    for group, names in ABOVE_ZERO.items():
        for name in names:
            value = getattr(config, group).get(name)
            if isinstance(value, int | float) and value <= 0:
                raise ConfigError(f"{group}.{name} should be above 0, not {value}.")


def check_adapter(adapter: dict[str, Any], packing: bool = False) -> None:
    """Raises ConfigError for an unknown key and for values that train nothing; warns of fields that are not used."""
    kind = adapter.get("type")
    check(Adapter, {key: value for key, value in adapter.items() if key != kind or key == "lora"}, "adapter")
    if kind in VARIANTS:
        raise ConfigError(f"adapter.type cannot be {kind!r}. Write {VARIANTS[kind]}.")
    if kind not in ("none", *METHODS):
        raise ConfigError(f"adapter.type cannot be {kind!r}.{did_you_mean(kind, ['none', *METHODS])}")
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
    if kind in PROMPTS and packing:
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
METHODS = [
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
VARIANTS = {
    "dora": "adapter.lora.use_dora=true",
    "rslora": "adapter.lora.use_rslora=true",
    "pissa": "adapter.lora.init_lora_weights=pissa",
    "olora": "adapter.lora.init_lora_weights=olora",
    "loraplus": "adapter.loraplus_lr_ratio=16",
    "qlora": "adapter=qlora",
    "full": "adapter=none",
}
# PEFT's methods that put trained tokens before a row
PROMPTS = ("prompt_tuning", "prefix_tuning", "p_tuning", "multitask_prompt_tuning", "cpt", "cartridge")


def folder(name: str) -> Path:
    """`conf` or `recipes`: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    return next((path for path in (package / name, package.parent / name) if path.is_dir()), package / name)


def check_user_folder(folder_name: str | None, overrides: list[str]) -> None:
    """Raises ConfigError for what Hydra would pass over in the user's `-cd` folder.

    That is a file with the name of one of ours (Hydra takes the first of the two), a chosen file that stands where it
    is not found, and a chosen recipe without the line that gives it its place in the config.
    """
    user = Path(folder_name or "")
    for mine in sorted(user.rglob("*.yaml")) if folder_name else []:
        name = mine.relative_to(user)
        for ours in (folder("recipes") / name, folder("conf") / name):
            if ours.is_file() and ours.resolve() != mine.resolve():
                choice = "=".join(name.with_suffix("").as_posix().rsplit("/", 1))
                raise ConfigError(f"{choice} is in two files, {ours} and {mine}. Rename yours.")
    chosen = [re.fullmatch(r"\+(\w+)=([\w/-]+)", override) for override in overrides if folder_name]
    for group, name in (found.groups() for found in chosen if found):
        mine = user / group / f"{name}.yaml"
        if mine.is_file() and "@package" not in mine.read_text(encoding="utf-8"):
            raise ConfigError(f"{mine} should begin with the line # @package _global_")
        theirs = folder("recipes") / group
        if theirs.is_dir() and not mine.is_file() and not (theirs / f"{name}.yaml").is_file():
            for other in sorted(user.rglob(f"{name}.y*ml")):
                raise ConfigError(f"{other} should be {mine}.")


def choices() -> str:
    """The groups and their options for --help; those of recipes/ are added with a +, the others chosen."""
    loader = GlobalHydra.instance().config_loader()
    lines = []
    for group in sorted(set(loader.list_groups("")) - {"hydra"}, key=lambda name: (name not in OPEN_GROUPS, name)):
        label = f"  {group}=" if group in OPEN_GROUPS else f"  +{group}="
        text = ", ".join(sorted(loader.get_group_options(group)))
        lines.append(textwrap.fill(text, 100, initial_indent=label.ljust(14), subsequent_indent=" " * 14))
    return "\n".join(lines)


def direction(objective: str | None) -> Literal["minimize", "maximize"]:
    """Where a sweep looks for the best objective: losses and bits are the better the lower, shares the higher.

    >>> direction(None), direction("eval_loss"), direction("exact_match")
    ('minimize', 'minimize', 'maximize')
    """
    lower = objective is None or re.search(r"loss|bits_per_byte|perplexity|entropy|seconds|memory", objective)
    return "minimize" if lower else "maximize"


class RecipesSearchPath(SearchPathPlugin):
    """Adds recipes/ to what Hydra searches."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("sft_recipes", f"file://{folder('recipes')}")


def register() -> None:
    """Tells Hydra of our resolvers, the second config root, and the groups that take any key: we check those."""
    open_groups = {group: DictConfig({}, flags={"struct": False}) for group in (*OPEN_GROUPS, "supervision")}
    ConfigStore.instance().store(name="open_groups", node=DictConfig(open_groups), provider="sft_recipes")
    Plugins.instance().register(RecipesSearchPath)
    OmegaConf.register_new_resolver("choices", choices, replace=True)
    OmegaConf.register_new_resolver("direction", direction, replace=True)
    OmegaConf.register_new_resolver("package", lambda path: str(Path(__file__).parent / path), replace=True)
