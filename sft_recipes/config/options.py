"""The groups of a config as dataclasses: each field is a key with its default, and its comment documents it."""

import codecs
from dataclasses import dataclass, field
from datetime import date
from typing import Annotated, Any, Literal

from sft_recipes.config.endpoint_options import JudgeOptions
from sft_recipes.config.validation import Count, NotNegative, Positive, Share, WholeNumber
from sft_recipes.errors import ConfigError

Action = Literal["raise", "drop", "keep"]
TrainOn = Literal["assistant", "last", "all"]


@dataclass(frozen=True)
class ModelOptions:
    """The config's `model`."""

    id: str  # a name on the hub, or the folder of a model or of a finished run
    chat_template: str | None = None  # the name of one of ours, a path, or null for the tokenizer's own
    revision: str | None = None
    trust_remote_code: bool = False
    bos: Literal["auto", "always", "never"] = "auto"  # before a conversation; auto: as the tokenizer does
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # of the weights; null: see modeling/loading.py
    attn_implementation: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # variables of the template, also when served
    template_date: str | None = None  # what a template with today's date writes; null is the day of the run
    max_position_embeddings: Count | None = None  # more positions than the model's own config says

    def __post_init__(self):
        try:
            date.fromisoformat(self.template_date or "2026-01-01")
        except ValueError:
            raise ConfigError(
                f"model.template_date should be a day like 2026-11-26, not {self.template_date}."
            ) from None


@dataclass(frozen=True)
class Source:
    """One dataset of `data`: what `datasets.load_dataset` is asked for, and what is done with the rows."""

    path: str | None = None  # hub id, folder or builder; taken from the ending of data_files where it is null
    name: str | None = None
    data_files: str | list | dict | None = None
    data_dir: str | None = None
    revision: str | None = None
    field: str | None = None  # the key of a JSON document under which its rows stand
    sep: str | None = None  # between a csv's cells; null is a comma, in a .tsv a tab
    encoding: str = "utf-8"  # of text files
    split: str | None = "train"  # null where all rows are held out
    held_out: NotNegative | None = None  # a share below 1, or a number of rows; null takes data.held_out
    held_out_split: str | None = None  # hold out the rows of this split instead of some rows of `split`
    formatter: str | dict | None = None  # a name, or {name: alpaca, output: response}; null takes the root choice
    rows: Count | None = None  # so many of the source's rows, drawn with the run's seed
    sample_by: Literal["random", "length"] = "random"  # how `rows` are drawn: length takes as many of every length
    share: Share | None = None  # of the mixture, see mix; a source without a share gives all its rows
    on_error: Literal["raise", "drop"] = "raise"  # what is done with rows that cannot be read or formatted
    chat_template_kwargs: dict[str, Any] | None = None  # variables of the template; a row's own win
    unroll: Literal["auto", "last", "keep"] = "auto"  # answers that the template shows otherwise once they are history
    train_on: TrainOn = "assistant"  # every answer, the last answer of a row, or every token
    streaming: bool = False  # read, encode and pack rows while training goes on; needs trainer.max_steps

    def __post_init__(self):
        check_held_out(self.held_out)
        if self.split is None and self.held_out_split is None:
            raise ValueError("split=null holds all rows out. Write held_out_split, the split that they are in.")
        if len((self.sep or ",").replace("\\t", "\t")) != 1:
            raise ValueError(f"sep should be one character, not {self.sep!r}.")
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise ValueError(f"encoding={self.encoding} is unknown. Write utf-8, latin-1, cp1252, …") from None


@dataclass(frozen=True)
class DataOptions:
    """The entries of `data` that hold for all sources."""

    held_out: NotNegative = 0.02  # a share below 1, or a number of rows, of each source
    held_out_by_length: bool = False  # draw held-out rows evenly over all lengths instead of at random
    max_length_policy: Literal["auto", "drop", "keep", "raise"] = "auto"
    cache: bool = True  # keep encoded rows for the next run that makes the same, see $SFT_RECIPES_CACHE

    def __post_init__(self):
        check_held_out(self.held_out)


