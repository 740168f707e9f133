"""A finished run and its base, measured alike: `python -m sft_recipes +recipe=lima mode=evaluate evaluate.run=RUN`."""

import logging
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl.trainer.utils import add_fused_lm_head

from sft_recipes.config.schema import Config
from sft_recipes.config.validation import call_validated
from sft_recipes.data.digest import audit_record
from sft_recipes.data.prepare import is_streamed, load_data
from sft_recipes.data.sources import parse_sources
from sft_recipes.data.streaming import load_stream
from sft_recipes.encoding.chat_template import prepare_tokenizer
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.errors import ConfigError
from sft_recipes.evaluation.judge import JudgeOptions, run_judge
from sft_recipes.evaluation.suite import (
    EvalInputs,
    EvaluateOptions,
    build_eval_inputs,
    check_evaluation,
    compare_measurements,
    measure_model,
    measured_metrics,
)
from sft_recipes.modeling.loading import load_model, load_tokenizer
from sft_recipes.modeling.save_load import load_run
from sft_recipes.modeling.workarounds import ensure_lm_head_bias
from sft_recipes.reporting.run_folder import write_json, write_jsonl
from sft_recipes.reporting.run_report import write_report
from sft_recipes.training.arguments import build_arguments, resolve_objective
from sft_recipes.training.run_metadata import describe_environment, rerun_command

log = logging.getLogger(__name__)


def main(config: Config) -> float:
    """Asks both the config's held-out questions, writes the report, and gives back the objective's value."""
    folder, started = Path(HydraConfig.get().runtime.output_dir), datetime.now(UTC).isoformat(timespec="seconds")
    arguments, _ = build_arguments(config, folder)
    options = call_validated(EvaluateOptions, config.evaluate, "evaluate")
    if options.run is None:
        raise ConfigError("evaluate.run is missing. Write evaluate.run=outputs/NAME/DATE, the folder of a run.")
    check_evaluation(options)
    tuned, tokenizer = load_run(Path(options.run))
    served = tokenizer.chat_template
    encoder = Encoder(tokenizer, prepare_tokenizer(tokenizer, config.model.get("chat_template"), any_stop=True)[0])
    if is_streamed(config):
        data, _ = load_stream(config, encoder, arguments.max_length, arguments.packing)
    else:
        data = load_data(config, encoder, arguments.max_length)
    questions = build_eval_inputs(options, data, list(parse_sources(config)), config.seed)
    goal = resolve_objective(config.objective, measured_metrics(questions))
    parity = sum(part["parity"] for part in data.ledger.values())
    warnings = warn_of_other_prompt(tokenizer, served, questions)
    compared, lines = compare_measurements(*measure_base_and_tuned(tuned, config, encoder, questions), questions)
    metrics = {"name": config.name, "mode": "evaluate", "command": rerun_command(), "started": started}
    metrics |= {"environment": describe_environment(), "warnings": warnings} | compared
    if options.judge and lines:
        metrics["judge"] = run_judge(lines, call_validated(JudgeOptions, options.judge, "evaluate.judge"))
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "supervision.json", audit_record(data.ledger, {}, asdict(config)) | {"parity": parity})
    write_jsonl(folder / "answers.jsonl", lines)
    print(write_report(folder))
    return metrics.get(goal, 0.0)


def warn_of_other_prompt(tokenizer: PreTrainedTokenizerFast, served: str, questions: EvalInputs) -> list[str]:
    """A warning where the questions are put in another prompt than the one that the run was trained and saved with."""
    if not questions.asked:
        return []
    ours, theirs = (
        tokenizer.apply_chat_template(
            questions.asked[0]["messages"][:1], chat_template=template, tokenize=False, add_generation_prompt=True
        )
        for template in (tokenizer.chat_template, served)
    )
    if ours == theirs:
        return []
    line = f"Asked as {ours[:80]!r}, trained and saved as {theirs[:80]!r}: another prompt gets worse answers."
    log.warning(line)
    return [line]


def measure_base_and_tuned(
    tuned: PreTrainedModel | PeftModel, config: Config, encoder: Encoder, questions: EvalInputs
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Base and tuned model measured: an adapter is switched off for the base, other weights are loaded in turn."""
    if isinstance(tuned, PeftModel):
        prepare_for_scoring(tuned.get_base_model())
        with tuned.disable_adapter():
            before = measure_model(tuned, encoder, questions)
        return before, measure_model(tuned, encoder, questions)
    new = call_validated(load_tokenizer, config.model, "model")[2]
    base = load_model(config.model, None, True, encoder.tokenizer, encoder.stop, new)
    before = measure_model(prepare_for_scoring(base), encoder, questions)
    del base
    return before, measure_model(prepare_for_scoring(tuned), encoder, questions)


def prepare_for_scoring(model: PreTrainedModel) -> PreTrainedModel:
    """The model with the head that gives its tokens' losses, as TRL's trainer gives it, on a GPU where there is one."""
    if torch.cuda.is_available() and not getattr(model, "quantization_method", None):
        model.to("cuda")
    ensure_lm_head_bias(model)
    add_fused_lm_head(model)
    return model
