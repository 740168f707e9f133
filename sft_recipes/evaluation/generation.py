"""What a model says to questions, with its saved chat template, and whether it stops by itself."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from sft_recipes.modeling.inference import bf16_autocast, eval_mode


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

    Greedy, or drawn with `temperature`, `top_p` and `seed`; the run's own random numbers stay as they are.
    """
    seed = sampling.pop("seed", 0)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=bool(sampling),
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    asked, results = [(question, *split_last_answer(question["messages"])) for question in questions], []
    with torch.random.fork_rng(), eval_mode(model, use_cache=True), bf16_autocast(model):
        torch.manual_seed(seed)
        for start in tqdm(range(0, len(asked), batch_size), desc="Answering", leave=False):
            batch = asked[start : start + batch_size]
            prompts = [
                tokenizer.apply_chat_template(
                    past,
                    tools=question.get("tools") or None,
                    add_generation_prompt=True,
                    return_dict=False,
                    **question.get("chat_template_kwargs", {}),
                )
                for question, past, _ in batch
            ]
            inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
            output = model.generate(**inputs, generation_config=config)[:, inputs.input_ids.shape[1] :].tolist()
            for (_, past, reference), ids in zip(batch, output, strict=True):
                end = next((place for place, token in enumerate(ids) if token in stops), None)
                said = {"text": tokenizer.decode(ids[:end], skip_special_tokens=False), "stops": end is not None}
                results.append({"prompt": past[-1]["content"], "reference": reference} | said)
    return results


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
