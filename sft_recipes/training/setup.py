"""What train, preview and evaluate share: one config becomes arguments, tokenizer, rows and questions."""

import logging
from dataclasses import dataclass, replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from omegaconf import OmegaConf
from peft import PeftConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig

from sft_recipes.config.run_folder import check_run_folder, create_dated_folder, explained_folder_errors
from sft_recipes.config.schema import Config
from sft_recipes.data.prepare import load_data
from sft_recipes.data.sources import check_readers
from sft_recipes.data.streaming import RowStream, load_stream
from sft_recipes.data.token_rows import TrainingData, row_lengths
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.encoding.rendering import check_settings
from sft_recipes.errors import ConfigError, is_first_process
from sft_recipes.evaluation.suite import EvalInputs, build_eval_inputs, check_best_model_metric, check_evaluation
from sft_recipes.modeling.adapters import build_peft_config, build_quantization_config, check_adapter
from sft_recipes.modeling.loading import build_empty_model, load_model_config, load_tokenizer, prepare_with
from sft_recipes.modeling.save_load import check_push
from sft_recipes.modeling.sentencepiece_model import warn_of_other_tokens
from sft_recipes.reporting.run_folder import read_json
from sft_recipes.training.arguments import build_arguments, check_optimizer_targets, check_steps
from sft_recipes.training.choices import choose_step
from sft_recipes.training.sharding import is_sharded, is_sharded_by_fsdp2

log = logging.getLogger(__name__)
SENTENCEPIECE_ROWS = 200  # whose tokens are compared with SentencePiece's, where the tokenizer has nothing else


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, what metrics.json holds, and the model with its tokenizer."""

    folder: Path
    metrics: dict[str, Any]
    objective: str | None  # the entry of metrics that a sweep optimizes; None where only benchmarks were run
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerFast


@dataclass(frozen=True)
class RunSetup:
    """All that a run needs before weights are loaded."""

    config: Config
    folder: Path
    arguments: SFTConfig
    callbacks: list[TrainerCallback]
    peft: PeftConfig | None
    quantization: BitsAndBytesConfig | None
    encoder: Encoder
    new_token_ids: list[int]  # of the control tokens that the chat template adds
    data: TrainingData
    rows: Dataset | IterableDataset  # what the trainer gets
    stream: RowStream | None
    eval_inputs: EvalInputs

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer as it is saved and served."""
        return self.encoder.tokenizer

    @property
    def template_date(self) -> dict[str, str]:
        """The day that training writes where the template writes today's; empty for any other template."""
        dated = "strftime_now" in self.tokenizer.chat_template
        return {"template_date": self.config.model.template_date} if dated else {}

    @property
    def longest(self) -> int:
        """Tokens of the longest row that the model reads."""
        known = int(row_lengths(self.data.train).max(initial=1))
        return self.arguments.max_length or known if self.arguments.packing or self.stream else known


def open_run_folder(config: Config, folder: str | Path | None = None) -> Path:
    """The run's folder with its composed config in it: outputs/NAME/DATE_TIME where none is named.

    Raises ConfigError where it holds a run already, which is neither resumed nor to be overwritten.
    """
    dated = Path("outputs", config.name, f"{datetime.now():%Y-%m-%d_%H-%M-%S}")
    folder = (Path(folder) if folder else create_dated_folder(dated)).resolve()
    if not config.trainer.fields.get("resume_from_checkpoint"):
        check_run_folder(folder, config.overwrite)
    saved = folder / ".hydra" / "config.yaml"
    if is_first_process() and not saved.exists():  # the command's Hydra has written it
        with explained_folder_errors(folder):
            saved.parent.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(OmegaConf.create(config.composed), saved)
    return folder


