"""One run, from a config to a trained model and its report: `python -m sft_recipes +recipe=lima`."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput

from sft_recipes.config.run_folder import own_folder
from sft_recipes.config.schema import Config
from sft_recipes.data.digest import audit_record, digest_rows
from sft_recipes.errors import ConfigError
from sft_recipes.evaluation.base_cache import measure_base
from sft_recipes.evaluation.judge import run_judge
from sft_recipes.evaluation.suite import compare_measurements, measure_model, measured_metrics
from sft_recipes.evaluation.token_loss import flatten_loss
from sft_recipes.evaluation.weight_change import relative_change
from sft_recipes.modeling.adapters import prepare_peft_config
from sft_recipes.modeling.loading import load_model
from sft_recipes.modeling.save_load import push_or_tell, save_model
from sft_recipes.reporting.run_folder import read_json, write_json, write_jsonl
from sft_recipes.reporting.run_report import audit_table, write_report
from sft_recipes.reporting.text import format_duration
from sft_recipes.training import checkpoints, run_metadata
from sft_recipes.training.arguments import check_objective, resolve_objective
from sft_recipes.training.callbacks import LossMonitor, StopAtShare
from sft_recipes.training.choices import describe_choices
from sft_recipes.training.lr_finder import run_lr_range_test
from sft_recipes.training.memory import describe_out_of_memory, describe_step
from sft_recipes.training.setup import Run, RunSetup, open_run_folder, set_up_run
from sft_recipes.training.sharding import is_sharded
from sft_recipes.training.trainer import (
    SupervisedTrainer,
    add_sample_answers,
    build_trainer,
    measure_held_out,
    select_attention,
)

log = logging.getLogger(__name__)


def main(config: Config, folder: Path) -> float:
    """Trains, or looks for a learning rate; gives back the objective's value for Hydra's sweepers.

    A run to resume that was stopped when it had only its report to write gets that.
    """
    if config.lr_find:
        setup = set_up_run(config, folder)
        write_audit(setup, folder, collect_audit(setup))
        return run_lr_range_test(start_trainer(setup), config.lr_find, folder)
    if checkpoints.is_finished(folder, config) and not (folder / "report.html").is_file():  # the last that is written
        with own_folder(folder):
            print(write_report(folder))
        metrics = read_json(folder / "metrics.json")
        return metrics[resolve_objective(config.objective, list(metrics))]
    run = train(config, folder)
    return run.metrics[run.objective]


def train(config: Config, folder: str | Path | None = None) -> Run:
    """Trains and saves the model, measures base and tuned alike, and writes the report into `folder`.

    Without a folder that is outputs/NAME/DATE_TIME. Raises ConfigError and DataError for what the user can fix;
    whatever can be refused is refused before the weights are loaded.
    """
    folder = open_run_folder(config, folder)
    with own_folder(folder):
        return run_training(config, folder)


def run_training(config: Config, folder: Path) -> Run:
    """What `train` does in the run's folder, which no other run is using."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # a sweep's jobs run in one process
    checkpoints.check_unfinished(folder, config)
    setup = set_up_run(config, folder)
    objective = resolve_objective(config.objective, measured_metrics(setup.eval_inputs, training=True))
    audit = collect_audit(setup)
    digest = digest_rows(setup.data.train) if setup.stream else audit["digest"]
    run = checkpoints.describe_run(config, digest, setup.arguments.world_size)
    # before a file is written: a refused resume changes none
    checkpoint = checkpoints.find_resumable(folder, setup.arguments.resume_from_checkpoint, run)
    write_audit(setup, folder, audit)
    stop, monitor = StopAtShare(config.trainer.stop_at or 1), LossMonitor()
    setup.callbacks.append(stop)
    trainer, before = start_measured(setup, run, monitor, bool(checkpoint))
    training_now = explained_out_of_memory(setup, lambda: f"in training step {trainer.state.global_step + 1}")
    with logging_redirect_tqdm(), training_now:
        result = trainer.train(checkpoint and str(checkpoint))
    compared, answers = measure_after(trainer, setup, before, result)
    metrics = {
        "name": config.name, "mode": "train", "command": config.command, "started": started,
        "environment": run_metadata.describe_environment(),
        "train_loss": result.training_loss, "steps": result.global_step,
        **compared, **run_metadata.training_cost(trainer, result),
        "choices": describe_choices(trainer), "padding": 0.0 if trainer.padding_free else audit["padding"],
        "warnings": monitor.warnings, "history": trainer.state.log_history, **setup.template_date,
        **({"stopped_at": stop.share} if stop.stopped else {}),
    }  # fmt: skip
    with checkpoints.explained_write_errors(folder, "The model"):
        metrics["loading"] = save_model(trainer, folder / "model", setup.encoder, trainer.initial_adapter)
    if trainer.is_world_process_zero():
        write_results(trainer, setup, audit, metrics, answers)
    if config.smoke:
        log.info(run_metadata.smoke_result(metrics, answers))
    check_objective(objective, metrics)
    return Run(folder, metrics, objective, trainer.model, setup.tokenizer)


