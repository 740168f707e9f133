"""What a person sees while training goes on: a bar, the losses, the time that is left."""

import logging
import time
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

log = logging.getLogger(__name__)


class Bar(ProgressCallback):
    """transformers' progress bar, without its dicts."""

    def on_log(self, *_: Any, **__: Any) -> None:
        """Clock says it."""


class Clock(TrainerCallback):
    """Logs the losses and, once the first steps are done, how long the rest will take."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.start = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        first = min(20, max(2, state.max_steps // 20))
        if state.global_step == first < state.max_steps:
            left = (time.monotonic() - self.start) / first * (state.max_steps - first)
            log.info("%d of %d steps done; about %s left.", first, state.max_steps, duration(left))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **_: Any
    ) -> None:
        wanted = {"loss": ".4f", "eval_loss": ".4f", "learning_rate": ".2e", "grad_norm": ".2f"}
        said = [f"{key} {float(logs[key]):{form}}" for key, form in wanted.items() if key in (logs or {})]
        if said and state.is_world_process_zero:
            log.info("step %d of %d: %s", state.global_step, state.max_steps, ", ".join(said))


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> duration(75), duration(7300)
    ('1 min 15 s', '2 h 1 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
