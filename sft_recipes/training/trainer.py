"""TRL's trainer with an exact evaluation loss, a stop at a loss that is not finite, and trained weights in fp32."""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel, get_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import IntervalStrategy
from trl import SFTConfig, SFTTrainer

from sft_recipes.encoding.encoder import Encoder
from sft_recipes.errors import ConfigError, one_line
from sft_recipes.evaluation import suite
from sft_recipes.evaluation.text_metrics import score_answers
from sft_recipes.evaluation.token_loss import flatten_loss
from sft_recipes.modeling import workarounds
from sft_recipes.modeling.adapters import changes_base_weights
from sft_recipes.modeling.inference import eval_mode
from sft_recipes.modeling.packed_attention import (
    VARLEN,
    attention_choices,
    check_no_cross_document_attention,
    take_first_that_isolates,
)
from sft_recipes.training.callbacks import FiniteLossCheck, QuietProgressBar, SampleAnswers
from sft_recipes.training.memory import keeps_small_updates
from sft_recipes.training.resumable_trainer import ResumableTrainer
from sft_recipes.training.sharding import is_sharded

log = logging.getLogger(__name__)
Measure = Callable[[PreTrainedModel, Dataset], tuple[dict[str, Any], dict[str, float]]]
SAMPLE_QUESTIONS = 3  # held-out questions that are asked while training goes on


