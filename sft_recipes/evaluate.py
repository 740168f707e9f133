"""A finished run and its base, measured alike: `python -m sft_recipes +recipe=lima mode=evaluate evaluate.run=RUN`."""

import logging
import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl.trainer.utils import add_fused_lm_head

from sft_recipes.config.schema import Config
from sft_recipes.data.digest import audit_record
from sft_recipes.data.sources import explained_errors, find_files, source_fingerprint
from sft_recipes.errors import ConfigError
from sft_recipes.evaluation.judge import run_judge
from sft_recipes.evaluation.suite import EvalInputs, compare_measurements, measure_model, measured_metrics
from sft_recipes.modeling.loading import load_model, load_tokenizer
from sft_recipes.modeling.save_load import load_run
from sft_recipes.modeling.workarounds import ensure_lm_head_bias
from sft_recipes.reporting.run_folder import read_json, write_json, write_jsonl
from sft_recipes.reporting.run_report import write_report
from sft_recipes.training.arguments import check_objective, resolve_objective
from sft_recipes.training.run_metadata import describe_environment
from sft_recipes.training.setup import Run, RunSetup, open_run_folder, set_up_run

log = logging.getLogger(__name__)


def main(config: Config, folder: Path) -> float:
    """Compares a finished run with its base; gives back the objective's value, NaN where only benchmarks were run."""
    run = evaluate(config, folder)
    return run.metrics[run.objective] if run.objective else math.nan


def evaluate(config: Config, folder: str | Path | None = None) -> Run:
    """The run `config.evaluate.run` and its base, measured alike; writes the report into `folder`.

    Without a folder that is outputs/NAME/DATE_TIME. Raises ConfigError and DataError for what the user can fix.
    """
    if not isinstance(config, Config):
        raise ConfigError("evaluate() takes a config. Write evaluate(compose(run='outputs/NAME/DATE')).")
    folder = open_run_folder(config, folder)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    options = config.evaluate
    if options.run is None:
        raise ConfigError("evaluate.run is missing. Write evaluate.run=outputs/NAME/DATE, the folder of a run.")
    tuned, tokenizer = load_run(options.run, trust_remote_code=config.model.trust_remote_code)
    served = tokenizer.chat_template
    setup = set_up_run(hold_out_question_files(config, Path(options.run)), folder, tokenizer)
    inputs = setup.eval_inputs
    objective = resolve_objective(config.objective, measured_metrics(inputs))
    warnings = warn_of_other_prompt(tokenizer, served, inputs)
    compared, answers = compare_measurements(*measure_base_and_tuned(tuned, setup), inputs)
    metrics = {"name": config.name, "mode": "evaluate", "command": config.command, "started": started}
    metrics |= {"environment": describe_environment(), "warnings": warnings} | compared
    audit = audit_record(setup.data.audit, {}, config.composed) | {
        "parity": sum(part["parity"] for part in setup.data.audit.values())
    }
    if setup.arguments.process_index == 0:  # of several processes the first one writes
        if options.judge and answers:
            metrics["judge"] = run_judge(answers, options.judge)
        write_json(folder / "metrics.json", metrics)
        write_json(folder / "supervision.json", audit)
        write_jsonl(folder / "answers.jsonl", answers)
        print(write_report(folder))
    check_objective(objective, metrics)
    return Run(folder, metrics, objective, tuned, tokenizer)


def hold_out_question_files(config: Config, run: Path) -> Config:
    """The config with every row of the local files that the run was not trained on held out, to be asked.

    Of the others, of streams, of what `datasets` reads, and where no record tells what a model was trained on, the same
    rows are held out as in training.
    """
    record = next((path for place in (run, run.parent) if (path := place / "supervision.json").is_file()), None)
    if record is None:
        return config
    trained = read_json(record).get("sources", {})
    known, sources = {part.get("fingerprint") for part in trained.values()}, dict(config.sources)
    for name, source in sources.items():
        where = f"data.{name}"
        with explained_errors(where, source):
            if source.streaming or source.held_out_split or find_files(where, source) is None:
                continue
            if source_fingerprint(where, source, None) not in known:
                sources[name] = replace(source, split=None, held_out_split=source.split)
                log.info("%s: the run was not trained on these files, so all of their rows are held out.", where)
    return replace(config, sources=sources)


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
    tuned: PreTrainedModel | PeftModel, setup: RunSetup
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Base and tuned model measured: an adapter is switched off for the base, other weights are loaded in turn."""
    encoder, inputs = setup.encoder, setup.eval_inputs
    if isinstance(tuned, PeftModel):
        prepare_for_scoring(tuned.get_base_model())
        with tuned.disable_adapter():
            before = measure_model(tuned, encoder, inputs, is_base=True)
        return before, measure_model(tuned, encoder, inputs)
    new_token_ids = load_tokenizer(setup.config.model)[2]
    base = load_model(setup.config.model, None, True, encoder.tokenizer, encoder.answers.stops, new_token_ids)
    before = measure_model(prepare_for_scoring(base), encoder, inputs, is_base=True)
    del base
    return before, measure_model(prepare_for_scoring(tuned), encoder, inputs)


def prepare_for_scoring(model: PreTrainedModel) -> PreTrainedModel:
    """The model with the head that gives its tokens' losses, as TRL's trainer gives it, on a GPU where there is one."""
    if torch.cuda.is_available() and not getattr(model, "quantization_method", None):
        model.to("cuda")
    ensure_lm_head_bias(model)
    add_fused_lm_head(model)
    return model