def start_measured(
    setup: RunSetup, run: Mapping[str, Any], monitor: LossMonitor, resumed: bool
) -> tuple[SupervisedTrainer, dict[str, Any]]:
    """The trainer, and what the untrained model is measured at: a sharded one is when its training begins."""
    before = {}
    with explained_out_of_memory(setup, lambda: "while the base was loaded and measured"):
        trainer = start_trainer(setup, run)
        checkpoints.check_disk_space(setup.folder, trainer.model, setup.arguments)
        add_sample_answers(trainer, setup.encoder, setup.eval_inputs, setup.folder / "samples.jsonl")
        log.info(run_metadata.training_summary(trainer, setup.data.audit))
        measure = partial(measure_before, trainer, setup, monitor, before)
        if is_sharded(setup.arguments):
            trainer.start_actions.append(partial(measure, setup.folder, resumed))
        else:
            measure()
        trainer.add_callback(monitor)
    return trainer, before


def measure_before(
    trainer: SupervisedTrainer, setup: RunSetup, monitor: LossMonitor, before: dict[str, Any], *of_shards: Any
) -> None:
    """Fills `before` with what the untrained model is measured at, and the `seconds` that this took."""
    clock = time.monotonic()
    before |= measure_base(trainer.model, setup.encoder, setup.eval_inputs, setup.config, *of_shards)
    monitor.initial = before.get("held_out", {}).get("loss")
    before["seconds"] = time.monotonic() - clock
    trainer.earlier_seconds -= before["seconds"] if of_shards else 0  # its training has begun


def measure_after(
    trainer: SupervisedTrainer, setup: RunSetup, before: dict[str, Any], result: TrainOutput
) -> tuple[dict[str, Any], list[dict]]:
    """What base and tuned are measured at, beside each other, and their answers."""
    clock = time.monotonic() - before.pop("seconds")
    with explained_out_of_memory(setup, lambda: "while the tuned model was measured"):
        after = measure_model(trainer.model, setup.encoder, setup.eval_inputs, trainer.held_out_now())
    measuring = time.monotonic() - clock
    if measuring > (seconds := result.metrics["train_runtime"]):
        took = f"Measuring base and tuned took {format_duration(measuring)}, training {format_duration(seconds)}."
        log.info("%s Fewer evaluate.rows or evaluate.max_new_tokens take less.", took)
    history = trainer.state.log_history
    evaluated = [entry["step"] for entry in history if "eval_loss" in entry]
    on_the_way = sum(entry.get("eval_runtime", 0) for entry in history)
    if "held_out" in after and (trainer.args.load_best_model_at_end or evaluated[-1:] != [result.global_step]):
        trainer.report_evaluation(flatten_loss(after["held_out"]))
    compared, answers = compare_measurements(before, after, setup.eval_inputs)
    return compared | {"evaluation_seconds": measuring + on_the_way}, answers


