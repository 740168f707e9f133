"""What transformers, TRL, PEFT or an optimizer refuse only when training starts: found out before rows and weights."""

import copy
import inspect
import math

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.integrations import get_reporting_integration_callbacks
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
from transformers.trainer_utils import check_target_module_exists
from transformers.utils import is_liger_kernel_available
from transformers.utils.logging import get_log_levels_dict
from trl import SFTConfig, SFTTrainer

from sft_recipes.config.validation import unknown_field
from sft_recipes.errors import ConfigError, did_you_mean, one_line


def check_libraries(arguments: SFTConfig) -> None:
    """Raises ConfigError for an optimizer, a schedule or an option that cannot work on this machine."""
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise ConfigError(
            "trainer.use_liger_kernel=true needs pip install liger-kernel. TRL has a fused LM head of its own: leave "
            "it out."
        )
    if arguments.activation_offloading and arguments.device.type == "cpu":
        raise ConfigError("trainer.activation_offloading=true moves activations from a GPU, and there is none.")
    if arguments.fp16 and arguments.device.type == "cpu":  # accelerate would compute in fp32, and not say so
        raise ConfigError("trainer.fp16=true needs a GPU. Leave it out for fp32, or write trainer.bf16=true.")
    if arguments.torch_compile and arguments.activation_offloading:
        raise ConfigError("trainer.activation_offloading does not work with trainer.torch_compile. Leave one out.")
    levels = [*get_log_levels_dict(), "passive"]
    known = {"log_level": levels, "log_level_replica": levels}
    known["include_num_input_tokens_seen"] = ["all", "non_padding", "no"]  # any other would count as all
    for name, choices in known.items():
        if (value := getattr(arguments, name)) not in choices:
            raise ConfigError(f"trainer.{name} cannot be {value!r}.{did_you_mean(value, choices)}")
    try:
        for tracker in get_reporting_integration_callbacks(arguments.report_to):
            tracker()
    except (RuntimeError, ValueError) as error:  # it is not installed, or is none
        raise ConfigError(f"trainer.report_to: {one_line(error)}") from error
    check_schedule(arguments, arguments.max_steps if arguments.max_steps > 0 else 100)
    if not (arguments.fsdp or arguments.deepspeed):  # which leave the model where it is until training starts
        rehearse_step(arguments)


def check_schedule(arguments: SFTConfig, steps: int) -> None:
    """Raises ConfigError for a field that the schedule does not have, lacks or cannot use in a run of so many steps."""
    kind, values = arguments.lr_scheduler_type.value, arguments.lr_scheduler_kwargs or {}
    given = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    fields = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[kind]).parameters.keys() - given
    for name in values:
        if name not in fields:
            path = f"trainer.lr_scheduler_kwargs.{name}"
            raise ConfigError(unknown_field(path, name, sorted(fields), f"trainer.lr_scheduler_type={kind}"))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    warmup = arguments.get_warmup_steps(steps)
    try:
        schedule = get_scheduler(kind, optimizer, warmup, steps, scheduler_specific_kwargs=values)
        for rate in getattr(schedule, "lr_lambdas", []):
            for step in (0, warmup, steps):
                rate(step)
    except ZeroDivisionError as error:
        raise ConfigError(
            f"trainer.lr_scheduler_type={kind} has nothing left after {warmup} warm-up steps of {steps}. Write a lower "
            "trainer.warmup_steps, or more steps."
        ) from error
    except (ValueError, TypeError) as error:
        known = ", ".join(f"trainer.lr_scheduler_kwargs.{name}" for name in sorted(fields))
        raise ConfigError(f"trainer.lr_scheduler_type={kind}: {one_line(error)}. Its fields are {known}.") from error


def check_steps(arguments: SFTConfig, rows: int | None) -> None:
    """Raises ConfigError where training on so many rows (None: a stream) has no step, or too few for its schedule."""
    batch, steps = arguments.per_device_train_batch_size * arguments.world_size, arguments.max_steps
    if rows is not None:
        batches = rows // batch if arguments.dataloader_drop_last else math.ceil(rows / batch)
        epochs = math.ceil(arguments.num_train_epochs * math.ceil(batches / arguments.gradient_accumulation_steps))
        steps = epochs if steps < 0 or not batches else steps
    if not steps:
        raise ConfigError(
            f"Training on {rows} rows in batches of {batch} has no step. Write a lower "
            "trainer.per_device_train_batch_size, or trainer.max_steps above 0."
        )
    check_schedule(arguments, steps)


def check_optimizer_targets(arguments: SFTConfig, model: torch.nn.Module) -> None:
    """Raises ConfigError where `optim_target_modules` match no linear layer, which transformers finds out later."""
    targets = arguments.optim_target_modules
    if not targets or (isinstance(targets, str) and targets.replace("_", "-") == "all-linear"):
        return
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    if not any(check_target_module_exists(targets, name) for name in names):
        known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
        raise ConfigError(f"trainer.optim_target_modules={targets} matches no layer. The linear ones are {known}.")


def rehearse_step(arguments: SFTConfig) -> None:
    """Takes a step with a model of 100,000 numbers, in 0.05 s; raises ConfigError for whatever anything refuses in it.

    Under torchrun every process takes it, since its loss counts the tokens of all. bitsandbytes packs the state of
    4,096 numbers and more, and pages that of 100,000. What depends on the run's own model is left out: compiling it,
    the layers that an optimizer is to work on, its experts.
    """
    arguments = copy.copy(arguments)
    arguments.report_to, arguments.router_aux_loss_coef, arguments.use_liger_kernel = [], None, False
    arguments.optim_target_modules = arguments.optim_target_modules and "all-linear"
    arguments.skip_memory_metrics, arguments.per_device_train_batch_size = True, 1
    words = Tokenizer(WordLevel({"<unk>": 0}, "<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<unk>", eos_token="<unk>")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    rows = [{"input_ids": [0] * 8, "labels": [0] * 8, "seq_lengths": [8]}] * 2
    data, where = Dataset.from_list(rows), "trainer"
    try:
        if arguments.torch_compile:
            torch.compile(torch.nn.Linear(1, 1), mode=arguments.torch_compile_mode)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=6400, **shape))
        trainer = SFTTrainer(model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
        trainer.get_train_dataloader()
        if arguments.activation_checkpointing:
            options = {"every_n_layers": 1} | (arguments.activation_checkpointing_kwargs or {})
            own = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
            model.activation_checkpointing_enable(options or None, **own)
        trainer.compute_loss(model, send_to_device(trainer.data_collator(rows), arguments.device)).backward()
        where = f"trainer.optim={arguments.optim.value}"
        trainer.create_optimizer().step()
    except Exception as error:  # each library has errors of its own
        raise ConfigError(f"{where}: {one_line(error)}") from error
