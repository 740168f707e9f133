"""TRL's trainer with checkpoints that are written whole, after a signal, too, and resumed exactly, in any epoch."""

import json
import logging
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import TrainOutput
from trl import SFTTrainer

from sft_recipes.errors import RunInterrupted
from sft_recipes.training import checkpoints
from sft_recipes.training.callbacks import AtTrainBegin

log = logging.getLogger(__name__)
PROGRESS = "progress.json"
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class ResumableTrainer(SFTTrainer):
    """`trl.SFTTrainer` whose runs can be stopped at any moment and go on to the same weights, bit for bit on a CPU.

    `run` describes the run in its checkpoints (`checkpoints.describe_run`).
    """

    def __init__(self, *arguments: Any, run: Mapping[str, Any] | None = None, **options: Any):
        super().__init__(*arguments, **options)
        self.run, self.resumed_from = run or {}, None
        self.staging: Path | None = None  # where a checkpoint is written before it gets its place
        self.train_start, self.earlier_seconds = time.time(), 0.0  # of training, before the run was resumed
        self.stop_on_signal = StopOnSignal(self.args.world_size)
        self.add_callback(self.stop_on_signal)
        self.start_actions = [self.restore_progress]  # its sums are at zero then
        self.add_callback(AtTrainBegin(self.start_actions))

    def train(self, resume_from_checkpoint: str | None = None, **options: Any) -> TrainOutput:
        """Trains, from a checkpoint on where one is given; SIGTERM and Ctrl-C end it with one (RunInterrupted)."""
        self.resumed_from = resume_from_checkpoint
        if self.is_world_process_zero():  # one that was killed has left it
            shutil.rmtree(Path(self.args.output_dir, checkpoints.STAGING), ignore_errors=True)
        with self.stop_on_signal.listening():
            return super().train(resume_from_checkpoint, **options)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        """transformers' sampler; where it groups by length, in an order of its own for each epoch.

        transformers 5.23 draws that order from the global random state, which a resumed run has not kept from the
        epoch's start: it would see some rows twice and others never. Goes when it gives LengthGroupedSampler a
        generator, as it does for evaluation.
        """
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochSeededSampler(sampler.batch_size * self.args.world_size, lengths=sampler.lengths, seed=seed)

    def _init_training_state(self, max_steps: int, *arguments: Any) -> tuple[int, int]:
        """As transformers, but how often a resumed run saves, logs and evaluates is its own, not its checkpoint's."""
        position = super()._init_training_state(max_steps, *arguments)
        self.state.compute_steps(self.args, max_steps)
        self.state.best_model_checkpoint = checkpoints.best_checkpoint(Path(self.args.output_dir), self.state)
        return position

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        """An epoch, unless all steps are done: transformers would make one more from a run's last checkpoint."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*arguments, **options)
        else:
            self.control.should_training_stop = True

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        """The result of the whole run, the time before it was resumed included."""
        return super()._finalize_training(trial, num_train_samples, start_time - self.earlier_seconds)

    def _get_output_dir(self, trial: Any = None) -> str:
        """Where checkpoints go: aside while one is written."""
        return str(self.staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any = None) -> None:
        """Writes a checkpoint aside and gives it its place once it is whole and on the disk.

        Raises ConfigError where the disk is full or has no room for it; what is in the folder already stays as it is.
        """
        folder, step = Path(self.args.output_dir), self.state.global_step
        staged = folder / checkpoints.STAGING / f"checkpoint-{step}"
        try:
            self.staging = staged.parent
            with checkpoints.explained_write_errors(folder, f"The checkpoint of step {step}"):
                checkpoints.check_room_for_checkpoint(folder, self.model, self.args)
                super()._save_checkpoint(model, trial)
                if self.is_world_process_zero():
                    self.state.best_model_checkpoint = None  # the path aside; the step is in best_global_step
                    self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
                    (staged / PROGRESS).write_text(json.dumps(self.progress()), encoding="utf-8")
                self.accelerator.wait_for_everyone()
                if self.is_world_process_zero():
                    checkpoints.publish_checkpoint(staged, folder, self.run)
                self.accelerator.wait_for_everyone()
        finally:
            self.staging = None
            if self.is_world_process_zero():
                shutil.rmtree(folder / checkpoints.STAGING, ignore_errors=True)
        self.state.best_model_checkpoint = checkpoints.best_checkpoint(folder, self.state)
        if self.args.should_save and (self.args.save_total_limit or 0) > 0:
            rotate_checkpoints(folder, self.args.save_total_limit, self.state.best_model_checkpoint)

    def progress(self) -> dict[str, Any]:
        """What transformers and TRL sum up while they train and leave out of a checkpoint."""
        return {
            "loss_sum": self._total_loss_scalar,
            "loss_since_log": self._tr_loss.item(),
            "last_log": self._globalstep_last_logged,
            "tokens": self._total_train_tokens,
            "metrics": self._metrics["train"],
            "seconds": self.earlier_seconds + time.time() - self.train_start,
        }

    def restore_progress(self) -> None:
        """Takes up the sums of the run that is resumed, so that losses, tokens and times are the whole run's."""
        self.train_start, self.earlier_seconds = time.time(), 0.0
        if self.resumed_from is None:
            return
        saved = json.loads(Path(self.resumed_from, PROGRESS).read_text(encoding="utf-8"))
        self._total_loss_scalar, self._globalstep_last_logged = saved["loss_sum"], saved["last_log"]
        self._tr_loss += saved["loss_since_log"]
        self._total_train_tokens, self.earlier_seconds = saved["tokens"], saved["seconds"]
        self._metrics["train"].update(saved["metrics"])
        self._initial_global_step = 0


def rotate_checkpoints(folder: Path, most: int, best: str | None) -> None:
    """Removes the oldest checkpoints where there are more than `most`, but never the newest or the best."""
    paths = checkpoints.newest_first(folder)  # transformers' function of this name would remove checkpoint-24.bak, too
    kept = {paths[0], Path(best or paths[0])}
    for path in [path for path in paths if path not in kept][max(most - len(kept), 0) :]:
        shutil.rmtree(path, ignore_errors=True)


class EpochSeededSampler(LengthGroupedSampler):
    """Rows of about one length together, each once an epoch, in an order that seed and epoch decide."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """What accelerate calls before each epoch, also for one that is resumed."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


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