class SupervisedTrainer(ResumableTrainer):
    """`trl.SFTTrainer`, resumable, with documented hooks of `transformers.Trainer` overridden.

    `measure` gives the loss of the model on a dataset (`evaluation.token_loss`) and other metrics, by names without a
    prefix; None leaves evaluation to TRL.
    `loraplus_lr_ratio` is the learning rate of LoRA's B matrices over that of its A matrices.
    """

    def __init__(
        self, *arguments: Any, measure: Measure | None = None, loraplus_lr_ratio: float | None = None, **options: Any
    ):
        super().__init__(*arguments, **options)
        self.measure, self.loraplus_lr_ratio = measure, loraplus_lr_ratio
        self.last_held_out: tuple[int, dict[str, Any] | None] = -1, None  # of the last evaluation: step, and result
        # the adapter before training, where its initialization changed the base
        self.initial_adapter: dict[str, torch.Tensor] | None = None
        is_adapter = isinstance(self.model, PeftModel)
        if is_adapter or self.model.dtype != torch.bfloat16 or not keeps_small_updates(self.args):
            workarounds.cast_trainable_to_fp32(self.model)
        if is_adapter:
            workarounds.ensure_lm_head_bias(self.model)
            if changes_base_weights(self.model.active_peft_config):
                state = get_peft_model_state_dict(self.model)
                self.initial_adapter = {key: value.cpu().clone() for key, value in state.items()}
        self.loss_check = FiniteLossCheck()
        self.add_callback(self.loss_check)
        for printing in (ProgressCallback, PrinterCallback):  # they print every log as a dict between our lines
            if self.pop_callback(printing) and printing is ProgressCallback:
                self.add_callback(QuietProgressBar)

    def _prepare_for_training(self, *arguments: Any) -> tuple[torch.nn.Module, torch.utils.data.DataLoader]:
        """As transformers, which has accelerate shard the model here."""
        with workarounds.head_sharded_with_root(self.model) if self.accelerator.is_fsdp2 else nullcontext():
            return super()._prepare_for_training(*arguments)

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        """A micro-batch's loss, which is kept for the check that is made once a step."""
        loss = super().training_step(*arguments, **options)
        self.loss_check.add(loss)
        return loss

    def evaluate(
        self,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The metrics of the dataset that is given, else of the trainer's own; those of a dict under its names.

        TRL takes a batch's mean over its tokens and transformers the mean of those over rows, so that a model has
        another loss at another batch size (https://github.com/huggingface/transformers/issues/39241). `measure` takes
        the mean over tokens. The override goes when TRL does, in `compute_loss` without `num_items_in_batch`.
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = self.eval_dataset[rows] if isinstance(rows, str) else rows
        rows = Dataset.from_list(list(rows)) if isinstance(rows, IterableDataset) else rows
        if self.measure is None or not isinstance(rows, Dataset):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # which takes a dict one by one
        start = time.monotonic()
        held_out, scores = self.measure(self.model, rows)
        if rows is self.eval_dataset:
            self.last_held_out = self.state.global_step, held_out
        return self.report_evaluation(flatten_loss(held_out) | scores, metric_key_prefix, start)

    def held_out_now(self) -> dict[str, Any] | None:
        """What the last evaluation measured of the held-out rows, if the weights are still the same."""
        step, held_out = self.last_held_out
        return held_out if step == self.state.global_step and not self.args.load_best_model_at_end else None

    def report_evaluation(
        self, measured: Mapping[str, float], prefix: str = "eval", start: float | None = None
    ) -> dict[str, float]:
        """Logs what an evaluation measured since `start` and tells the callbacks; returns it with the prefix."""
        metrics = {f"{prefix}_{key}": value for key, value in measured.items()}
        seconds = 0.0 if start is None else round(time.monotonic() - start, 2)
        with eval_mode(self.model):  # by which TRL's log tells training from evaluation
            self.log(metrics | {f"{prefix}_runtime": seconds})
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer, with LoRA+ where its ratio is set (arXiv 2402.12354)."""
        if self.optimizer is not None:
            return self.optimizer
        workarounds.forget_optimizer_overrides()
        if self.loraplus_lr_ratio is None:
            return super().create_optimizer(model)
        model = self.model if model is None else model
        optimizer, values = self.get_optimizer_cls_and_kwargs(self.args, model)
        values |= {"loraplus_lr_ratio": self.loraplus_lr_ratio, "loraplus_weight_decay": self.args.weight_decay}
        self.optimizer = create_loraplus_optimizer(model, optimizer, **values)
        return self.optimizer

    def save_model(self, output_dir: str | None = None, *arguments: Any, **options: Any) -> None:
        """Saves weights or adapter and the tokenizer; an adapter without the base's embeddings and PEFT's card.

        The pickled arguments go again: nothing reads them, and what the environment gave stands in them.
        """
        with workarounds.save_adapter_only(self.model):
            super().save_model(output_dir, *arguments, **options)
        Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Writes none: TRL's names neither base nor data, and the report writes the run's own, in model/."""


def build_trainer(model: PreTrainedModel, arguments: SFTConfig, held_out: Dataset, **options: Any) -> SupervisedTrainer:
    """The trainer of a run, with the model on its device, and the options that SupervisedTrainer has.

    Raises ConfigError for what TRL or PEFT refuse.
    """
    if not len(held_out):
        arguments.eval_strategy, arguments.eval_on_start = IntervalStrategy.NO, False
    try:
        trainer = SupervisedTrainer(model, arguments, eval_dataset=held_out if len(held_out) else None, **options)
    except (ValueError, TypeError) as error:  # PEFT computes with fields that are missing
        raise ConfigError(f"trainer or adapter: {one_line(error)}") from error
    if is_sharded(arguments) and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ConfigError("FSDP and DeepSpeed shard a model over GPUs, and there are none. Leave trainer=fsdp out.")
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if isinstance(trainer.model, PeftModel) and getattr(plugin, "activation_checkpointing", False):
        raise ConfigError(
            "PEFT finds no adapter behind FSDP's activation checkpointing and would save none. Start without "
            "--fsdp_activation_checkpointing, and write trainer.activation_checkpointing=true."
        )
    return trainer


def select_attention(trainer: SFTTrainer, chosen: str | None, is_placed: bool = False) -> None:
    """Sets the attention for packed rows unless the user has `chosen` one, and checks that it keeps documents apart.

    Where torch's flash attention can be had, padded rows are put side by side for it, so that none is padded. Only the
    trainer moves the model to its device, so this comes after it is built; a model that is sharded (FSDP, DeepSpeed) is
    moved when training starts, and its attention is chosen then.
    """
    model, arguments = trainer.model, trainer.args
    if not is_placed and (model.device.type != arguments.device.type or is_deepspeed_zero3_enabled()):
        trainer.start_actions.append(partial(select_attention, trainer, chosen, is_placed=True))
        return
    if chosen:
        if trainer.padding_free:
            check_no_cross_document_attention(model)
        return
    half = (arguments.bf16 or arguments.fp16) and arguments.n_gpu < 2  # nn.DataParallel would part the boundaries
    names = attention_choices(model, arguments.device, half)
    if trainer.padding_free:
        take_first_that_isolates(model, names)
    elif isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return  # every row begins with tokens of the adapter's own
    elif arguments.neftune_noise_alpha:
        return  # whose noise is the weaker the longer a row
    elif names[0] == VARLEN and take_first_that_isolates(model, [VARLEN, names[-1]], last_is_checked=False) == VARLEN:
        trainer.padding_free = trainer.data_collator.padding_free = True
        log.info("The rows of a batch stand side by side, so that none is padded.")


def measure_held_out(
    encoder: Encoder, questions: suite.EvalInputs, best_metric: str | None, model: PreTrainedModel, rows: Dataset
) -> tuple[dict[str, Any], dict[str, float]]:
    """The loss on `rows` with its parts, and on the held-out rows the answers' scores where `best_metric` is one."""
    held_out, custom = suite.evaluate_held_out(model, encoder, questions, rows), suite.load_custom_metric(best_metric)
    is_score = custom or (best_metric or "").removeprefix("eval_") in suite.SCORES
    if not is_score or rows is not questions.data.held_out:
        return held_out, {}
    answers = suite.generate_eval_answers(model, encoder, questions)
    scores = {key: value for key, value in score_answers(answers).items() if key in suite.SCORES}
    return held_out, scores | ({best_metric: custom(answers)} if custom else {})


def add_sample_answers(trainer: SFTTrainer, encoder: Encoder, questions: suite.EvalInputs, path: Path) -> None:
    """Lets the model answer a few held-out questions every `evaluate.samples_every` steps, where that is set."""
    if questions.options.samples_every and questions.asked:
        some = replace(questions, asked=questions.asked[:SAMPLE_QUESTIONS])
        ask = partial(suite.generate_eval_answers, trainer.model, encoder, some)
        trainer.add_callback(SampleAnswers(ask, questions.options.samples_every, path))
