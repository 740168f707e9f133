"""One run: data and model from the config, `trl.SFTTrainer` as it is, and what came of it: `python -m sft_recipes`."""

import json
import logging
import math
import resource
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
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
from trl import SFTConfig, SFTTrainer

from sft_recipes import evaluate, report
from sft_recipes.adapters import fit, mend, peft_config, quantization_config
from sft_recipes.arguments import objective, trainer_arguments
from sft_recipes.attention import isolate
from sft_recipes.binding import ConfigError, call, one_line
from sft_recipes.config import Config
from sft_recipes.data import load
from sft_recipes.digest import record
from sft_recipes.encoding import Encoder
from sft_recipes.loss import watch
from sft_recipes.model import load_model, load_tokenizer
from sft_recipes.progress import Bar
from sft_recipes.rows import packed, padding_share, with_lengths
from sft_recipes.runs import push, save

log = logging.getLogger(__name__)


def main(config: Config) -> float:
    """Trains, writes the run folder, and gives back the objective."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    arguments, callbacks = trainer_arguments(config, folder)
    asking = call(evaluate.Options, config.evaluate, "evaluate")
    objective(config.objective, held_out=True, asked=True, raw_text=True)
    peft, quantization = peft_config(config.adapter), quantization_config(config.adapter)
    tokenizer, template, new = call(load_tokenizer, config.model, "model")
    encoder = Encoder(tokenizer, template)
    data = load(config, encoder, arguments.max_length)
    asked = asking.rows > 0 and any(evaluate.answerable(question["messages"]) for question in data.questions)
    goal = objective(config.objective, len(data.held_out) > 0, asked, asking.raw_text is not None)
    rows = packed(data.train, arguments.max_length, config.seed) if arguments.packing else with_lengths(data.train)
    supervision = record(data.ledger, rows, asdict(config)) | {"padding": padding(rows, arguments)}
    print("\n".join(report.ledger_table(data.ledger)))
    model = load_model(config.model, quantization, peft is not None, tokenizer, encoder.stop, new)
    if arguments.packing:
        isolate(model, config.model.get("attn_implementation"))
    peft = fit(peft, model, new, config.model.get("revision"))
    trainer = build(model, arguments, rows, data.held_out, tokenizer, peft, callbacks)
    mend(trainer, config.adapter)
    log.info(announcement(trainer, data.ledger))
    before = evaluate.measure(trainer.model, encoder, data.questions, asking)
    with logging_redirect_tqdm():
        result = trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    held_out = trainer.evaluate() if len(data.held_out) else {}
    after = evaluate.measure(trainer.model, encoder, data.questions, asking)
    answers = [old | {"base": old["text"], "tuned": new["text"]} for old, new in both(before, after)]
    metrics = {"train_loss": result.training_loss, "steps": result.global_step} | held_out | after
    metrics |= {"before": before, "after": after, "trainable_parameters": trainable(trainer.model)}
    metrics |= {"train_seconds": result.metrics["train_runtime"], "peak_memory_gib": peak_memory()}
    metrics |= {"history": trainer.state.log_history}
    if trainer.is_world_process_zero():
        save(trainer, folder / "model", encoder)
        write(folder, metrics, answers, supervision)
        print(report.write(folder))
        if config.trainer.get("push_to_hub"):
            log.info("Pushed to %s.", push(folder / "model", config.name, arguments))
    if config.smoke:
        log.info(smoke_line(metrics, answers))
    return metrics[goal]


def build(
    model: PreTrainedModel,
    arguments: SFTConfig,
    rows: Dataset,
    held_out: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    peft: PeftConfig | None,
    callbacks: list[TrainerCallback],
) -> SFTTrainer:
    """TRL's trainer as it is, with what it and PEFT leave open mended on the built object."""
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
    rows = f"{total['kept']:,} rows" + (
        f" in {len(trainer.train_dataset):,} packed ones" if trainer.args.packing else ""
    )
    batch = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * trainer.args.world_size
    steps = trainer.args.max_steps
    if steps < 0:
        steps = math.ceil(len(trainer.train_dataset) / batch) * trainer.args.num_train_epochs
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return (
        f"Training {trainable(trainer.model):,} of {parameters:,} parameters on {rows}, {total['tokens']:,} tokens, "
        f"{total['supervised_tokens']:,} of them supervised: {steps:,.0f} steps of {batch} rows."
    )


def trainable(model: torch.nn.Module) -> int:
    """The number of parameters that training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def peak_memory() -> float:
    """The most memory the run has held so far, in GiB: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def both(before: dict[str, Any], after: dict[str, Any]) -> zip:
    """The base model's and the tuned model's answers, side by side; they leave the two measurements."""
    return zip(before.pop("answers", []), after.pop("answers", []), strict=True)


def write(folder: Path, metrics: dict[str, Any], answers: list[dict[str, Any]], supervision: dict[str, Any]) -> None:
    """Writes metrics.json, supervision.json and answers.jsonl, from which every table can be made again."""
    for name, values in (("metrics", metrics), ("supervision", supervision)):
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    lines = (json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    (folder / "answers.jsonl").write_text("".join(lines), encoding="utf-8")


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
