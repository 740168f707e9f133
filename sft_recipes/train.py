"""One run: data and model from the config, `trl.SFTTrainer` as it is, and what came of it: `python -m sft_recipes`."""

import inspect
import json
import logging
import math
import resource
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.integrations import get_available_reporting_integrations
from trl import SFTConfig, SFTTrainer

from sft_recipes import evaluate, report
from sft_recipes.attention import isolate
from sft_recipes.binding import ConfigError, call, unknown
from sft_recipes.config import Config
from sft_recipes.data import load
from sft_recipes.encoding import Encoder
from sft_recipes.loss import watch
from sft_recipes.model import load_model, load_tokenizer, peft_config, train_new_tokens
from sft_recipes.rows import packed, padding_share, with_lengths
from sft_recipes.supervision import record

log = logging.getLogger(__name__)


def main(config: Config, composed: DictConfig) -> float:
    """Trains, writes the run folder, and gives back the objective."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    arguments, callbacks = trainer_arguments(config, folder)
    asking = call(evaluate.Options, config.evaluate, "evaluate")
    peft = peft_config(config.adapter)
    tokenizer, template, new = call(load_tokenizer, config.model, "model")
    encoder = Encoder(tokenizer, template)
    if arguments.packing and arguments.max_length is None:
        raise ConfigError("trainer.packing needs trainer.max_length, the length of a packed row.")
    data = load(config, encoder, arguments.max_length)
    goal = objective(
        config.objective, bool(len(data.held_out)), bool(data.questions and asking.rows), bool(asking.raw_text)
    )
    rows = packed(data.train, arguments.max_length, config.seed) if arguments.packing else with_lengths(data.train)
    supervision = record(data.ledger, rows, asdict(config)) | {"padding": padding(rows, arguments)}
    print("\n".join(report.ledger_table(data.ledger)))
    model = load_model(config.model, config.adapter, tokenizer, encoder.stop, new)
    if arguments.packing:
        isolate(model, config.model.get("attn_implementation"))
    if peft:
        train_new_tokens(peft, model, new)
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=data.held_out if len(data.held_out) else None,
        processing_class=tokenizer,
        peft_config=peft,
        callbacks=callbacks,
    )
    keep_in_fp32(trainer.model)
    give_head_a_bias(trainer.model)
    watch(trainer)
    log.info(announcement(trainer, data.ledger))
    before = evaluate.measure(trainer.model, encoder, data.questions, asking)
    result = trainer.train()
    metrics = {"train_loss": result.training_loss, "steps": result.global_step}
    if len(data.held_out):
        metrics |= trainer.evaluate()
    after = evaluate.measure(trainer.model, encoder, data.questions, asking)
    answers = [old | {"base": old["text"], "tuned": new["text"]} for old, new in both(before, after)]
    metrics |= after | {"before": before, "after": dict(after)}
    metrics |= {"trainable_parameters": trainable(trainer.model), "train_seconds": result.metrics["train_runtime"]}
    metrics |= {"peak_memory_gib": peak_memory(), "history": trainer.state.log_history}
    if trainer.is_world_process_zero():
        save(trainer, folder / "model")
        write(folder, metrics, answers, supervision)
        print(report.write(folder))
    if config.smoke:
        log.info(smoke_line(metrics, answers))
    return metrics[goal]


def padding(rows: Dataset, arguments: SFTConfig) -> float:
    """The share of padding in what the model will read; packed rows need none."""
    if arguments.packing:
        return 0.0
    grouped = arguments.train_sampling_strategy == "group_by_length"
    batch, accumulated = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    share = padding_share(rows, batch, accumulated, grouped, arguments.seed)
    log.info("%.1f %% of what the model reads is padding; trainer.packing=true needs none.", 100 * share)
    return share


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
        log.info(
            "Computing in %s, as this machine's hardware has it; trained weights are fp32.",
            "bf16" if values["bf16"] else "fp32",
        )
    check_trackers(values.get("report_to"))
    own = {"output_dir": str(folder), "seed": config.seed, "dataset_kwargs": {"skip_prepare_dataset": True}}
    for key in own:
        if key in values:
            raise ConfigError(unknown(f"trainer.{key}", key, [], "a recipe") + " It is set by the run itself.")
    return call(SFTConfig, values | own, "trainer"), callbacks


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


def keep_in_fp32(model: torch.nn.Module) -> None:
    """Trained weights as fp32: TRL casts QLoRA adapters to bf16, where small updates are rounded away.

    Goes when TRL leaves them alone: SFTTrainer.__init__, "PEFT adapter weights are converted to bf16".
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def give_head_a_bias(model: torch.nn.Module) -> None:
    """No bias, said aloud: TRL's fused LM head reads `lm_head.bias`, which PEFT's TrainableTokensWrapper does not know.

    Goes when PEFT passes `bias` on to the wrapped layer: peft/utils/other.py, TrainableTokensWrapper._hasattr_wrapped.
    """
    head = model.get_output_embeddings()
    if not hasattr(head, "bias"):
        head.bias = None


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


class Clock(TrainerCallback):
    """Says once, when the first steps are done, how long the rest will take."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        first = min(20, max(2, state.max_steps // 20))
        if state.global_step == first < state.max_steps:
            left = (time.monotonic() - self.start) / first * (state.max_steps - first)
            log.info("%d of %d steps done; about %s left.", first, state.max_steps, duration(left))


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> duration(75), duration(7300)
    ('1 min 15 s', '2 h 1 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )


def peak_memory() -> float:
    """The most memory the run has held so far, in GiB: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def both(before: dict[str, Any], after: dict[str, Any]) -> zip:
    """The base model's and the tuned model's answers, side by side; they leave the two measurements."""
    return zip(before.pop("answers", []), after.pop("answers", []), strict=True)


def save(trainer: SFTTrainer, folder: Path) -> None:
    """Writes weights or adapter, the tokenizer with its template, and the generation config with the stop token."""
    trainer.save_model(str(folder))
    trainer.model.generation_config.save_pretrained(folder)


def write(folder: Path, metrics: dict[str, Any], answers: list[dict[str, Any]], supervision: dict[str, Any]) -> None:
    """Writes metrics.json, supervision.json and answers.jsonl, from which every table can be made again."""
    for name, values in (("metrics", metrics), ("supervision", supervision)):
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    lines = (json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    (folder / "answers.jsonl").write_text("".join(lines), encoding="utf-8")


def smoke_line(metrics: dict[str, Any], answers: list[dict[str, Any]]) -> str:
    """The verdict of a +debug=smoke run; raises RuntimeError where the loss does not fall or is not finite."""
    losses = [entry["loss"] for entry in metrics["history"] if "loss" in entry]
    first, last = losses[0], sum(losses[-3:]) / len(losses[-3:])
    if not math.isfinite(last) or last >= first:
        raise RuntimeError(f"Smoke test failed: the loss went from {first:.3f} to {last:.3f}.")
    example = answers[0]["tuned"] if answers else ""
    return (
        f"Smoke test passed: the loss fell from {first:.3f} to {last:.3f} in {metrics['steps']} steps, peak memory "
        f"{metrics['peak_memory_gib']:.1f} GiB" + (f", it answers {example[:60]!r}." if answers else ".")
    )
