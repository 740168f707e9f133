"""The config's `generate`: which rows a model makes, and which model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sft_recipes.config.judge_options import EndpointOptions
from sft_recipes.config.validation import Count, NotNegative, Share
from sft_recipes.errors import ConfigError

PROMPTS = ("instructions.txt", "is_classification.txt", "instance.txt", "labelled_instance.txt")


@dataclass(frozen=True)
class GenerateOptions:
    """The config's `generate`."""

    what: Literal["self_instruct", "answers", "replay"] = "self_instruct"  # tasks, answers to yours, or raw text
    rows: Count | None = None  # in the file in the end; null is 100, or an answer to each of your instructions
    out: str = "generated.jsonl"  # every row is added as it is made; the same command goes on where it was stopped
    source: str | None = None  # answers: the file of your instructions; self_instruct: of seed tasks, null takes ours
    endpoint: EndpointOptions | None = None  # {url: https://…/v1, model: NAME}; null is the model of the config
    temperature: NotNegative | None = 1.0  # 0 is greedy; null leaves it to the endpoint
    max_new_tokens: Count = 1024  # an answer that is longer is left out, raw text is cut
    batch_size: Count = 8  # of the model of the config; an endpoint has a concurrency
    rouge: Share = 0.7  # self_instruct: an instruction with such a ROUGE-L to another one is left out
    prompts: str = str(Path(__file__).parents[1] / "making" / "prompts")  # the folder of the prompts of self_instruct

    def __post_init__(self):
        if self.what == "answers" and self.source is None:
            raise ConfigError(
                "generate.what=answers needs your instructions. Write generate.source=my_questions.jsonl."
            )
        for name in PROMPTS if self.what == "self_instruct" else ():
            if not Path(self.prompts, name).is_file():
                raise ConfigError(f"generate.prompts={self.prompts}: there is no {name}.")