def write_results(
    trainer: SupervisedTrainer, setup: RunSetup, audit: dict[str, Any], metrics: dict[str, Any], answers: list[dict]
) -> None:
    """Writes answers, metrics.json and the report, prints its table, and pushes the model where that is asked for.

    The judge's verdicts and the change of the weights, which take the longest, come into the metrics here.
    """
    config, folder = setup.config, setup.folder
    if setup.stream:
        audit |= {"sources": setup.stream.audit, "digest": setup.stream.digest.record()}
        write_json(folder / "supervision.json", audit)
    if config.evaluate.weight_change and not is_sharded(setup.arguments):
        metrics["weight_change"] = relative_change(trainer.model, partial(load_untrained_base, setup))
    if config.evaluate.judge and answers:
        metrics["judge"] = run_judge(answers, config.evaluate.judge)
    with checkpoints.explained_write_errors(folder, "The results"):
        write_jsonl(folder / "answers.jsonl", answers)
        write_json(folder / "metrics.json", metrics)  # from here on the run is finished but for its report
        table = write_report(folder)
    print(table)
    if config.trainer.fields.get("push_to_hub"):
        push_or_tell(folder / "model", config.name, setup.arguments)


@contextmanager
def explained_out_of_memory(setup: RunSetup, doing: Callable[[], str]) -> Iterator[None]:
    """Memory that runs out becomes a ConfigError with what the run was doing and which settings help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        step = describe_step(setup.config, setup.arguments, setup.longest, setup.new_token_ids)
        kept = checkpoints.last_checkpoint_line(setup.folder)
        raise ConfigError(describe_out_of_memory(step, doing()) + kept) from error


def collect_audit(setup: RunSetup) -> dict[str, Any]:
    """What the data checks found, the digest of every token, the padding, and how many rows are served as trained."""
    audit = audit_record(setup.data.audit, setup.data.digest or {}, setup.config.composed)
    audit |= {"padding": run_metadata.measure_padding(setup.data.train, setup.arguments)}
    parity = sum(part["parity"] for part in setup.data.audit.values())  # rows compared; a difference ends the run
    counted = {"parity": parity, "curation": setup.data.curation}
    return audit | setup.template_date | counted


def write_audit(setup: RunSetup, folder: Path, audit: dict[str, Any]) -> None:
    """Writes supervision.json and prints its table."""
    if setup.arguments.process_index == 0:
        write_json(folder / "supervision.json", audit)
        print("\n".join(audit_table(setup.data.audit)))


def start_trainer(setup: RunSetup, run: Mapping[str, Any] | None = None) -> SupervisedTrainer:
    """The weights loaded and given to the trainer; `run` describes the run in its checkpoints."""
    config, arguments = setup.config, setup.arguments
    tokenizer, stops, new_token_ids = setup.tokenizer, setup.encoder.answers.stops, setup.new_token_ids
    model = load_model(config.model, setup.quantization, setup.peft is not None, tokenizer, stops, new_token_ids)
    peft = prepare_peft_config(setup.peft, model, new_token_ids, config.model.revision)
    measure = partial(measure_held_out, setup.encoder, setup.eval_inputs, arguments.metric_for_best_model)
    trainer = build_trainer(
        model, arguments, setup.data.held_out, train_dataset=setup.rows, processing_class=tokenizer, peft_config=peft,
        callbacks=setup.callbacks, measure=measure, loraplus_lr_ratio=config.adapter.loraplus_lr_ratio, run=run,
    )  # fmt: skip
    select_attention(trainer, config.model.attn_implementation)
    return trainer


def load_untrained_base(setup: RunSetup) -> PreTrainedModel:
    """The base model as it was before training, on the CPU and not quantized."""
    with torch.device("cpu"):
        stops = setup.encoder.answers.stops
        return load_model(setup.config.model, None, False, setup.tokenizer, stops, setup.new_token_ids)
