"""The config's `trainer` as TRL's arguments, checked before rows and weights, and the name of the objective."""

import copy
import inspect
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import EarlyStoppingCallback, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
from transformers.trainer_utils import check_target_module_exists
from transformers.utils import is_liger_kernel_available
from trl import SFTConfig, SFTTrainer

from sft_recipes.config.metrics import objective_direction
from sft_recipes.config.schema import Config
from sft_recipes.config.validation import call_validated
from sft_recipes.errors import ConfigError, did_you_mean, one_line, plural
from sft_recipes.training.callbacks import LossLogger, load_callbacks
from sft_recipes.training.choices import accumulation_steps
from sft_recipes.training.memory import trains_in_bf16
from sft_recipes.training.sharding import is_sharded

log = logging.getLogger(__name__)


def build_arguments(config: Config, folder: Path) -> tuple[SFTConfig, list[TrainerCallback]]:
    """TRL's arguments, checked, and the callbacks; rows are encoded and packed before TRL sees them."""
    values, processes = dict(config.trainer.fields), int(os.environ.get("WORLD_SIZE", 1))
    values["activation_checkpointing"] = config.trainer.activation_checkpointing is not False  # auto: see choices.py
    rows = config.trainer.per_device_train_batch_size
    values["per_device_train_batch_size"] = 1 if rows == "auto" else rows  # until choices.py knows the rows
    values |= accumulation_steps(config.trainer.effective_batch_size, values["per_device_train_batch_size"], processes)
    callbacks = [LossLogger(), *load_callbacks(config.callbacks)]
    stopping = config.trainer.early_stopping()
    if stopping:
        callbacks.append(EarlyStoppingCallback(**stopping))
    if stopping or values.get("load_best_model_at_end"):
        kind = "epoch" if values.get("eval_strategy", "no") == "no" else values["eval_strategy"]
        values |= {"eval_strategy": kind, "save_strategy": kind, "load_best_model_at_end": True}
        metric = values.setdefault("metric_for_best_model", "eval_loss")
        # transformers maximises every metric whose name does not end in "loss", loss_turn_later, too
        values.setdefault("greater_is_better", objective_direction(str(metric).rpartition(".")[2]) == "maximize")
    values.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    if "bf16" not in values and "fp16" not in values:
        values["bf16"] = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    # a loss that is not finite should be seen, and the filter looks at every micro-batch, which waits for the GPU
    values.setdefault("logging_nan_inf_filter", False)
    values.setdefault("run_name", f"{config.name} {folder.name}")  # in a tracker
    if config.streamed:
        if values.get("max_steps", -1) <= 0:
            raise ConfigError("trainer.max_steps is missing: a stream has no length. Write trainer.max_steps=1000.")
        if values.get("dataloader_num_workers"):
            raise ConfigError(
                "trainer.dataloader_num_workers should be 0 for a stream, whose rows are counted as read."
            )
        values["train_sampling_strategy"] = "random"  # the stream shuffles, and its lengths are not known
    sharding = values.get("fsdp_config")
    if isinstance(sharding, Mapping):
        values["fsdp_config"] = sharding = dict(sharding)  # which transformers completes
        if sharding.get("activation_checkpointing"):  # PEFT 0.21 finds no adapter in FSDP's wrappers, and saves none
            sharding["activation_checkpointing"] = config.adapter.type == "none"
            values["activation_checkpointing"] &= config.adapter.type != "none"
    if config.mode != "train" and processes == 1:  # one process shares no model
        values.pop("deepspeed", None)
    own = {"output_dir": str(folder), "seed": config.seed, "dataset_kwargs": {"skip_prepare_dataset": True}}
    arguments = call_validated(SFTConfig, values | own, "trainer")
    if processes > 1 and arguments.world_size == 1:  # or each would train a model of its own
        raise ConfigError(f"torchrun started {processes} processes without a GPU. Write trainer.use_cpu=true.")
    if arguments.packing and arguments.max_length is None:
        raise ConfigError("trainer.packing needs trainer.max_length, the length of a packed row.")
    arguments.push_to_hub = False  # the run does it: transformers would push the log and the answers, too
    if config.mode == "train":  # a preview may be of a run on another machine
        check_libraries(arguments)
    weights = "bf16" if trains_in_bf16(config, arguments) else "fp32"
    precision = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else weights
    log.info("Computing in %s on this hardware; trained weights are %s.", precision, weights)
    return arguments, callbacks


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
    try:
        for tracker in get_reporting_integration_callbacks(arguments.report_to):
            tracker()
    except (RuntimeError, ValueError) as error:  # it is not installed, or is none
        raise ConfigError(f"trainer.report_to: {one_line(error)}") from error
    check_schedule(arguments, arguments.max_steps if arguments.max_steps > 0 else 100)
    if (arguments.fsdp and arguments.world_size == 1) or (arguments.deepspeed and "RANK" not in os.environ):
        name = "fsdp" if arguments.fsdp else "deepspeed"
        raise ConfigError(f"trainer.{name} is for several processes. Start them with torchrun --nproc-per-node N.")
    if is_sharded(arguments):
        log.info("The model is sharded over %d processes: no trial step is taken, the base is measured once it is "
                 "placed, and evaluate.weight_change is left out.", arguments.world_size)  # fmt: skip
    else:
        rehearse_step(arguments)


