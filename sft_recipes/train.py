"""One run: data and model from the config, `trl.SFTTrainer` as it is, and what came of it: `python -m sft_recipes`."""

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from hydra.core.hydra_config import HydraConfig
from peft import PeftConfig
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)
from transformers.trainer_utils import IntervalStrategy
from trl import SFTConfig, SFTTrainer

from sft_recipes import comparison, held_out, judge, lr_find, memory, report, streaming, weights
from sft_recipes.adapters import fit, mend, peft_config, quantization_config
from sft_recipes.arguments import objective, trainer_arguments
from sft_recipes.attention import isolate
from sft_recipes.binding import ConfigError, call, one_line
from sft_recipes.comparison import Questions
from sft_recipes.config import Config
from sft_recipes.cost import cost, trainable
from sft_recipes.data import Data, load, streamed
from sft_recipes.digest import digest, record
from sft_recipes.encoding import Encoder
from sft_recipes.environment import command, environment
from sft_recipes.loss import evaluate_with, watch
from sft_recipes.model import load_model, load_tokenizer
from sft_recipes.monitor import Overfitting, Samples
from sft_recipes.progress import Bar
from sft_recipes.rows import lengths_of, packed, padding_share, with_lengths
from sft_recipes.run_folder import write_json, write_lines
from sft_recipes.runs import push, save
from sft_recipes.scores import scores
from sft_recipes.sources import sources
from sft_recipes.streaming import Stream

log = logging.getLogger(__name__)
SAMPLES = 3  # questions that are asked while training goes on


def main(config: Config) -> float:
    """Trains and saves the model, measures base and tuned alike; gives back the objective's value."""
    folder, started = Path(HydraConfig.get().runtime.output_dir), datetime.now(UTC).isoformat(timespec="seconds")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # a sweep's jobs run in one process
    arguments, callbacks = trainer_arguments(config, folder)
    asking = call(comparison.Options, config.evaluate, "evaluate")
    comparison.check(asking)
    peft, quantization = peft_config(config.adapter), quantization_config(config.adapter)
    tokenizer, template, new = call(load_tokenizer, config.model, "model")
    encoder = Encoder(tokenizer, template)
    data, rows, stream = prepare(config, encoder, arguments)
    questions = comparison.questions_of(asking, data, list(sources(config)), config.seed)
    goal = objective(config.objective, comparison.measured(questions))
    comparison.check_metric(arguments.metric_for_best_model, questions)
    supervision = record(data.ledger, digest(rows) if stream is None else {}, asdict(config))
    supervision |= {"padding": padding(data.train, arguments), "parity": parity(data.ledger)}
    if arguments.process_index == 0:
        write_json(folder / "supervision.json", supervision)
        print("\n".join(report.ledger_table(data.ledger)))
    longest = arguments.max_length if arguments.packing else int(lengths_of(data.train).max())
    memory.check(config, longest, new=new, processes=arguments.world_size)
    model = load_model(config.model, quantization, peft is not None, tokenizer, encoder.stop, new)
    if arguments.packing:
        isolate(model, config.model.get("attn_implementation"))
    peft = fit(peft, model, new, config.model.get("revision"))
    trainer = build(model, arguments, rows, data.held_out, tokenizer, peft, callbacks)
    mend(trainer, config.adapter)
    overfitting = observe(trainer, encoder, questions, folder)
    log.info(announcement(trainer, data.ledger))
    if config.lr_find:
        return lr_find.find(trainer, call(lr_find.Ramp, config.lr_find, "lr_find"), folder)
    before = comparison.measure(trainer.model, encoder, questions)
    with logging_redirect_tqdm():
        result = trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    after = comparison.measure(trainer.model, encoder, questions)
    if "held_out" in after and (arguments.load_best_model_at_end or not evaluated_last(trainer)):
        evaluate_with(trainer, lambda: held_out.flat(after["held_out"]))
        trainer.evaluate()
    compared, answers = comparison.compare(before, after, questions)
    metrics = {"name": config.name, "mode": "train", "command": command(), "started": started}
    metrics |= {"environment": environment(), "train_loss": result.training_loss, "steps": result.global_step}
    metrics |= compared | cost(trainer, result) | {"padding": supervision["padding"]}
    metrics |= {"warnings": overfitting.warnings, "history": trainer.state.log_history}
    if trainer.is_world_process_zero():
        if stream:
            supervision |= {"sources": stream.ledger, "digest": stream.digest.record()}
            write_json(folder / "supervision.json", supervision)
        save(trainer, folder / "model", encoder)
        metrics |= on_request(asking, trainer, answers, partial(base, config, tokenizer, encoder, new))
        write_json(folder / "metrics.json", metrics)
        write_lines(folder / "answers.jsonl", answers)
        print(report.write(folder))
        if config.trainer.get("push_to_hub"):
            log.info("Pushed to %s.", push(folder / "model", config.name, arguments))
    if config.smoke:
        log.info(smoke_line(metrics, answers))
    if goal not in metrics:
        raise ConfigError(f"objective={goal} could not be measured: no held-out answer has a supervised stop token.")
    return metrics[goal]


def on_request(
    asking: comparison.Options, trainer: SFTTrainer, answers: list[dict], load_base: Callable
) -> dict[str, Any]:
    """How far the weights moved, and what the judge says, where they are asked for."""
    found = {}
    if asking.weight_change:
        found["weight_change"] = weights.change(trainer.model, load_base)
    if asking.judge and answers:
        found["judge"] = judge.run(answers, call(judge.Options, asking.judge, "evaluate.judge"))
    return found


