"""What a model answers to held-out questions, whether it stops by itself, and what it remembers of raw text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from sft_recipes.binding import ConfigError
from sft_recipes.encoding import Encoder


@dataclass(frozen=True)
class Options:
    """The config's `evaluate` group."""

    rows: int = 20  # held-out questions that are asked; 0 asks none
    batch_size: int = 16
    max_new_tokens: int = 256
    raw_text: str | None = None  # a .txt or .jsonl file with a text column

    def __post_init__(self):
        if self.rows < 0 or self.batch_size < 1 or self.max_new_tokens < 1:
            raise ConfigError("evaluate.rows should not be negative, batch_size and max_new_tokens at least 1.")
        if self.raw_text and not (Path(self.raw_text).is_file() and self.raw_text.endswith((".txt", ".jsonl"))):
            raise ConfigError(f"evaluate.raw_text={self.raw_text} should be a .txt or .jsonl file that is there.")


def measure(model: PreTrainedModel, encoder: Encoder, questions: Sequence[Mapping], options: Options) -> dict[str, Any]:
    """`exact_match` and `stops` (shares of the answers), `raw_text_loss` (nats a token), and the `answers` themselves.

    Asking is greedy, with the saved chat template. What was not asked for is not in the result.
    """
    training, use_cache = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    found: dict[str, Any] = {}
    asked = [question for question in questions if answerable(question["messages"])][: options.rows]
    if asked:
        found["answers"] = answers(model, encoder.tokenizer, asked, options)
        count = len(found["answers"])
        found["exact_match"] = sum(answer["text"] == answer["reference"] for answer in found["answers"]) / count
        found["stops"] = sum(answer["stops"] for answer in found["answers"]) / count
    if options.raw_text:
        found["raw_text_loss"] = raw_text_loss(model, encoder, options.raw_text, options.batch_size)
    model.config.use_cache = use_cache
    model.train(training)
    return found


@torch.no_grad()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, questions: Sequence[Mapping[str, Any]], options: Options
) -> list[dict[str, Any]]:
    """What the model says in the place of each last answer: `prompt`, `reference`, `text`, and whether it `stops`."""
    config = GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        do_sample=False,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    stops = set(config.eos_token_id)
    asked = [(question, *history(question["messages"])) for question in questions]
    results = []
    for start in tqdm(range(0, len(asked), options.batch_size), desc="Answering", leave=False):
        batch = asked[start : start + options.batch_size]
        prompts = [
            tokenizer.apply_chat_template(
                past, tools=question.get("tools") or None, add_generation_prompt=True, return_dict=False
            )
            for question, past, _ in batch
        ]
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
        output = model.generate(**inputs, generation_config=config)[:, inputs.input_ids.shape[1] :].tolist()
        for (_, past, reference), ids in zip(batch, output, strict=True):
            end = next((place for place, token in enumerate(ids) if token in stops), None)
            text = tokenizer.decode(ids[:end], skip_special_tokens=False)
            results.append(
                {"prompt": past[-1]["content"], "reference": reference, "text": text, "stops": end is not None}
            )
    return results


def answerable(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether something stands before the last answer, and that answer is a text rather than a call of a tool."""
    past, reference = history(messages)
    return bool(past) and bool(reference)


def history(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], str]:
    """The messages before the last answer, and that answer's text."""
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    return list(messages[:last]), messages[last]["content"]


@torch.no_grad()
def raw_text_loss(model: PreTrainedModel, encoder: Encoder, path: str, batch_size: int) -> float:
    """The mean loss in nats over every token of a text file's documents but the first of each."""
    kind = "text" if path.endswith(".txt") else "json"
    rows = load_dataset(kind, data_files=path, split="train")
    if "text" not in rows.column_names:
        raise ConfigError(f"evaluate.raw_text={path} has no text column, but {', '.join(rows.column_names)}.")
    texts = [text for text in rows["text"] if text.strip()]
    ids = encoder.encode([{"text": text} for text in texts])["input_ids"]
    ids = [row[: getattr(model.config, "max_position_embeddings", len(row))].tolist() for row in ids]
    total, count = 0.0, 0
    for start in range(0, len(ids), batch_size):
        batch = encoder.tokenizer.pad(
            {"input_ids": ids[start : start + batch_size]}, padding_side="right", return_tensors="pt"
        )
        batch = batch.to(model.device)
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        labels = batch.input_ids[:, 1:].masked_fill(batch.attention_mask[:, 1:] == 0, -100)
        total += torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count
