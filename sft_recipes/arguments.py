"""The config's `trainer` as TRL's own arguments, and what a run is asked to optimise."""

import inspect
import logging
from pathlib import Path

import torch
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.integrations import get_available_reporting_integrations
from trl import SFTConfig

from sft_recipes.binding import ConfigError, call
from sft_recipes.config import Config
from sft_recipes.progress import Clock

log = logging.getLogger(__name__)


def trainer_arguments(config: Config, folder: Path) -> tuple[SFTConfig, list[TrainerCallback]]:
    """TRL's own arguments, checked, and the callbacks; encoding and packing are done before TRL sees the rows."""
    values = dict(config.trainer)
    stopping = {key: values.pop(key) for key in inspect.signature(EarlyStoppingCallback).parameters if key in values}
    callbacks: list[TrainerCallback] = [Clock()]
    if stopping:
        callbacks.append(call(EarlyStoppingCallback, stopping, "trainer"))
        kind = "epoch" if values.get("eval_strategy", "no") == "no" else values["eval_strategy"]
        values |= {"eval_strategy": kind, "save_strategy": kind, "load_best_model_at_end": True}
        values.setdefault("metric_for_best_model", "eval_loss")
    values.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    if "bf16" not in values and "fp16" not in values:
        values["bf16"] = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    check_trackers(values.get("report_to"))
    own = {"output_dir": str(folder), "seed": config.seed, "dataset_kwargs": {"skip_prepare_dataset": True}}
    arguments = call(SFTConfig, values | own, "trainer")
    if arguments.packing and arguments.max_length is None:
        raise ConfigError("trainer.packing needs trainer.max_length, the length of a packed row.")
    arguments.push_to_hub = False  # the run does it: transformers would push the log and the answers, too
    precision = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "fp32"
    log.info("Computing in %s on this hardware; trained weights are fp32.", precision)
    return arguments, callbacks


def check_trackers(wanted: str | list[str] | None) -> None:
    """Raises ConfigError for a tracker that is not installed; transformers would say so after the model is loaded."""
    known = get_available_reporting_integrations()
    for name in [wanted] if isinstance(wanted, str) else wanted or []:
        if name not in ("none", "all", *known):
            raise ConfigError(f"trainer.report_to={name} is not installed here. Try pip install {name}, or write none.")


def objective(name: str | None, held_out: bool, asked: bool, raw_text: bool) -> str:
    """The entry of metrics.json that goes back to Hydra, known to be there before training starts."""
    if name is None:
        return "eval_loss" if held_out else "train_loss"
    there = ["train_loss", *["eval_loss"] * held_out, *["exact_match", "stops"] * asked, *["raw_text_loss"] * raw_text]
    if name not in there and not (held_out and name.startswith("eval_")):
        raise ConfigError(f"objective={name} is not measured in this run. Measured are {', '.join(there)}.")
    return name
