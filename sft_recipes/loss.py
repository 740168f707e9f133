"""The trainer's loss, exact where it evaluates and watched where it trains."""

import time
from collections.abc import Callable
from typing import Any

import torch
from trl import SFTTrainer

from sft_recipes.binding import ConfigError


class NotFinite(ConfigError):
    """The loss became NaN or infinite: a learning rate too high, or a broken checkpoint."""


def watch(trainer: SFTTrainer) -> None:
    """Ends training at a loss that is not finite, naming the step; transformers would log 0.0 and carry on.

    Raises NotFinite (transformers: `logging_nan_inf_filter`).
    """
    compute_loss = trainer.compute_loss

    def watched(model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        loss = compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training and not torch.isfinite(loss):
            raise NotFinite(
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
