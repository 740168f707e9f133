"""A signal ends a run with a checkpoint, from which it can go on."""

import logging
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments

from sft_recipes.errors import RunInterrupted

log = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class StopOnSignal(TrainerCallback):
    """Ends training with a checkpoint after SIGTERM, SIGHUP or Ctrl-C, as soon as the step in hand is done.

    A second signal has the effect that it would have without us. A save that falls on an epoch's last step is put off
    until the epoch has been evaluated, or the resumed run would lack that evaluation.
    """

    def __init__(self, processes: int = 1):
        self.processes, self.received, self.save_is_due = processes, 0, False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals while training goes on; in a thread of a notebook's there are none to take.

        One that is ignored stays so: SIGHUP under nohup, SIGINT in a shell's background.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        taken = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        if callable(signal.getsignal(signal.SIGUSR2)):  # submitit's: a job that is preempted, or whose time is over
            taken.append(signal.SIGUSR2)
        self.before = {number: signal.signal(number, self.take) for number in taken}
        try:
            yield
        finally:
            self.restore()

    def take(self, number: int, _: Any) -> None:
        """Remembers the signal, and leaves the next one to the handler that was there before."""
        self.received = number
        self.restore()

    def restore(self) -> None:
        """Puts the earlier handlers back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def was_signalled(self) -> bool:
        """Whether any process of the run has had a signal: all have to save in the same step."""
        if self.processes > 1:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            highest = torch.tensor(self.received, device=device)
            torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
            self.received = int(highest)
        return bool(self.received)

    def on_step_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        due = self.was_signalled() or control.should_save
        ends = control.should_training_stop or float(state.epoch).is_integer()  # on_epoch_end comes next
        control.should_save, self.save_is_due = due and not ends, due and ends

    def on_epoch_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_save |= self.save_is_due or self.was_signalled()
        self.save_is_due = False

    def on_save(self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.received:
            line = (
                f"Stopped by {signal.Signals(self.received).name} after step {state.global_step} of {state.max_steps}, "
                f"which is saved. Go on with: python -m sft_recipes resume {shlex.quote(args.output_dir)}"
            )
            log.warning(line)
            if signal.SIGUSR2 in self.before and self.received != signal.SIGINT:
                signal.raise_signal(signal.SIGUSR2)  # to submitit, which queues the job again and leaves
            raise RunInterrupted(line, 128 + self.received)
