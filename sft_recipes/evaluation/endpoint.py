"""A model at any OpenAI-compatible endpoint, asked by OpenAI's client library: the judge, or a maker of rows."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft_recipes.config.endpoint_options import EndpointOptions
from sft_recipes.errors import one_line

Prompt = str | Sequence[Mapping[str, Any]]  # the beginning of a raw text, or the messages of a conversation
RETRIES = 5  # of a request to a busy server, by the client library, which heeds Retry-After


@dataclass(frozen=True)
class Reply:
    """What came of one request: the text or why there is none, and tokens where the server counts them."""

    text: str = ""
    input_tokens: int | None = 0
    output_tokens: int | None = 0
    error: str | None = None
    cut: bool = False  # it reached the most tokens that were asked for


class Endpoint:
    """The client of one endpoint; `limits` go with every request, those that are None are left out."""

    def __init__(self, options: EndpointOptions, **limits: Any):
        from openai import DefaultHttpxClient, OpenAI  # imported late: it takes half a second

        logging.getLogger("httpx2").setLevel(logging.WARNING)  # which has a line on every request
        self.options, self.key = options, os.environ.get(options.api_key_env)
        self.limits = {"model": options.model} | {name: value for name, value in limits.items() if value is not None}
        # The client would send what it finds in OPENAI_ORG_ID, OPENAI_CUSTOM_HEADERS, … to any host
        hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("OPENAI_")}
        try:
            self.client = OpenAI(
                api_key=self.key or "none",
                base_url=options.url,
                timeout=options.timeout,
                max_retries=RETRIES,
                http_client=DefaultHttpxClient(follow_redirects=False),  # the key goes to no other host
            )
        finally:
            os.environ.update(hidden)

    def ask(self, prompt: Prompt) -> Reply:
        """The reply to one prompt: a completion of raw text, a chat completion of messages."""
        from openai import APIConnectionError, OpenAIError

        try:
            if isinstance(prompt, str):
                reply = self.client.completions.create(prompt=prompt, **self.limits)
                choice, text = reply.choices[0], reply.choices[0].text
            else:
                reply = self.client.chat.completions.create(messages=list(prompt), **self.limits)
                choice, text = reply.choices[0], reply.choices[0].message.content
        except OpenAIError as error:
            cause = error.__cause__ if isinstance(error, APIConnectionError) else None  # which it does not tell itself
            why = one_line(cause or error)[:300]
            return Reply(error=why.replace(self.key, "…") if self.key else why)
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            return Reply(error=f"not a completion: {one_line(error)[:200]}")
        read, written = getattr(reply.usage, "prompt_tokens", None), getattr(reply.usage, "completion_tokens", None)
        return Reply(text or "", read, written, cut=choice.finish_reason == "length")

    def describe_failure(self, error: str) -> str:
        """The line on an endpoint that does not answer."""
        key = "" if self.key else f" There is no key in {self.options.api_key_env}."
        return f"{self.options.place}: {self.options.model} at {self.options.url} does not answer: {error}.{key}"


def total_cost(replies: Sequence[Reply], options: EndpointOptions) -> dict[str, Any]:
    """Tokens and what they cost; None where the server did not count them, or no price is known."""
    read, written = ([getattr(reply, name) for reply in replies] for name in ("input_tokens", "output_tokens"))
    read, written = (None if None in tokens else sum(tokens) for tokens in (read, written))
    prices = options.price_per_million_input, options.price_per_million_output
    cost = None
    if None not in (read, written, *prices):
        cost = round((read * prices[0] + written * prices[1]) / 1e6, 6)
    return {"input_tokens": read, "output_tokens": written, "cost": cost}
