"""The trainer, its evaluation and what is attached to it."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)
from transformers.trainer_utils import IntervalStrategy
from trl import SFTConfig, SFTTrainer

from sft_recipes.config.options import AdapterOptions
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.errors import ConfigError, one_line
from sft_recipes.evaluation.suite import (
    SCORES,
    EvalInputs,
    evaluate_held_out,
    generate_eval_answers,
    load_custom_metric,
)
from sft_recipes.evaluation.text_metrics import score_answers
from sft_recipes.evaluation.token_loss import flatten_loss
from sft_recipes.modeling.adapters import changes_base_weights
from sft_recipes.modeling.workarounds import cast_trainable_to_fp32, ensure_lm_head_bias
from sft_recipes.training.callbacks import OverfittingMonitor, QuietProgressBar, SampleAnswers


def mend(trainer: SFTTrainer, adapter: AdapterOptions) -> None:
    """What TRL and PEFT leave open, set right on the built trainer: precision, head, LoRA+ and what is saved."""
    model = trainer.model
    cast_trainable_to_fp32(model)
    if not isinstance(model, PeftModel):
        return
    ensure_lm_head_bias(model)
    # PEFT saves both embeddings whole when there are new rows; those are in the adapter already
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    if adapter.loraplus_lr_ratio is not None:
        trainer.create_optimizer = partial(loraplus, trainer, adapter.loraplus_lr_ratio)
    if changes_base_weights(model.active_peft_config):
        trainer.adapter_at_start = {key: value.cpu().clone() for key, value in get_peft_model_state_dict(model).items()}


def loraplus(trainer: SFTTrainer, ratio: float, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
    """The trainer's optimizer with so many times its learning rate on the B matrices (LoRA+, arXiv 2402.12354)."""
    if trainer.optimizer is None:
        optimizer, values = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        values |= {"loraplus_lr_ratio": ratio, "loraplus_weight_decay": trainer.args.weight_decay}
        trainer.optimizer = create_loraplus_optimizer(trainer.model, optimizer, **values)
    return trainer.optimizer


class NonFiniteLossError(ConfigError):
    """The loss became NaN or infinite: a learning rate too high, or a broken checkpoint."""


def watch(trainer: SFTTrainer) -> None:
    """Ends training at a loss that is not finite, naming the step; transformers would log 0.0 and carry on.

    Raises NotFinite (transformers: `logging_nan_inf_filter`).
    """
    compute_loss = trainer.compute_loss

    def watched(model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        loss = compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training and not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"The loss is {loss.item()} in step {trainer.state.global_step + 1}; no model is saved. Try a lower "
                "trainer.learning_rate, and check the base model with evaluate.raw_text."
            )
        return loss

    trainer.compute_loss = watched


def evaluate_with(trainer: SFTTrainer, measure: Callable[[], dict[str, float]]) -> None:
    """Makes the trainer's evaluation, at its steps and for its best checkpoint, what `measure` gives.

    TRL takes a batch's mean over its tokens and transformers the mean of those over rows, so that one model has another
    eval_loss at another batch size. Goes when TRL weighs its batches by their tokens
    (trl/trainer/sft_trainer.py: `compute_loss` in evaluation has no `num_items_in_batch`).
    """

    def evaluate(
        eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        start, training = time.monotonic(), trainer.model.training
        trainer.model.eval()  # by which TRL's log tells training from evaluation
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in measure().items()}
        trainer.log(metrics | {f"{metric_key_prefix}_runtime": round(time.monotonic() - start, 2)})
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        trainer.model.train(training)
        return metrics

    trainer.evaluate = evaluate


SAMPLE_QUESTIONS = 3  # questions that are asked while training goes on


def build_trainer(
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
            trainer.add_callback(QuietProgressBar)
    return trainer


def attach_callbacks(trainer: SFTTrainer, encoder: Encoder, questions: EvalInputs, folder: Path) -> OverfittingMonitor:
    """Lets the trainer evaluate as we measure, watch for overfitting, and ask a few questions on the way."""
    options, wanted = questions.options, trainer.args.metric_for_best_model
    own = load_custom_metric(wanted)

    def measure() -> dict[str, float]:
        found = flatten_loss(evaluate_held_out(trainer.model, encoder, questions))
        if own or (wanted and wanted.removeprefix("eval_") in SCORES):
            said = generate_eval_answers(trainer.model, encoder, questions)
            found |= {key: value for key, value in score_answers(said).items() if key in SCORES}
            found |= {wanted: own(said)} if own else {}
        return found

    evaluate_with(trainer, measure)
    overfitting = OverfittingMonitor()
    trainer.add_callback(overfitting)
    if options.samples_every and questions.asked:
        some = replace(questions, asked=questions.asked[:SAMPLE_QUESTIONS])
        ask = partial(generate_eval_answers, trainer.model, encoder, some)
        trainer.add_callback(SampleAnswers(ask, options.samples_every, folder / "samples.jsonl"))
    return overfitting