def check_held_out(number: float | None) -> None:
    """Raises ValueError for 1.0: all rows, or one of them?"""
    if isinstance(number, float) and number == 1:
        raise ValueError("held_out=1.0 is neither a share below 1 nor a whole number of rows. Write 1 for one row.")


@dataclass(frozen=True)
class MixOptions:
    """The config's `mix`: how the shares of the sources, data.NAME.share, are filled."""

    by: Literal["rows", "tokens"] = "rows"  # what shares are of: rows, or tokens with loss
    total: Count | None = None  # so many of them; null: all rows of sources without a share, or as many as there are
    when_short: Literal["repeat", "shrink", "raise"] = "repeat"  # a source has too few: more than once, a lower total
    max_repeat: Annotated[float, "[1, inf)"] = 4.0  # refuse to repeat a source more often
    raw_text: Annotated[float, "[0, 1)"] | None = None  # raw text beside conversations, of all tokens; null: by share


@dataclass(frozen=True)
class CheckPolicy:
    """What is done with rows that have an issue: `raise`, `drop` or `keep`; they are counted in every case."""

    nothing_supervised: Action = "raise"  # no token of the row carries loss
    marked_untrained: Action = "drop"  # a flag of the row's own (train: false, weight: 0 …) leaves nothing to train on
    stop_not_supervised: Action = "raise"  # an answer whose stop token carries no loss
    empty_thought: Literal["mask", "keep", "raise", "drop"] = "mask"  # <think></think> before an answer; keep trains it
    content_missing: Action = "raise"  # the chat template leaves out a system message, a call, reasoning, a part
    whitespace_trimmed: Action = "keep"  # the chat template cuts spaces or line breaks at the ends of a message
    unread_field: Action = "keep"  # a key with a value that is neither read nor known to be metadata
    blank_question: Action = "keep"  # a user's message without a text
    roles_out_of_order: Action = "keep"  # two questions or two answers in a row, a late system message
    typed_control_token: Action = "keep"  # a special token spelled out in a message; it is encoded as text
    double_bos_or_eos: Action = "keep"
    duplicate: Action = "keep"  # token for token the same as an earlier row
    in_held_out: Action = "drop"  # token for token the same as a held-out row
    leak: Action = "drop"  # a near-duplicate of a held-out row or one that shares its passages, see curation.leaks


@dataclass(frozen=True)
class AdapterOptions:
    """The config's `adapter`."""

    type: str = "none"  # none, lora, or another of PEFT's methods: ia3, vera, prompt_tuning …
    settings: dict[str, Any] = field(default_factory=dict)  # adapter.TYPE: fields of that method's PEFT config
    loraplus_lr_ratio: Positive | None = None  # LoRA+: the B matrices learn at this multiple of the learning rate
    quantization: dict[str, Any] | None = None  # fields of transformers.BitsAndBytesConfig


