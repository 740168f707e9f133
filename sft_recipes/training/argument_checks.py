"""What transformers and TRL find out only when a model is there, or training starts: asked of them before."""

import inspect
from typing import Any

import torch
from transformers import Trainer
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
from transformers.utils import is_liger_kernel_available
from trl import SFTConfig

from sft_recipes.config.validation import unknown_field
from sft_recipes.errors import ConfigError, one_line


def check_libraries(arguments: SFTConfig) -> None:
    """Raises ConfigError for an optimizer, a schedule or an option that cannot work on this machine."""
    check_schedule(arguments)
    check_optimizer(arguments)
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise ConfigError(
            "trainer.use_liger_kernel=true needs pip install liger-kernel. TRL has a fused LM head of its own: leave "
            "it out."
        )
    if arguments.activation_offloading and arguments.device.type == "cpu":
        raise ConfigError("trainer.activation_offloading=true moves activations from a GPU, and there is none.")
    if arguments.torch_compile and arguments.activation_offloading:
        raise ConfigError("trainer.activation_offloading does not work with trainer.torch_compile. Leave one out.")


def check_schedule(arguments: SFTConfig) -> None:
    """Raises ConfigError for a field that the schedule does not have, lacks or cannot use."""
    kind, values = arguments.lr_scheduler_type.value, arguments.lr_scheduler_kwargs or {}
    given = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    fields = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[kind]).parameters.keys() - given
    for name in values:
        if name not in fields:
            path = f"trainer.lr_scheduler_kwargs.{name}"
            raise ConfigError(unknown_field(path, name, sorted(fields), f"trainer.lr_scheduler_type={kind}"))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    try:
        get_scheduler(kind, optimizer, num_warmup_steps=1, num_training_steps=10, scheduler_specific_kwargs=values)
    except (ValueError, TypeError) as error:
        known = ", ".join(f"trainer.lr_scheduler_kwargs.{name}" for name in sorted(fields))
        raise ConfigError(f"trainer.lr_scheduler_type={kind}: {one_line(error)}. Its fields are {known}.") from error


def check_optimizer(arguments: SFTConfig) -> None:
    """Raises ConfigError for an optimizer whose package or hardware is missing, found out by a step of its own."""
    name = arguments.optim.value
    try:
        optimizer, values = Trainer.get_optimizer_cls_and_kwargs(arguments, NamedLayers(arguments.optim_target_modules))
        if "model" not in values and "optimizer_dict" not in values:
            # bitsandbytes packs the state of 4,096 values and more, and pages that of 100,000
            weight = torch.nn.Parameter(torch.zeros(256, 512, device=arguments.device))
            weight.grad = torch.zeros_like(weight)
            optimizer([weight], **values).step()
    except Exception as error:  # each optimizer's package has errors of its own
        raise ConfigError(f"trainer.optim={name}: {one_line(error)}") from error


class NamedLayers(torch.nn.Module):
    """A stand-in for a model in which the modules that GaLore and APOLLO are to work on are found."""

    def __init__(self, targets: Any):
        super().__init__()
        names = targets if isinstance(targets, list | tuple) else ["all_linear"]
        for number, name in enumerate(names):
            self.add_module(f"layer{number}_{name}".replace(".", "_"), torch.nn.Linear(2, 2))
