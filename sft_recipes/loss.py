"""The trainer's loss, exact where it evaluates and watched where it trains."""

from typing import Any

import torch
from trl import SFTTrainer

from sft_recipes.binding import ConfigError
from sft_recipes.rows import predicted_tokens


class NotFinite(ConfigError):
    """The loss became NaN or infinite: a learning rate too high, or a broken checkpoint."""


def watch(trainer: SFTTrainer) -> None:
    """Makes `eval_loss` the mean over all supervised tokens, and ends training at a loss that is not finite.

    TRL takes a batch's mean over its tokens and transformers the mean of those over rows, so that one model has another
    eval_loss at another batch size. With each batch's sum divided by its rows times the supervised tokens of an average
    row, that mean over rows is the mean over tokens. Goes when TRL weighs its batches by their tokens
    (trl/trainer/sft_trainer.py: `compute_loss` in evaluation has no `num_items_in_batch`).
    Raises NotFinite, naming the step; transformers would log 0.0 and carry on (`logging_nan_inf_filter`).
    """
    compute_loss = trainer.compute_loss
    ranks = trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1
    rows = trainer.eval_dataset
    average = predicted_tokens(rows) / len(rows) if rows is not None else 1.0

    def watched(model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        if not model.training:
            documents = len(inputs["cu_seq_lens_q"]) - 1 if "cu_seq_lens_q" in inputs else len(inputs["input_ids"])
            return compute_loss(model, inputs, return_outputs, documents * average * ranks)
        loss = compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise NotFinite(
                f"The loss is {loss.item()} in step {trainer.state.global_step + 1}; no model is saved. Try a lower "
                "trainer.learning_rate, and check the base model with evaluate.raw_text."
            )
        return loss

    trainer.compute_loss = watched