def check_schedule(arguments: SFTConfig, steps: int) -> None:
    """Raises ConfigError for a field that the schedule does not have, lacks or cannot use in a run of so many steps."""
    kind, values = arguments.lr_scheduler_type.value, arguments.lr_scheduler_kwargs or {}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    warmup = arguments.get_warmup_steps(steps)
    given = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    fields = sorted(inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[kind]).parameters.keys() - given)
    try:
        if wrong := values.keys() - fields:  # some schedules take any and use none
            raise TypeError(f"it has no field {', '.join(sorted(wrong))}")
        schedule = get_scheduler(kind, optimizer, warmup, steps, scheduler_specific_kwargs=values)
        for rate in getattr(schedule, "lr_lambdas", []):
            for step in (0, warmup, steps):
                rate(step)
    except (ValueError, TypeError, ZeroDivisionError) as error:  # the last one where the warm-up is all there is
        known = ", ".join(f"trainer.lr_scheduler_kwargs.{name}" for name in fields)
        raise ConfigError(
            f"trainer.lr_scheduler_type={kind}: {one_line(error)} (with a warm-up of {warmup} of {steps} steps). "
            f"Its fields are {known or 'none'}."
        ) from error


def check_steps(arguments: SFTConfig, rows: int | None) -> None:
    """Raises ConfigError where training on so many rows (None: a stream) has no step, or too few for its schedule."""
    batch, steps = arguments.per_device_train_batch_size * arguments.world_size, arguments.max_steps
    if rows is not None:
        batches = rows // batch if arguments.dataloader_drop_last else math.ceil(rows / batch)
        epochs = math.ceil(arguments.num_train_epochs * math.ceil(batches / arguments.gradient_accumulation_steps))
        steps = epochs if steps < 0 or not batches else steps
    if not steps:
        raise ConfigError(
            f"Training on {plural(rows, 'row')} in batches of {batch} has no step. Write a lower "
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
    arguments.pad_to_multiple_of = None  # of any size, while the memory for it is checked later
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


def resolve_objective(name: str | None, measured: list[str]) -> str | None:
    """The entry of metrics.json that Hydra's sweepers get, one of those that will be measured; None where none will.

    Raises ConfigError for an objective that is not among them.
    """
    if name is None:
        return next((key for key in ("eval_loss", "train_loss", *measured) if key in measured), None)
    if name not in measured and not ("eval_loss" in measured and name.startswith("eval_loss_")):
        raise ConfigError(f"objective={name} is not measured in this run.{did_you_mean(name, measured)}")
    return name


def check_objective(name: str | None, metrics: Mapping[str, Any]) -> None:
    """Raises ConfigError where a finished run has no number for its objective."""
    if name and metrics.get(name) is None:
        why = " No held-out answer has a supervised stop token." if name == "p_stop" else ""
        why = " No answer has a thought." if name in ("thought_tokens", "answered") else why
        raise ConfigError(f"objective={name} could not be measured in this run.{why}")
