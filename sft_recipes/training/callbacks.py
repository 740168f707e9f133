"""Callbacks of a run: the checks and logs that it makes while it trains, and the user's own."""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from inspect import isclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments

from sft_recipes.config.validation import import_function
from sft_recipes.errors import ConfigError, one_line
from sft_recipes.reporting.run_folder import replace_file
from sft_recipes.reporting.text import format_duration
from sft_recipes.training.checkpoints import last_checkpoint_line

log = logging.getLogger(__name__)
SMALL = 0.01  # a loss has not risen, or moved, when it changed by less than this share


class FiniteLossCheck(TrainerCallback):
    """Ends training at a loss that is not finite, and names the step; transformers would go on.

    The losses of a step's micro-batches are added up on their device and looked at once, before the weights change,
    since every look waits for the GPU.
    """

    def __init__(self):
        self.step_loss: torch.Tensor | float = 0.0

    def add(self, loss: torch.Tensor) -> None:
        """Adds a micro-batch's loss to the step's; NaN and infinity stay in a sum."""
        self.step_loss = self.step_loss + loss.detach()

    def on_pre_optimizer_step(self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        step_loss, self.step_loss = float(self.step_loss), 0.0
        if not math.isfinite(step_loss):
            raise ConfigError(
                f"The loss is {step_loss} in step {state.global_step + 1}; no model is saved. Try a lower "
                "trainer.learning_rate, and check the base model with evaluate.raw_text."
                f"{last_checkpoint_line(Path(args.output_dir))}"
            )


class AtTrainBegin(TrainerCallback):
    """Does what has to wait until training starts, which is when a sharded model is placed."""

    def __init__(self, actions: list[Callable[[], None]]):
        self.actions = actions

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        for action in self.actions:
            action()


class StopAtShare(TrainerCallback):
    """Ends training with a checkpoint after a share of all steps, on the whole run's schedule."""

    def __init__(self, share: float):
        self.share, self.stopped = share, False

    def on_step_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.stopped = math.ceil(self.share * state.max_steps) <= state.global_step < state.max_steps
        if self.stopped:
            control.should_save = control.should_training_stop = True


class LossMonitor(TrainerCallback):
    """Warns once, of overfitting or of a learning rate that is too high or too low; `warnings` keeps the line.

    Training and held-out loss are not compared with each other: the training loss may count raw text or be weighted
    (`loss_type=dft`), and is a mean over few rows. Each is compared with its own past.
    """

    def __init__(self, initial: float | None = None):
        self.initial, self.warnings = initial, []  # the held-out loss before training

    def on_evaluate(self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self.warnings:
            self.warnings = find_warning(state.log_history, self.initial, state.max_steps)
            for line in self.warnings:
                log.warning(line)

    on_train_begin = on_evaluate  # of a run that is resumed


def find_warning(history: Sequence[Mapping[str, float]], initial: float | None, max_steps: int) -> list[str]:
    """A line on the first evaluation in the history of logs that shows that training goes wrong; else none.

    That is a held-out loss above its lowest value, that before training (`initial`) included, or half of all steps that
    have moved neither loss.
    """
    lowest, lowest_step = math.inf if initial is None else initial, 0
    losses: list[float] = []
    for entry in history:
        if "loss" in entry:
            losses.append(entry["loss"])
        if (held_out := entry.get("eval_loss")) is None:
            continue
        step, half = entry["step"], len(losses) // 2
        if held_out > (1 + SMALL) * lowest:
            since = f"in step {lowest_step}" if lowest_step else "before training"
            return [
                f"In step {step} the held-out loss is {held_out:.3f}, {held_out / lowest - 1:.1%} above {lowest:.3f} "
                f"{since}: overfitting where the training loss goes on falling, else a rate that is too high. "
                "Try fewer trainer.num_train_epochs, a lower trainer.learning_rate, adapter=lora with dropout, or more "
                "rows."
            ]
        flat = initial and abs(held_out / initial - 1) < SMALL and 2 * step >= max_steps
        if flat and half and math.isclose(fmean(losses[:half]), fmean(losses[-half:]), rel_tol=SMALL):
            return [
                f"In step {step} the held-out loss is {held_out:.3f} and was {initial:.3f} before training; the "
                "training loss has not moved either, so the model learns nothing. Try a higher trainer.learning_rate "
                "or more steps."
            ]
        if held_out < lowest:
            lowest, lowest_step = held_out, step
    return []


class SampleAnswers(TrainerCallback):
    """Lets the model answer the same held-out questions every so many steps, and appends the answers to a file."""

    def __init__(self, ask: Callable[[], list[dict[str, Any]]], every: int, path: Path):
        self.ask, self.every, self.path = ask, every, path

    def on_train_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero and self.path.is_file():  # what a run wrote after the step it is resumed from
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state.global_step]
            replace_file(self.path, "".join(kept))

    def on_step_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self.every:
            return
        answers = self.ask()
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                for answer in answers:
                    line = {"step": state.global_step} | answer
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
            first = answers[0]
            log.info("Step %d, question %r, answer %r", state.global_step, first["prompt"][-60:], first["text"][:60])


class QuietProgressBar(ProgressCallback):
    """transformers' progress bar without the logs that it prints as dicts; LossLogger logs them."""

    def on_log(self, *_: Any, **__: Any) -> None:
        pass


class LossLogger(TrainerCallback):
    """Logs the losses and, after the first twentieth of the steps, how long the rest takes; a file has no bar."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.monotonic()

    def on_step_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        first = min(20, max(2, state.max_steps // 20))
        if state.global_step == first < state.max_steps:
            left = (time.monotonic() - self.start) / first * (state.max_steps - first)
            log.info("%d of %d steps done; about %s left.", first, state.max_steps, format_duration(left))

    def on_log(
        self, args: Arguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **_: Any
    ) -> None:
        formats = {"loss": ".4f", "eval_loss": ".4f", "learning_rate": ".2e", "grad_norm": ".2f"}
        parts = [f"{key} {float(logs[key]):{form}}" for key, form in formats.items() if key in (logs or {})]
        if parts and state.is_world_process_zero:
            log.info("step %d of %d: %s", state.global_step, state.max_steps, ", ".join(parts))


def load_callbacks(listed: Sequence[str | dict[str, Any]]) -> list[TrainerCallback]:
    """The user's own callbacks, each a `module.Class` or `{name: module.Class, option: value}`.

    Raises ConfigError for what cannot be imported, is no `transformers.TrainerCallback` or takes other options.
    """
    callbacks = []
    for options in ({"name": item} if isinstance(item, str) else dict(item) for item in listed):
        name = str(options.pop("name", None))
        callback = import_function("callbacks", name)
        if not (isclass(callback) and issubclass(callback, TrainerCallback)):
            raise ConfigError(f"callbacks={name} is not a class that inherits from transformers.TrainerCallback.")
        try:
            callbacks.append(callback(**options))
        except TypeError as error:
            written = f"callbacks='[{{name: {name}, OPTION: VALUE}}]'"
            raise ConfigError(f"callbacks={name}: {one_line(error)}. Options are written as {written}.") from error
    return callbacks
