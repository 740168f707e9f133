"""Replies to many prompts, as they come: of a model at an endpoint, by OpenAI's client library, or of the run's own."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch

from sft_recipes.config.endpoint_options import EndpointOptions, GenerateOptions
from sft_recipes.config.schema import Config
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.errors import ConfigError
from sft_recipes.evaluation.endpoint import Endpoint, Prompt, Reply
from sft_recipes.evaluation.generation import generate_answers
from sft_recipes.modeling.adapters import build_quantization_config
from sft_recipes.modeling.inference import bf16_autocast, eval_mode
from sft_recipes.modeling.loading import load_model, load_tokenizer


class EndpointModel:
    """A model at any OpenAI-compatible endpoint."""

    def __init__(self, endpoint: EndpointOptions, options: GenerateOptions):
        self.name, self.at_once = endpoint.model, endpoint.concurrency
        self.endpoint = Endpoint(endpoint, max_tokens=options.max_new_tokens, temperature=options.temperature)
        self.failed = 0  # requests in a row

    def ask(self, prompts: Sequence[Prompt], seed: int) -> Iterator[tuple[int, Reply]]:
        """The number of each prompt and its reply, in the order in which they come.

        Raises ConfigError once as many requests in a row as are made at once have failed, at least 3.
        """
        pool = ThreadPoolExecutor(self.at_once)
        try:
            numbers = {pool.submit(self.endpoint.ask, prompt): number for number, prompt in enumerate(prompts)}
            for done in as_completed(numbers):
                reply = done.result()
                self.failed = self.failed + 1 if reply.error else 0
                if self.failed >= max(3, self.at_once):
                    raise ConfigError(
                        f"{self.endpoint.describe_failure(reply.error)} Rows made so far are kept, the same command "
                        "goes on with them."
                    )
                yield numbers[done], reply
        finally:
            pool.shutdown(cancel_futures=True)


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
        """As that of `EndpointModel`, batch by batch."""
        if prompts and isinstance(prompts[0], str):
            yield from enumerate(self.continue_texts(len(prompts), seed))
            return
        asked = [{"messages": [*prompt, {"role": "assistant", "content": "…"}]} for prompt in prompts]
        size, how = self.at_once, {"temperature": self.options.temperature} if self.options.temperature else {}
        for start in range(0, len(asked), size):
            batch, how["seed"] = asked[start : start + size], seed + start
            answers = generate_answers(self.model, self.tokenizer, batch, size, self.options.max_new_tokens, **how)
            for number, answer in enumerate(answers, start):
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


Model = EndpointModel | LocalModel  # whose `name` goes into every row, and which is asked so many prompts `at_once`
