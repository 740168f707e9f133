"""One composed config, parsed once into typed, checked Python: `from_hydra(composed)`."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf

from sft_recipes.config import options
from sft_recipes.config.curation_options import CurationOptions
from sft_recipes.config.endpoint_options import GenerateOptions
from sft_recipes.config.hydra_plugin import addable_groups
from sft_recipes.config.nested_values import iterate_leaves
from sft_recipes.config.renamed_options import PEFT_VARIANTS, UNSUPPORTED_OPTIONS
from sft_recipes.config.run_folder import check_run_name
from sft_recipes.config.secrets import check_no_secrets, saved_form
from sft_recipes.config.validation import call_validated, check_interval, show_value, unknown_field
from sft_recipes.errors import ConfigError, did_you_mean

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """One run. `composed` is the same as plain data, without secrets, as the run's files hold it."""

    name: str
    model: options.ModelOptions
    sources: dict[str, options.Source]  # the datasets of `data`, by name
    data: options.DataOptions
    formatter: dict[str, Any]  # of the sources that name none
    adapter: options.AdapterOptions
    trainer: options.TrainerOptions
    evaluate: options.EvaluateOptions
    data_checks: options.CheckPolicy = options.CheckPolicy()
    curation: CurationOptions = CurationOptions()
    generate: GenerateOptions = GenerateOptions()
    mix: options.MixOptions = options.MixOptions()
    preview: options.PreviewOptions = options.PreviewOptions()
    provenance: options.Provenance | None = None
    lr_find: options.LRRange | None = None
    mode: Literal["train", "preview", "curate", "generate", "evaluate"] = "train"
    seed: Annotated[int, "[0, 4294967295]"] = 42
    objective: str | None = None
    smoke: bool = False
    callbacks: list[str | dict] = field(default_factory=list)  # module.Class or {name: module.Class, option: value}
    overwrite: bool = False
    composed: dict[str, Any] = field(default_factory=dict)
    command: str | None = None  # that repeats the run, where it was started by one

    @property
    def streamed(self) -> bool:
        """Whether the sources are streamed: all of them, or none."""
        return any(source.streaming for source in self.sources.values())


def from_hydra(composed: DictConfig) -> Config:
    """The composed config, resolved, typed and checked.

    Raises ConfigError for an unknown key, a value of another type or out of range, and for groups that contradict each
    other. The fields of trl.SFTConfig are checked where it is built (training/arguments.py): its import takes seconds.
    """
    for key in map(str, composed):
        if "." in key:
            nested = f"{': {'.join(key.split('.'))}: …{'}' * key.count('.')}"
            raise ConfigError(f"{key}: keys are nested in YAML. Write {nested}.")
    for key in sorted(OmegaConf.missing_keys(composed)):
        typed = [path for path, _ in iterate_leaves(OmegaConf.to_container(composed)) if path != key]
        close = get_close_matches(key, typed, n=1, cutoff=0.9)  # data.fil.data_files, data.file.data_file
        raise ConfigError(f"{key} is missing. Write {key}=…{f', not {close[0]}=…' if close else ''}")
    raw, values = (OmegaConf.to_container(composed, resolve=resolve) for resolve in (False, True))
    check_no_secrets(raw)
    check_root_keys(values)
    for group in ("data", "adapter", "trainer"):
        if group not in values:  # in a primary config of one's own
            raise ConfigError(f"{group} is missing. Write {group}=…, or begin the file's defaults with - config.")
        if not isinstance(values[group], Mapping):
            raise ConfigError(f"{group} should be a mapping, not {show_value(values[group])}.")
    sources = {name: value for name, value in values["data"].items() if isinstance(value, Mapping)}
    rest = {name: value for name, value in values["data"].items() if name not in sources}
    chosen = {name: value for name, value in sources.items() if value.get("path") or value.get("data_files")}
    sources = chosen or sources  # without a recipe's settings for a dataset of its own, which `check_choices` names
    data = call_validated(options.DataOptions, rest, "data")
    parsed = {}
    for name, value in sources.items():
        source = call_validated(options.Source, value, f"data.{name}")
        parsed[name] = source if source.held_out is not None else replace(source, held_out=data.held_out)
    groups = {"sources": parsed, "data": data, "composed": saved_form(raw, values)}
    groups |= {"adapter": parse_adapter(values["adapter"]), "trainer": parse_trainer(values["trainer"])}
    config = call_validated(Config, values | groups, "")
    check_run_name(config.name)
    check_sources(config)
    return config


