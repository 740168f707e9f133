"""What the base was measured at by an earlier run, which asked it the same: it is not measured again."""

import hashlib
import json
import logging
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sft_recipes.config.schema import Config
from sft_recipes.data.digest import digest_rows, stack_versions
from sft_recipes.data.row_cache import cache_root, path_times
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.errors import ConfigError, is_first_process
from sft_recipes.evaluation.suite import EvalInputs, measure_model, measured_metrics
from sft_recipes.reporting.run_folder import read_json, write_json

log = logging.getLogger(__name__)
# Fields of `evaluate` that change nothing in what the base is measured at
NOT_MEASURED = {
    "answers_in_card", "cache", "samples_every", "warn_above", "fail_above", "judge", "weight_change", "run",
}  # fmt: skip


def measure_base(
    model: PreTrainedModel,
    encoder: Encoder,
    questions: EvalInputs,
    config: Config,
    folder: Path | None = None,
    trained: bool = False,
) -> dict[str, Any]:
    """What `measure_model` gives for the untrained model, from an earlier run where model and questions are the same.

    Kept in $SFT_RECIPES_CACHE, else beside the Hub's cache; `evaluate.cache=false` measures anew. And in `folder`, of a
    run whose model is sharded with the weights of its checkpoint when it is resumed: with such `trained` weights
    raises ConfigError where nothing was kept.
    """
    root = cache_root() if config.evaluate.cache else None
    roots = [place for place in (folder, root) if place]
    if not roots:
        return measure_model(model, encoder, questions, is_base=True)
    name, found = f"base-{base_identity(model, encoder, questions, config)}.json", {}
    for file in (place / name for place in roots):
        with suppress(ConfigError, OSError):  # such a file is written again
            found = found or read_json(file)
    if torch.distributed.is_initialized():  # all processes measure, or none
        torch.distributed.broadcast_object_list(shared := [found], 0)
        (found,) = shared
    if found:
        log.info("The base is not measured again: an earlier run did, with the same questions (evaluate.cache=true).")
        roots = [place for place in roots if not (place / name).is_file()]
    elif trained and measured_metrics(questions):
        raise ConfigError(
            f"{folder} has no {name}: a sharded base is measured before training. Leave evaluate as it was."
        )
    else:
        found = measure_model(model, encoder, questions, is_base=True)
    for place in roots if found and is_first_process() else ():
        try:
            place.mkdir(0o700, parents=True, exist_ok=True)
            write_json(place / name, found)
        except OSError as error:
            log.warning("What the base was measured at could not be kept: %s.", error)
    return found


def base_identity(model: PreTrainedModel, encoder: Encoder, questions: EvalInputs, config: Config) -> str:
    """A hash of all that the measurements depend on: weights, device, tokenizer, questions, options, versions."""
    options, tokenizer = questions.options, encoder.tokenizer
    asked = {name: value for name, value in asdict(options).items() if name not in NOT_MEASURED}
    asked["answers_in_card"] = False  # it counted once: so a sharded run of that time finds its base and is resumed
    local = [Path(name) for name in (config.model.id, *options.lm_eval) if Path(name).exists()]
    parts = [
        asdict(replace(config.model, template_date=None)), asdict(config.adapter), path_times(local),
        getattr(model.config, "_commit_hash", None), str(model.dtype),
        torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device),
        tokenizer.backend_tokenizer.to_str(), encoder.chat_template, encoder.stop, asked, questions.seed,
        questions.asked, questions.prompted, questions.texts, questions.names,
        digest_rows(questions.data.held_out), stack_versions(),
        version("bitsandbytes"), version("lm-eval") if options.lm_eval else None,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
