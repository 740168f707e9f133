"""The config's `generate`, `generate.endpoint` and `evaluate.judge`, and which key may go to which host."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal
from urllib.parse import urlsplit

from sft_recipes.config.validation import Count, NotNegative, Positive, Share
from sft_recipes.errors import ConfigError

PROMPTS = ("instructions.txt", "is_classification.txt", "instance.txt", "labelled_instance.txt")


@dataclass(frozen=True)
class EndpointOptions:
    """A model at an OpenAI-compatible endpoint: the config's `generate.endpoint`."""

    place: ClassVar[str] = "generate.endpoint"
    url: str  # up to /v1: https://api.openai.com/v1, http://localhost:8000/v1
    model: str
    api_key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the key, where one is needed
    price_per_million_input: float | None = None
    price_per_million_output: float | None = None
    concurrency: Count = 4
    timeout: Positive = 120.0  # seconds a request

    def __post_init__(self):
        try:
            host = urlsplit(self.url).hostname
        except ValueError:  # http://[::1
            host = None
        if not host or not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"{self.place}.url={self.url} should be an address such as https://HOST/v1.")
        check_key_name(self.api_key_env, self.url, self.place)


@dataclass(frozen=True)
class JudgeOptions(EndpointOptions):
    """The config's `evaluate.judge`."""

    place: ClassVar[str] = "evaluate.judge"
    prompt: str = str(Path(__file__).parents[1] / "evaluation" / "judge.txt")  # with {prompt}, {first} and {second}
    rows: Count | None = None  # judge only the first rows; null judges all
    temperature: float | None = 0.0  # null leaves it out, for models that take none

    def __post_init__(self):
        super().__post_init__()
        if not Path(self.prompt).is_file():
            raise ConfigError(f"evaluate.judge.prompt={self.prompt}: there is no such file.")
        text = Path(self.prompt).read_text(encoding="utf-8")
        if missing := [name for name in ("{prompt}", "{first}", "{second}") if name not in text]:
            raise ConfigError(f"evaluate.judge.prompt={self.prompt} should hold {' and '.join(missing)}.")


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


def check_key_name(name: str, url: str, place: str) -> None:
    """Raises ConfigError where a key would go to somebody else's host, or where `name` is the key itself.

    A recipe of a stranger's could send any variable to its own endpoint. The first word of the name has to be in the
    host (MISTRAL_API_KEY for api.mistral.ai), or JUDGE or GENERATE, by the `place`; this machine gets any, and so does
    whom the user allows.
    """
    if not re.fullmatch("[A-Z][A-Z0-9_]*", name):  # the value is not printed: it may be a key
        raise ConfigError(
            f"{place}.api_key_env should be the name of an environment variable, such as OPENAI_API_KEY, and not "
            "a key itself, which would be saved with the run."
        )
    purpose = "judge" if place == "evaluate.judge" else "generate"
    own, allowing = f"{purpose.upper()}_API_KEY", f"SFT_RECIPES_{purpose.upper()}_KEYS"
    host, allowed = urlsplit(url).hostname or "", os.environ.get(allowing, "").split(",")
    local = host in ("localhost", "127.0.0.1", "::1")
    fits = local or name.partition("_")[0].lower() in (*host.split(".")[-2:], purpose)
    if name in os.environ and not fits and name not in allowed:
        raise ConfigError(
            f"{place} would send {name} to {host}. Put that host's key into {own} and write "
            f"{place}.api_key_env={own}, or allow it with {allowing}={name}."
        )