def check_sources(config: Config) -> None:
    """Raises ConfigError where there is no source, where only some are streamed, or no source uses the formatter."""
    if not config.sources:
        raise ConfigError("data names no source. Write data=NAME, or data=file data.file.data_files=rows.jsonl.")
    for name, source in config.sources.items():
        if config.streamed and not source.streaming:
            raise ConfigError(f"data.{name}.streaming should be true, too: all sources are streamed, or none.")
    if not isinstance(config.formatter.get("name"), str):
        raise ConfigError("formatter.name should be the name of a formatter. Write formatter=auto.")
    if config.formatter != {"name": "auto"} and all(source.formatter for source in config.sources.values()):
        label, names = config.formatter["name"], ", ".join(config.sources)
        raise ConfigError(f"formatter={label} is used by no source: {names} have their own.")


def parse_trainer(values: Mapping[str, Any]) -> options.TrainerOptions:
    """The `trainer` group, ours and trl.SFTConfig's apart; raises ConfigError for a field that has no use here."""
    own = {item.name for item in fields(options.TrainerOptions)} - {"fields"}
    ours = {key: value for key, value in values.items() if key in own}
    theirs = {key: value for key, value in values.items() if key not in own}
    for key in theirs.keys() & UNSUPPORTED_OPTIONS.keys():
        raise ConfigError(f"trainer.{key} is not used here. {UNSUPPORTED_OPTIONS[key]}")
    check_ranges(theirs, "trainer")
    return call_validated(options.TrainerOptions, ours | {"fields": theirs}, "trainer")


def parse_adapter(values: Mapping[str, Any]) -> options.AdapterOptions:
    """The `adapter` group; raises ConfigError for a method that PEFT does not have and for values that train nothing.

    Warns of fields that are not used.
    """
    kind = values.get("type", "none")
    if str(kind) in PEFT_VARIANTS:  # a list cannot be looked up
        raise ConfigError(f"adapter.type cannot be {kind!r}. Write {PEFT_VARIANTS[kind]}.")
    if kind not in ("none", "lora"):
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING  # takes seconds

        known = ["none", *sorted(method.value.lower() for method in PEFT_TYPE_TO_CONFIG_MAPPING)]
        if kind not in known:
            raise ConfigError(f"adapter.type cannot be {kind!r}.{did_you_mean(str(kind), known)}")
    if not isinstance(values.get(kind) or {}, Mapping):
        raise ConfigError(f"adapter.{kind} should be a mapping, not {show_value(values[kind])}.")
    if kind == "lora" and not values.get("lora"):
        raise ConfigError("adapter.type=lora needs adapter.lora. Write adapter=lora.")
    if kind == "lora":
        check_ranges(values["lora"], "adapter.lora")
    rest = {key: value for key, value in values.items() if key not in ("lora", kind)}
    adapter = call_validated(options.AdapterOptions, rest | {"settings": values.get(kind) or {}}, "adapter")
    if adapter.loraplus_lr_ratio is not None and kind != "lora":
        raise ConfigError("adapter.loraplus_lr_ratio needs adapter.type=lora.")
    if kind == "none" and adapter.quantization:
        raise ConfigError("adapter.quantization freezes the base, so that an adapter is needed. Write adapter=qlora.")
    if kind == "none" and len(values) > 1:
        log.warning("adapter=none trains every weight, the fields of adapter.lora are not used. Or write adapter=lora.")
    elif kind != "lora" and values.get("lora"):
        log.warning("adapter.type=%s does not use the fields of adapter.lora. Its own are adapter.%s.", kind, kind)
    return adapter


def check_ranges(values: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for a number outside the interval that options.FIELD_RANGES has for it."""
    for interval, names in options.FIELD_RANGES[where].items():
        for name in names.split():
            check_interval(f"{where}.{name}", values.get(name), interval)


def check_root_keys(keys: Iterable[str]) -> None:
    """Raises ConfigError for a key that no config has; Hydra's own is not in what a run is given."""
    for key in keys:
        if key not in root_keys() or key == "hydra":
            known = [name for name in root_keys(addable_groups()) if name != key]
            raise ConfigError(unknown_field(key, key, known, "the config"))


def root_keys(groups: Iterable[str] = ()) -> list[str]:
    """What a key can begin with: the keys of a config, and a + with one of these groups."""
    ours = [item.name for item in fields(Config) if item.name not in ("sources", "composed", "command")]
    return [*ours, "hydra", *(f"+{group}" for group in groups)]