def set_up_run(config: Config, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> RunSetup:
    """Everything that can be refused is refused here, cheapest first; `tokenizer` is a finished run's own.

    Raises ConfigError and DataError.
    """
    check_readers(config)
    arguments, callbacks = build_arguments(config, folder)
    check_evaluation(config.evaluate, run_code=config.mode != "preview")
    if config.mode == "train" and config.trainer.fields.get("push_to_hub"):
        check_push()
    peft, quantization = build_peft_config(config.adapter), build_quantization_config(config.adapter)
    if peft and peft.is_prompt_learning and arguments.packing:
        raise ConfigError(
            f"adapter.type={config.adapter.type} puts tokens of its own before every row, so rows cannot be joined. "
            "Write trainer.packing=false."
        )
    check_model_config(config, arguments)
    given, config = config.model.template_date, fix_template_date(config, folder)
    if tokenizer is None:
        tokenizer, template, new_token_ids = load_tokenizer(config.model)
        # a preview may be of a run on another machine, which has other kernels
        anywhere = config.model if config.mode == "train" else replace(config.model, attn_implementation=None)
        empty = build_empty_model(anywhere)
        if peft:
            check_adapter(peft, empty, new_token_ids)
        check_optimizer_targets(arguments, empty)  # with the adapter's layers
    else:
        template, new_token_ids = prepare_with(tokenizer, config.model)
    rows = new_token_ids or getattr(peft, "trainable_token_indices", None)
    if rows and is_sharded(arguments) and (peft or arguments.deepspeed) and not is_sharded_by_fsdp2(arguments):
        raise ConfigError(
            "DeepSpeed, and FSDP 1 with an adapter, cannot train the rows of new tokens. Write trainer=fsdp "
            "(accelerate launch: --fsdp_version 2); trainer=default, which has the whole model on each device; or a "
            "model.chat_template of tokens that the tokenizer has."
        )
    encoder = Encoder(tokenizer, template, config.data_checks.empty_thought == "keep")
    for name, source in config.sources.items():
        check_settings(f"data.{name}.chat_template_kwargs", source.chat_template_kwargs or {}, template)
    if "strftime_now" in tokenizer.chat_template:
        day = config.model.template_date
        log.info(
            "The chat template writes today's date: %s (model.template_date) in training, its own in serving.", day
        )
    elif given:
        log.warning("model.template_date has no effect: the chat template does not write today's date.")
    if config.streamed:
        data, stream = load_stream(config, encoder, arguments.max_length, arguments.packing)
        rows = stream.dataset()
    else:
        data, stream = load_data(config, encoder, arguments.max_length, arguments.packing), None
        rows = data.packed
        if rows is None:  # rows of one length are batched by that column
            rows = data.train.add_column("length", row_lengths(data.train))
    for part in (data.train, data.held_out):
        check_positions(config, int(row_lengths(part).max(initial=0)), "The longest row in tokens")
    warn_of_other_tokens(tokenizer, data.train[:SENTENCEPIECE_ROWS]["input_ids"])
    inputs = build_eval_inputs(config, data, tokenizer)
    check_best_model_metric(arguments.metric_for_best_model, inputs)
    setup = RunSetup(
        config, folder, arguments, callbacks, peft, quantization, encoder, new_token_ids, data, rows, stream, inputs
    )
    config = choose_step(config, arguments, setup.longest, new_token_ids)
    if config.mode == "train":
        check_steps(arguments, None if stream else len(rows))
    return replace(setup, config=config)


def fix_template_date(config: Config, folder: Path) -> Config:
    """The config with the day that a template writes: its own, or of the run that goes on or is evaluated, or today."""
    resumed = config.trainer.fields.get("resume_from_checkpoint")
    earlier = Path(config.evaluate.run or (folder if resumed else "")) / "supervision.json"
    day = config.model.template_date or read_json(earlier).get("template_date") or f"{date.today()}"
    return replace(config, model=replace(config.model, template_date=day))


def check_model_config(config: Config, arguments: SFTConfig) -> None:
    """Raises ConfigError where the model knows fewer positions than trainer.max_length, or has no such experts."""
    shape = load_model_config(config.model).get_text_config()
    if arguments.router_aux_loss_coef and not hasattr(shape, "output_router_logits"):
        raise ConfigError(f"trainer.router_aux_loss_coef is for mixtures of experts, which {config.model.id} is not.")
    if config.model.attn_implementation == "flex_attention" and arguments.device.type == "cpu":
        raise ConfigError("model.attn_implementation=flex_attention trains on a GPU only. Leave it out.")
    check_positions(config, arguments.max_length, "trainer.max_length")
    check_positions(config, arguments.pad_to_multiple_of, "trainer.pad_to_multiple_of", "trainer.pad_to_multiple_of")


def check_positions(config: Config, length: int | None, where: str, field: str = "trainer.max_length") -> None:
    """Raises ConfigError for a length in tokens that is beyond the positions that the model knows."""
    positions = getattr(load_model_config(config.model).get_text_config(), "max_position_embeddings", None)
    if positions and length and length > positions:
        raise ConfigError(
            f"{where} is {length}, beyond the {positions} positions of {config.model.id}. Write "
            f"{field}={positions} or less, or model.max_position_embeddings={length} to train it on more."
        )
