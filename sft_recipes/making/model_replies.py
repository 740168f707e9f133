"""Replies to many prompts, as they come: of a model at an endpoint, by OpenAI's client library, or of the run's own."""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sft_recipes.config.generate_options import GenerateOptions
from sft_recipes.config.judge_options import EndpointOptions
from sft_recipes.config.schema import Config
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.errors import ConfigError, one_line
from sft_recipes.evaluation.generation import generate_answers
from sft_recipes.evaluation.judge import JudgeReply
from sft_recipes.modeling.adapters import build_quantization_config
from sft_recipes.modeling.inference import bf16_autocast, eval_mode
from sft_recipes.modeling.loading import load_model, load_tokenizer

Prompt = str | Sequence[Mapping[str, Any]]  # the beginning of a raw text, or the messages of a conversation
RETRIES = 5  # of a request to a busy server, by the client library, which heeds Retry-After


@dataclass(frozen=True)
class Reply(JudgeReply):
    """What came of one request."""

    cut: bool = False  # it did not end within generate.max_new_tokens


class Model(Protocol):
    """What is asked: `name` goes into every row, and so many prompts are asked at once."""

    name: str
    at_once: int

    def ask(self, prompts: Sequence[Prompt], seed: int) -> Iterator[tuple[int, Reply]]:
        """The number of each prompt and its reply, in the order in which they come."""


class EndpointModel:
    """A model at any OpenAI-compatible endpoint."""

    def __init__(self, endpoint: EndpointOptions, options: GenerateOptions):
        try:
            from openai import DefaultHttpxClient, OpenAI
        except ImportError as error:
            raise ConfigError("generate.endpoint needs a package: pip install 'sft-recipes[generate]'.") from error
        self.endpoint, self.name, self.at_once = endpoint, endpoint.model, endpoint.concurrency
        self.key = os.environ.get(endpoint.api_key_env)
        self.limits: dict[str, Any] = {"model": endpoint.model, "max_tokens": options.max_new_tokens}
        if options.temperature is not None:
            self.limits["temperature"] = options.temperature
        self.failed = 0  # requests in a row
        # The client would send what it finds in OPENAI_ORG_ID, OPENAI_CUSTOM_HEADERS, … to any host
        hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("OPENAI_")}
        try:
            self.client = OpenAI(
                api_key=self.key or "none",
                base_url=endpoint.url,
                timeout=endpoint.timeout,
                max_retries=RETRIES,
                http_client=DefaultHttpxClient(follow_redirects=False),  # the key goes to no other host
            )
        finally:
            os.environ.update(hidden)

    def ask(self, prompts: Sequence[Prompt], seed: int) -> Iterator[tuple[int, Reply]]:
        """As `Model`; raises ConfigError once as many requests in a row as are made at once have failed, at least 3."""
        pool = ThreadPoolExecutor(self.at_once)
        try:
            numbers = {pool.submit(self.request_reply, prompt): number for number, prompt in enumerate(prompts)}
            for done in as_completed(numbers):
                reply = done.result()
                self.failed = self.failed + 1 if reply.error else 0
                if self.failed >= max(3, self.at_once):
                    raise ConfigError(
                        f"generate.endpoint: {self.name} at {self.endpoint.url} does not answer: {reply.error}."
                        + ("" if self.key else f" There is no key in {self.endpoint.api_key_env}.")
                        + " Rows made so far are kept, the same command goes on with them."
                    )
                yield numbers[done], reply
        finally:
            pool.shutdown(cancel_futures=True)

    def request_reply(self, prompt: Prompt) -> Reply:
        """The reply to one prompt: a completion of raw text, a chat completion of messages."""
        from openai import OpenAIError

        try:
            if isinstance(prompt, str):
                said = self.client.completions.create(prompt=prompt, **self.limits)
                choice, text = said.choices[0], said.choices[0].text
            else:
                said = self.client.chat.completions.create(messages=list(prompt), **self.limits)
                choice, text = said.choices[0], said.choices[0].message.content
        except OpenAIError as error:
            why = one_line(error)[:300]
            return Reply(error=why.replace(self.key, "…") if self.key else why)
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            return Reply(error=f"not a completion: {one_line(error)[:200]}")
        read, written = getattr(said.usage, "prompt_tokens", None), getattr(said.usage, "completion_tokens", None)
        return Reply(text or "", read, written, cut=choice.finish_reason == "length")


class LocalModel:
    """The config's own model, on a GPU where there is one."""

    def __init__(self, config: Config):
        self.tokenizer, template, self.new_token_ids = load_tokenizer(config.model)
        stops = Encoder(self.tokenizer, template).answers.stops
        quantization = build_quantization_config(config.adapter)
        self.model = load_model(config.model, quantization, True, self.tokenizer, stops, self.new_token_ids)
        if torch.cuda.is_available() and quantization is None:
            self.model.to("cuda")
        self.name, self.at_once, self.options = config.model.id, config.generate.batch_size, config.generate

    def ask(self, prompts: Sequence[Prompt], seed: int) -> Iterator[tuple[int, Reply]]:
        """As `Model`, batch by batch."""
        if prompts and isinstance(prompts[0], str):
            yield from enumerate(self.continue_texts(len(prompts), seed))
            return
        sampling = {"temperature": self.options.temperature} if self.options.temperature else {}
        for start in range(0, len(prompts), self.at_once):
            batch = [
                {"messages": [*prompt, {"role": "assistant", "content": "…"}]}
                for prompt in prompts[start : start + self.at_once]
            ]
            said = generate_answers(
                self.model,
                self.tokenizer,
                batch,
                self.at_once,
                self.options.max_new_tokens,
                seed=seed + start,
                **sampling,
            )
            for number, answer in enumerate(said, start):
                yield number, Reply(answer["text"], None, None, cut=not answer["stops"])

    def continue_texts(self, number: int, seed: int) -> list[Reply]:
        """Raw texts of the model's own, begun with its token for the beginning of one, else for the end of one."""
        model, ends = self.model, self.model.generation_config.eos_token_id
        first = model.config.get_text_config().bos_token_id
        start = torch.full((number, 1), ends[-1] if first is None else first, device=model.device)
        how = {"do_sample": True, "temperature": self.options.temperature} if self.options.temperature else {}
        with torch.no_grad(), torch.random.fork_rng(), eval_mode(model, use_cache=True), bf16_autocast(model):
            torch.manual_seed(seed)
            made = model.generate(
                start,
                attention_mask=torch.ones_like(start),
                max_new_tokens=self.options.max_new_tokens,
                suppress_tokens=self.new_token_ids or None,  # the template's, which the base has never seen
                **how,
            )[:, 1:].tolist()
        texts = ([*ids, ends[-1]] for ids in made)
        ended = [ids[: next(place for place, token in enumerate(ids) if token in ends)] for ids in texts]
        return [Reply(self.tokenizer.decode(ids, skip_special_tokens=True), None, None) for ids in ended]