@dataclass(frozen=True)
class TrainerOptions:
    """The config's `trainer`: fields of trl.SFTConfig, and the entries that are ours."""

    fields: dict[str, Any] = field(default_factory=dict)
    effective_batch_size: Count | None = None  # rows a step over all processes; sets the accumulation steps
    per_device_train_batch_size: Count | Literal["auto"] = 8  # auto: the most that fit, with an effective_batch_size
    activation_checkpointing: bool | Literal["auto"] = "auto"  # computes them again; auto: where they would not fit
    check_memory: bool = True  # refuse a run that will not fit
    stop_at: Share | None = None  # end with a checkpoint after this share of the steps; `resume` goes on
    early_stopping_patience: Count | None = None  # of transformers.EarlyStoppingCallback
    early_stopping_threshold: NotNegative | None = None

    def __post_init__(self):
        if self.per_device_train_batch_size == "auto" and self.effective_batch_size is None:
            raise ConfigError(
                "trainer.per_device_train_batch_size=auto needs the rows of a step: write "
                "trainer.effective_batch_size=128."
            )

    def early_stopping(self) -> dict[str, Any]:
        """The arguments of transformers.EarlyStoppingCallback that are set."""
        names = ("early_stopping_patience", "early_stopping_threshold")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class EvaluateOptions:
    """The config's `evaluate`."""

    rows: WholeNumber | None = None  # held-out questions to answer; null is 20, or a question file's all; 0 none
    batch_size: Count = 16
    max_new_tokens: Count = 256
    temperature: NotNegative = 0.0  # of the sampled answers beside the greedy ones; 0 samples none
    top_p: Share = 0.9
    system: str | None = None  # a system prompt behind which the base is asked, too: would a prompt have done it?
    few_shot: WholeNumber = 0  # so many training rows with their answers are shown to it in front of each question
    samples_every: WholeNumber = 0  # answer a few questions every so many steps of training; 0 never
    raw_text: str | dict | None = None  # a file or a dataset with a text column, to measure forgetting
    warn_above: NotNegative = 0.10  # rise of the loss on raw text that is a warning, and one that fails the check
    fail_above: NotNegative = 0.15
    lm_eval: list[str] = field(default_factory=list)  # tasks of lm-eval, or YAML files of your own
    lm_eval_rows: Count | None = None  # of each task; null takes all
    judge: JudgeOptions | None = None  # another model compares base and tuned answers
    answers_in_card: bool = False  # held-out questions and answers in the model card, which is what gets published
    cache: bool = True  # keep what the base was measured at for the next run that asks it the same
    weight_change: bool = True  # how far the weights moved; full fine-tuning reads the base again for it
    run: str | None = None  # mode=evaluate: the folder of the run, or of the model, that is compared with the base


@dataclass(frozen=True)
class PreviewOptions:
    """The config's `preview`."""

    rows: WholeNumber | Literal["all"] = 1  # drawn at random, besides the first and the longest; all shows every row
    tflops: Positive | None = None  # a device's rate in 10^12 operations a second; null measures the one here
    price_per_hour: NotNegative | None = None  # of all devices together, for the price of the training


@dataclass(frozen=True)
class LRRange:
    """The config's `lr_find`: the learning rates of the first and of the last step."""

    start: Positive
    end: float

    def __post_init__(self):
        if self.end <= self.start:
            raise ConfigError(f"lr_find.end={self.end} should be above lr_find.start={self.start}.")


@dataclass(frozen=True)
class Provenance:
    """The config's `provenance`: what a recipe's source says, as data, and where the recipe departs from it."""

    source: str
    confidence: Literal["A", "B", "C", "ours"]  # A read in the source itself, B quoted from it, C unsure
    model: str  # the source's base model, by the name that it has there
    data: dict[str, Any]  # id, licence and rows of what the source trained on; null is unknown
    devices: int | None  # the source's, over which the effective batch is divided; null is unknown or of no source
    values: dict[str, Any]  # the source's own, by dotted key; ours read them from the recipe: ${source_values:NAME}
    departures: dict[str, Any]  # why a value, {source: 0, why: …}, or something that has no key is another one here
    unknown: list[str]  # what the source does not say; one that begins with a key of the config is our value
    needs: str  # memory on one device
    machine: str | None = None  # the source's, in its own words
    cost: str | None = None  # what the source says that it took
    published: str | None = None  # what the source measured, and where it says so


# Numbers that only a mistake puts elsewhere; trl.SFTConfig and peft.LoraConfig take them and fail long after, or never.
FIELD_RANGES = {
    "trainer": {
        "(0, inf)": "learning_rate num_train_epochs neftune_noise_alpha logging_steps eval_steps save_steps",
        "[0, inf)": "weight_decay warmup_steps max_grad_norm adam_epsilon dataloader_num_workers",
        "[0, 1)": "adam_beta1 adam_beta2 label_smoothing_factor",
        "[1, inf)": "max_length per_device_eval_batch_size gradient_accumulation_steps "
        "save_total_limit pad_to_multiple_of",
    },
    "adapter.lora": {"[1, inf)": "r", "(0, inf)": "lora_alpha", "[0, 1)": "lora_dropout"},
}
