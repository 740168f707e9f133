"""What is watched while training goes on: overfitting, and what the model says to a few questions."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

log = logging.getLogger(__name__)
GAP, RISE = 0.3, 0.01  # nats between training and held-out loss; share above the best held-out loss
REMEDY = "Try fewer trainer.num_train_epochs, a lower trainer.learning_rate, adapter=lora with dropout, or more rows."


class Overfitting(TrainerCallback):
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
        if held_out > (1 + RISE) * self.best:
            said = f"is {held_out / self.best - 1:.1%} above its best, {self.best:.3f}"
        elif held_out - trained > GAP:
            said = f"is {held_out - trained:.2f} above the training loss, {trained:.3f}"
        self.best = min(self.best, held_out)
        if said:
            self.warnings.append(
                f"Overfitting? In step {state.global_step} held-out loss {held_out:.3f} {said}. {REMEDY}"
            )
            log.warning(self.warnings[0])


class Samples(TrainerCallback):
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
