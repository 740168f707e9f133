"""The config's `evaluate.judge` and `generate.endpoint`, and which key may go to which host."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

from sft_recipes.config.validation import Count, Positive
from sft_recipes.errors import ConfigError


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
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"{self.place}.url={self.url} should begin with http:// or https://.")
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
