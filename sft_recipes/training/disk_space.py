"""Whether the disk has room for checkpoints and model, and the line of a run that could not write them."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote

import torch
from safetensors import SafetensorError
from transformers.trainer_utils import SaveStrategy
from trl import SFTConfig

from sft_recipes.errors import ConfigError, one_line
from sft_recipes.training.checkpoints import newest_first
from sft_recipes.training.memory import format_bytes, optimizer_state_bytes


def check_disk_space(folder: Path, model: torch.nn.Module, arguments: SFTConfig) -> None:
    """Raises ConfigError where checkpoints and the model would not fit on the disk, before training starts.

    One checkpoint more than are kept is there at once, since an old one goes when the new one is whole.
    """
    weights, checkpoint = checkpoint_bytes(model, arguments)
    number = 0
    if arguments.save_strategy != SaveStrategy.NO:
        number = (arguments.save_total_limit or 1) + 1 - len(newest_first(folder))
    need, free = weights + max(number, 0) * checkpoint, shutil.disk_usage(folder).free
    if need > free:
        raise ConfigError(
            f"{folder} has {format_bytes(free)} free, and this run will write {format_bytes(need)}: the model, and "
            f"{max(number, 0)} checkpoints of {format_bytes(checkpoint)} at once. Make room, or write "
            "trainer.save_total_limit=1, trainer.save_strategy=no or hydra.run.dir=DIR on another disk."
        )


def check_room_for_checkpoint(folder: Path, model: torch.nn.Module, arguments: SFTConfig) -> None:
    """Raises OSError where the disk has no room for one more checkpoint, before any of it is written."""
    _, need = checkpoint_bytes(model, arguments)
    if shutil.disk_usage(folder).free < need:
        raise OSError(errno.ENOSPC, f"it takes about {format_bytes(need)}")


@contextmanager
def explained_write_errors(folder: Path, what: str) -> Iterator[None]:
    """What goes wrong while something is written to the run's folder as a ConfigError: a full disk, lost rights."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save tells that it failed at the file only in the text of a RuntimeError
        of_torch = ("PytorchStreamWriter", "No space left", "unexpected pos")
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in of_torch):
            raise
        free, why = shutil.disk_usage(folder).free, getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{what} could not be written to {folder}, which has {format_bytes(free)} free: {one_line(why)}. "
            f"Earlier checkpoints are as they were. Make room, then go on with: python -m sft_recipes resume "
            f"{quote(str(folder))}"
        ) from error


def checkpoint_bytes(model: torch.nn.Module, arguments: SFTConfig) -> tuple[int, int]:
    """Bytes that saving the model takes, and a checkpoint: all weights, or an adapter's, with the optimizer's state."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    saved = trained if hasattr(model, "peft_config") else list(model.parameters())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in saved)
    state = sum(optimizer_state_bytes(arguments.optim.value, parameter) for parameter in trained)
    return weights, weights + (0 if arguments.save_only_model else state)
