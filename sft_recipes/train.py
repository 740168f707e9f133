"""One run: data and model from the config, `trl.SFTTrainer` as it is, and what came of it: `python -m sft_recipes`."""

import logging
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from trl import SFTTrainer

from sft_recipes.config.schema import Config
from sft_recipes.config.validation import call_validated
from sft_recipes.data.digest import audit_record, digest_rows
from sft_recipes.data.pipeline import prepare_rows
from sft_recipes.data.sources import parse_sources
from sft_recipes.data.token_rows import row_lengths
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.errors import ConfigError
from sft_recipes.evaluation.judge import JudgeOptions, run_judge
from sft_recipes.evaluation.suite import (
    EvaluateOptions,
    build_eval_inputs,
    check_best_model_metric,
    check_evaluation,
    compare_measurements,
    measure_model,
    measured_metrics,
)
from sft_recipes.evaluation.token_loss import flatten_loss
from sft_recipes.evaluation.weight_change import relative_change
from sft_recipes.modeling.adapters import build_peft_config, build_quantization_config, prepare_peft_config
from sft_recipes.modeling.loading import load_model, load_tokenizer
from sft_recipes.modeling.packed_attention import select_packed_attention
from sft_recipes.modeling.save_load import push_model, save_model
from sft_recipes.reporting.run_folder import write_json, write_jsonl
from sft_recipes.reporting.run_report import audit_table, write_report
from sft_recipes.training.arguments import build_arguments, resolve_objective
from sft_recipes.training.lr_finder import LRRange, run_lr_range_test
from sft_recipes.training.memory import check_memory
from sft_recipes.training.run_metadata import (
    count_parity_rows,
    describe_environment,
    measure_padding,
    rerun_command,
    smoke_result,
    training_cost,
    training_summary,
    was_evaluated_last,
)
from sft_recipes.training.trainer import attach_callbacks, build_trainer, evaluate_with, mend

log = logging.getLogger(__name__)


def main(config: Config) -> float:
    """Trains and saves the model, measures base and tuned alike; gives back the objective's value."""
    folder, started = Path(HydraConfig.get().runtime.output_dir), datetime.now(UTC).isoformat(timespec="seconds")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # a sweep's jobs run in one process
    arguments, callbacks = build_arguments(config, folder)
    asking = call_validated(EvaluateOptions, config.evaluate, "evaluate")
    check_evaluation(asking)
    peft, quantization = build_peft_config(config.adapter), build_quantization_config(config.adapter)
    tokenizer, template, new = call_validated(load_tokenizer, config.model, "model")
    encoder = Encoder(tokenizer, template)
    data, rows, stream = prepare_rows(config, encoder, arguments)
    questions = build_eval_inputs(asking, data, list(parse_sources(config)), config.seed)
    goal = resolve_objective(config.objective, measured_metrics(questions))
    check_best_model_metric(arguments.metric_for_best_model, questions)
    supervision = audit_record(data.ledger, digest_rows(rows) if stream is None else {}, asdict(config))
    supervision |= {"padding": measure_padding(data.train, arguments), "parity": count_parity_rows(data.ledger)}
    if arguments.process_index == 0:
        write_json(folder / "supervision.json", supervision)
        print("\n".join(audit_table(data.ledger)))
    longest = arguments.max_length if arguments.packing else int(row_lengths(data.train).max())
    check_memory(config, longest, new=new, processes=arguments.world_size)
    model = load_model(config.model, quantization, peft is not None, tokenizer, encoder.stop, new)
    if arguments.packing:
        select_packed_attention(model, config.model.get("attn_implementation"))
    peft = prepare_peft_config(peft, model, new, config.model.get("revision"))
    trainer = build_trainer(model, arguments, rows, data.held_out, tokenizer, peft, callbacks)
    mend(trainer, config.adapter)
    overfitting = attach_callbacks(trainer, encoder, questions, folder)
    log.info(training_summary(trainer, data.ledger))
    if config.lr_find:
        return run_lr_range_test(trainer, call_validated(LRRange, config.lr_find, "lr_find"), folder)
    before = measure_model(trainer.model, encoder, questions)
    with logging_redirect_tqdm():
        result = trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    after = measure_model(trainer.model, encoder, questions)
    if "held_out" in after and (arguments.load_best_model_at_end or not was_evaluated_last(trainer)):
        evaluate_with(trainer, lambda: flatten_loss(after["held_out"]))
        trainer.evaluate()
    compared, answers = compare_measurements(before, after, questions)
    metrics = {"name": config.name, "mode": "train", "command": rerun_command(), "started": started}
    metrics |= {"environment": describe_environment(), "train_loss": result.training_loss, "steps": result.global_step}
    metrics |= compared | training_cost(trainer, result) | {"padding": supervision["padding"]}
    metrics |= {"warnings": overfitting.warnings, "history": trainer.state.log_history}
    if trainer.is_world_process_zero():
        if stream:
            supervision |= {"sources": stream.ledger, "digest": stream.digest.record()}
            write_json(folder / "supervision.json", supervision)
        save_model(trainer, folder / "model", encoder)
        metrics |= measure_on_request(
            asking, trainer, answers, partial(load_untrained_base, config, tokenizer, encoder, new)
        )
        write_json(folder / "metrics.json", metrics)
        write_jsonl(folder / "answers.jsonl", answers)
        print(write_report(folder))
        if config.trainer.get("push_to_hub"):
            log.info("Pushed to %s.", push_model(folder / "model", config.name, arguments))
    if config.smoke:
        log.info(smoke_result(metrics, answers))
    if goal not in metrics:
        raise ConfigError(f"objective={goal} could not be measured: no held-out answer has a supervised stop token.")
    return metrics[goal]


def measure_on_request(
    asking: EvaluateOptions, trainer: SFTTrainer, answers: list[dict], load_base: Callable
) -> dict[str, Any]:
    """How far the weights moved, and what the judge says, where they are asked for."""
    found = {}
    if asking.weight_change:
        found["weight_change"] = relative_change(trainer.model, load_base)
    if asking.judge and answers:
        found["judge"] = run_judge(answers, call_validated(JudgeOptions, asking.judge, "evaluate.judge"))
    return found


def load_untrained_base(
    config: Config, tokenizer: PreTrainedTokenizerFast, encoder: Encoder, new: list[int]
) -> PreTrainedModel:
    """The base model as it was before training, on the CPU and not quantized."""
    with torch.device("cpu"):
        return load_model(config.model, None, False, tokenizer, encoder.stop, new)
