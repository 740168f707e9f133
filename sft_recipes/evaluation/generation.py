"""What a model says to questions, with its saved chat template, and whether it stops by itself."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, StoppingCriteria

from sft_recipes.evaluation.thinking import split_thought
from sft_recipes.modeling.inference import bf16_autocast, eval_mode, stop_token_ids

PROMPT_END = 32  # tokens, among which a template may open a thought
NEXT_QUESTION = "\nUser:"  # where the answer to a question in plain text ends

REPEAT_TOKENS, LONGEST_CYCLE = 64, 16  # an answer repeats when its last 64 tokens are one cycle of at most 16


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Mapping[str, Any]],
    batch_size: int,
    max_new_tokens: int,
    **sampling: Any,
) -> list[dict[str, Any]]:
    """What the model says in the place of each last answer: `prompt`, `reference`, `text`, and whether it `stops`.

    Where there is a thought before it, that is its `thought` of `thought_tokens`. A question's `prompt_text` is given
    to the model as it is, and the answer to it ends where another question begins. Greedy, or drawn with `temperature`,
    `top_p` and `seed`; the run's own random numbers stay as they are.
    """
    seed = sampling.pop("seed", 0)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=bool(sampling),
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    stops = stop_token_ids(config)
    asked, results = [(question, *split_last_answer(question["messages"])) for question in questions], []
    with torch.random.fork_rng(), eval_mode(model, use_cache=True), bf16_autocast(model):
        torch.manual_seed(seed)
        for start in tqdm(range(0, len(asked), batch_size), desc="Answering", leave=False):
            batch = asked[start : start + batch_size]
            prompts = [prompt_ids(tokenizer, question, past) for question, past, _ in batch]
            inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
            length = inputs.input_ids.shape[1]
            output = model.generate(**inputs, generation_config=config, stopping_criteria=[AllRepeat(length)])
            output = output[:, length:].tolist()
            for (question, past, reference), prompt, ids in zip(batch, prompts, output, strict=True):
                end = next((place for place, token in enumerate(ids) if token in stops), None)
                text, ended = tokenizer.decode(ids[:end], skip_special_tokens=False), end is not None
                if "prompt_text" in question:
                    text, another, _ = text.partition(NEXT_QUESTION)
                    text, ended = text.strip(), ended or bool(another)
                thought, text = split_thought(text, tokenizer.decode(prompt[-PROMPT_END:]))
                answer = {"text": text, "stops": ended}
                if thought:
                    size = len(tokenizer(thought, add_special_tokens=False).input_ids)
                    answer |= {"thought": thought, "thought_tokens": size}
                results.append({"prompt": past[-1]["content"], "reference": split_thought(reference)[1]} | answer)
    return results


def prompt_ids(
    tokenizer: PreTrainedTokenizerFast, question: Mapping[str, Any], past: Sequence[Mapping[str, Any]]
) -> list[int]:
    """What the model is given: the question's plain text, else what serving shows for the messages so far."""
    if "prompt_text" in question:
        return tokenizer(question["prompt_text"]).input_ids
    settings = question.get("chat_template_kwargs", {})
    options = {"tools": question.get("tools") or None, "add_generation_prompt": True, "return_dict": False}
    return tokenizer.apply_chat_template(past, **options, **settings)


class AllRepeat(StoppingCriteria):
    """Ends a batch in which every answer has ended or only repeats itself, as many a base model's do.

    `prompt` is the length of the padded prompts. Such answers are cut, and count as ones that do not stop.
    """

    def __init__(self, prompt: int):
        self.prompt = prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        tail = input_ids[:, self.prompt :][:, -REPEAT_TOKENS:]  # answers x tokens; ended ones repeat their padding
        repeat = torch.zeros(len(tail), dtype=torch.bool, device=tail.device)
        if tail.shape[1] == REPEAT_TOKENS and input_ids.shape[1] % LONGEST_CYCLE == 0:  # looking waits for the GPU
            for cycle in range(1, LONGEST_CYCLE + 1):
                repeat |= (tail[:, cycle:] == tail[:, :-cycle]).all(1)
        return repeat.all().expand(len(tail))


def is_answerable(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there is an answer to ask for: trained on as a whole, a text rather than a call, something before it."""
    past, reference = split_last_answer(messages)
    return bool(past) and bool(reference)


def split_last_answer(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], str]:
    """The messages before the last answer that is trained on as a whole, and that answer's text; '' where none is."""
    for index in reversed(range(len(messages))):
        message = messages[index]
        if message["role"] == "assistant" and message.get("train") is not False and "train_detail" not in message:
            return list(messages[:index]), message["content"]
    return [], ""