def prepare(
    config: Config, encoder: Encoder, arguments: SFTConfig
) -> tuple[Data, Dataset | IterableDataset, Stream | None]:
    """The rows as they are read, as the trainer gets them, and the stream they come from, if they are streamed."""
    if streamed(config):
        data, stream = streaming.load(config, encoder, arguments.max_length, arguments.packing)
        return data, stream.dataset(), stream
    data = load(config, encoder, arguments.max_length)
    if arguments.packing:
        return data, packed(data.train, arguments.max_length, config.seed), None
    return data, with_lengths(data.train), None


def build(
    model: PreTrainedModel,
    arguments: SFTConfig,
    rows: Dataset | IterableDataset,
    held_out: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    peft: PeftConfig | None,
    callbacks: list[TrainerCallback],
) -> SFTTrainer:
    """TRL's trainer as it is, with what it and PEFT leave open mended on the built object."""
    if not len(held_out):
        arguments.eval_strategy = IntervalStrategy.NO
    try:
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=held_out if len(held_out) else None,
            processing_class=tokenizer,
            peft_config=peft,
            callbacks=callbacks,
        )
    except ValueError as error:
        raise ConfigError(f"trainer or adapter: {one_line(error)}") from error
    watch(trainer)
    for printing in (ProgressCallback, PrinterCallback):  # they print every log as a dict among our tables
        if trainer.pop_callback(printing) and printing is ProgressCallback:
            trainer.add_callback(Bar)
    return trainer


def observe(trainer: SFTTrainer, encoder: Encoder, questions: Questions, folder: Path) -> Overfitting:
    """Lets the trainer evaluate as we measure, watch for overfitting, and ask a few questions on the way."""
    options, wanted = questions.options, trainer.args.metric_for_best_model
    own = comparison.own_metric(wanted)

    def measure() -> dict[str, float]:
        found = held_out.flat(comparison.held_out_losses(trainer.model, encoder, questions))
        if own or (wanted and wanted.removeprefix("eval_") in comparison.SCORES):
            said = comparison.ask(trainer.model, encoder, questions)
            found |= {key: value for key, value in scores(said).items() if key in comparison.SCORES}
            found |= {wanted: own(said)} if own else {}
        return found

    evaluate_with(trainer, measure)
    overfitting = Overfitting()
    trainer.add_callback(overfitting)
    if options.samples_every and questions.asked:
        some = replace(questions, asked=questions.asked[:SAMPLES])
        ask = partial(comparison.ask, trainer.model, encoder, some)
        trainer.add_callback(Samples(ask, options.samples_every, folder / "samples.jsonl"))
    return overfitting


def parity(ledger: dict[str, dict]) -> int:
    """In how many rows the prompt of training was compared with that of serving; a difference ends a run."""
    return sum(part["parity"] for part in ledger.values())


def evaluated_last(trainer: SFTTrainer) -> bool:
    """Whether the last step ended with an evaluation."""
    steps = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return steps[-1:] == [trainer.state.global_step]


def padding(rows: Dataset, arguments: SFTConfig) -> float:
    """The share of padding in what the model will read; packed rows need none."""
    if arguments.packing:
        return 0.0
    grouped = arguments.train_sampling_strategy == "group_by_length"
    batch, accumulated = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    share = padding_share(rows, batch, accumulated, grouped, arguments.seed)
    log.info("%.1f %% of what the model reads is padding; trainer.packing=true needs none.", 100 * share)
    return share


def announcement(trainer: SFTTrainer, ledger: dict[str, dict]) -> str:
    """What is about to be trained, in one line."""
    total = {key: sum(part[key] for part in ledger.values()) for key in ("kept", "tokens", "supervised_tokens")}
    found = f"{total['tokens']:,} tokens, {total['supervised_tokens']:,} of them supervised"
    if isinstance(trainer.train_dataset, IterableDataset):
        rows = f"streamed rows, the first {total['kept']:,} of which have {found}"
    else:
        packed_rows = f" in {len(trainer.train_dataset):,} packed ones" if trainer.args.packing else ""
        rows = f"{total['kept']:,} rows{packed_rows}, {found}"
    batch = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * trainer.args.world_size
    steps = trainer.args.max_steps
    if steps < 0:
        steps = math.ceil(len(trainer.train_dataset) / batch) * trainer.args.num_train_epochs
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return (
        f"Training {trainable(trainer.model):,} of {parameters:,} parameters on {rows}: "
        f"{steps:,.0f} steps of {batch} rows."
    )


def base(config: Config, tokenizer: PreTrainedTokenizerFast, encoder: Encoder, new: list[int]) -> PreTrainedModel:
    """The base model as it was before training, on the CPU and not quantized."""
    with torch.device("cpu"):
        return load_model(config.model, None, False, tokenizer, encoder.stop, new)


def smoke_line(metrics: dict[str, Any], answers: list[dict[str, Any]]) -> str:
    """The verdict of a +debug=smoke run; raises ConfigError where the loss does not fall or is not finite."""
    losses = [entry["loss"] for entry in metrics["history"] if "loss" in entry]
    if len(losses) < 2:
        raise ConfigError("Smoke test: too few steps to see the loss fall. Raise trainer.max_steps.")
    first, last = losses[0], sum(losses[-3:]) / len(losses[-3:])
    if not math.isfinite(last) or last >= first:
        raise ConfigError(f"Smoke test failed: the loss went from {first:.3f} to {last:.3f}.")
    example = answers[0]["tuned"] if answers else ""
    return (
        f"Smoke test passed: the loss fell from {first:.3f} to {last:.3f} in {metrics['steps']} steps, peak memory "
        f"{metrics['peak_memory_gib']:.1f} GiB" + (f", it answers {example[:60]!r}." if answers else ".")
    )
