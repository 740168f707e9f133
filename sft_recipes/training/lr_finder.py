"""A learning rate to start from, found in a hundred steps: `python -m sft_recipes +recipe=lima +sweep=lr_find`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.optim.lr_scheduler import LambdaLR
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy
from trl import SFTTrainer

from sft_recipes.config.options import LRRange
from sft_recipes.errors import ConfigError
from sft_recipes.reporting.figures import COLOURS, draw_legend, save_figure, styled_subplots
from sft_recipes.reporting.run_folder import write_json
from sft_recipes.training.callbacks import FiniteLossCheck, LossLogger

if TYPE_CHECKING:
    from matplotlib.figure import Figure
SMOOTHING_STEPS = 3  # standard deviation, in steps, of the Gaussian that smooths the losses


@dataclass(frozen=True)
class LRSuggestion:
    """The rates where the smoothed loss falls fastest and where it diverges, and the rate to try."""

    steepest: float
    diverges: float | None  # None where it does not within the range
    rate: float
    clear: bool  # whether the smoothed loss fell by more than 1.5 standard deviations of the losses around it

    def lines(self) -> list[str]:
        """The suggestion in sentences."""
        end = "does not diverge in this range" if self.diverges is None else f"diverges at {self.diverges:.2g}"
        lower = "" if self.diverges is None else ", the lower of the first and a tenth of the second"
        guess = (
            "" if self.clear else " It hardly falls, so this is a guess: use more trainer.max_steps or larger batches."
        )
        return [
            f"The smoothed loss falls fastest at a learning rate of {self.steepest:.2g}, and {end}.{guess}",
            f"Try trainer.learning_rate={self.rate:.2g}{lower}, and half and twice of it.",
        ]


class StopAtDivergence(TrainerCallback):
    """Ends training when the loss is NaN, infinite, or three times as high as at the first step."""

    first: float | None = None

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **_: Any
    ) -> None:
        if "loss" in (logs or {}):
            self.first = self.first or logs["loss"]
            control.should_training_stop |= not logs["loss"] <= 3 * self.first  # NaN compares false


def run_lr_range_test(trainer: SFTTrainer, limits: LRRange, folder: Path) -> float:
    """The rate to try, from a short training whose rate grows by one factor every step (Smith, arXiv 1506.01186).

    Writes lr_find.json and lr_find.png. The model is trained by it and should not be used any further.
    """
    if trainer.args.max_steps < 10:
        raise ConfigError(f"trainer.max_steps={trainer.args.max_steps} is too short for a range test. Write 100.")
    trainer.args.save_strategy = SaveStrategy.NO
    factor = (limits.end / limits.start) ** (1 / (trainer.args.max_steps - 1))
    trainer.create_optimizer()
    first = limits.start / trainer.args.learning_rate
    trainer.lr_scheduler = LambdaLR(trainer.optimizer, lambda step: first * factor**step)
    trainer.add_callback(StopAtDivergence)
    trainer.pop_callback(FiniteLossCheck)  # a loss that is not finite ends the test, not the run
    trainer.pop_callback(LossLogger)  # it would log every step
    with logging_redirect_tqdm():
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    rates = [entry["learning_rate"] for entry in history][:-1]
    losses = [entry["loss"] for entry in history][1:]  # the effect of a step's rate is in the next step's loss
    suggestion = suggest_rate(rates, losses)
    if trainer.is_world_process_zero():
        values = {"learning_rate": rates, "loss": losses, "steepest": suggestion.steepest}
        write_json(folder / "lr_find.json", values | {"diverges": suggestion.diverges, "suggested": suggestion.rate})
        save_figure(plot_range_test(rates, losses, suggestion), folder / "lr_find.png")
        print("\n".join([*suggestion.lines(), f"The plot: {folder}/lr_find.png"]))
    return suggestion.rate


def suggest_rate(rates: Sequence[float], losses: Sequence[float]) -> LRSuggestion:
    """The rate where the smoothed loss falls fastest, or a tenth of the rate where it diverges if that is lower."""
    loss = smooth_losses(losses)
    lowest = int(np.argmin(loss))
    slopes = np.gradient(loss, np.log(rates[: len(loss)]))
    steepest = rates[int(np.argmin(slopes[: lowest + 1]))]
    above = [place for place in range(lowest, len(loss)) if loss[place] > loss[0]]
    above += range(len(loss), len(losses))  # from the first loss that is not finite
    if losses[len(loss) - 1] > 1.5 * loss[0]:
        above.append(len(loss) - 1)  # a rise in the last step, which smoothing hides
    diverges = rates[above[0]] if above else None
    noise = np.std(losses[: lowest + 1] - loss[: lowest + 1])
    clear = bool(loss[0] - loss[lowest] > 1.5 * noise)
    return LRSuggestion(steepest, diverges, min(steepest, (diverges or math.inf) / 10), clear)


def smooth_losses(losses: Sequence[float]) -> np.ndarray:
    """The losses before the first that is not finite, each the mean of those around it, weighted by a Gaussian.

    A mean over past steps only would lag behind and give rates that are too high.
    """
    finite = list(takewhile(math.isfinite, losses))
    if len(finite) < 3:
        raise ConfigError("lr_find: the loss is not finite after a few steps. Lower lr_find.start.")
    places = np.arange(len(finite))
    weights = np.exp(-((places[:, None] - places) ** 2) / (2 * SMOOTHING_STEPS**2))
    return weights @ finite / weights.sum(1)


def plot_range_test(rates: Sequence[float], losses: Sequence[float], suggestion: LRSuggestion) -> "Figure":
    """The losses and their smoothed line over the learning rate, with the rates that the suggestion is based on."""
    figure, axes = styled_subplots(height=3.4)
    loss = smooth_losses(losses)
    axes.plot(rates, losses, ".", color=COLOURS["faint"], label="a step's loss")
    axes.plot(rates[: len(loss)], loss, color=COLOURS["blue"], label="smoothed")
    axes.axvline(suggestion.steepest, color=COLOURS["green"], label=f"falls fastest, {suggestion.steepest:.2g}")
    if suggestion.diverges:
        axes.axvline(suggestion.diverges, color=COLOURS["orange"], label=f"diverges, {suggestion.diverges:.2g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss (nats a token)")
    draw_legend(axes, fontsize=8)
    return figure
