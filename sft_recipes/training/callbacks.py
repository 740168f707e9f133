"""What is watched and printed while training goes on."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

log = logging.getLogger(__name__)
OVERFITTING_GAP, OVERFITTING_RISE = (
    0.3,
    0.01,
)  # nats between training and held-out loss; share above the best held-out loss
OVERFITTING_REMEDY = (
    "Try fewer trainer.num_train_epochs, a lower trainer.learning_rate, adapter=lora with dropout, or more rows."
)


class OverfittingMonitor(TrainerCallback):
    """Warns once when held-out loss leaves training loss behind, or rises from its best; `warnings` keeps the line."""

    def __init__(self):
        self.best, self.warnings = float("inf"), []

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict, **_: Any
    ) -> None:
        held_out = metrics.get("eval_loss")
        if held_out is None or self.warnings:
            return
        trained = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), held_out)
        said = ""
        if held_out > (1 + OVERFITTING_RISE) * self.best:
            said = f"is {held_out / self.best - 1:.1%} above its best, {self.best:.3f}"
        elif held_out - trained > OVERFITTING_GAP:
            said = f"is {held_out - trained:.2f} above the training loss, {trained:.3f}"
        self.best = min(self.best, held_out)
        if said:
            self.warnings.append(
                f"Overfitting? In step {state.global_step} held-out loss {held_out:.3f} {said}. {OVERFITTING_REMEDY}"
            )
            log.warning(self.warnings[0])


class SampleAnswers(TrainerCallback):
    """Asks the same held-out questions every so many steps, and appends the answers to samples.jsonl."""

    def __init__(self, ask: Callable[[], list[dict[str, Any]]], every: int, path: Path):
        self.ask, self.every, self.path = ask, every, path

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self.every:
            return
        said = self.ask()
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                for answer in said:
                    line = {"step": state.global_step} | answer
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
            log.info("step %d, asked %r, says %r", state.global_step, said[0]["prompt"][-60:], said[0]["text"][:60])


class QuietProgressBar(ProgressCallback):
    """transformers' progress bar, without its dicts."""

    def on_log(self, *_: Any, **__: Any) -> None:
        """Clock says it."""


class LossLogger(TrainerCallback):
    """Logs the losses and, once the first steps are done, how long the rest will take."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.start = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        first = min(20, max(2, state.max_steps // 20))
        if state.global_step == first < state.max_steps:
            left = (time.monotonic() - self.start) / first * (state.max_steps - first)
            log.info("%d of %d steps done; about %s left.", first, state.max_steps, format_duration(left))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **_: Any
    ) -> None:
        wanted = {"loss": ".4f", "eval_loss": ".4f", "learning_rate": ".2e", "grad_norm": ".2f"}
        said = [f"{key} {float(logs[key]):{form}}" for key, form in wanted.items() if key in (logs or {})]
        if said and state.is_world_process_zero:
            log.info("step %d of %d: %s", state.global_step, state.max_steps, ", ".join(said))


def format_duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> format_duration(75), format_duration(7300)
    ('1 min 15 s', '2 h 1 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
