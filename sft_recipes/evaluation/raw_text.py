"""The loss on raw text, by which a run shows what it forgot, and the verdict on that."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedModel

from sft_recipes.data.reading import Fault
from sft_recipes.data.sources import asked_source, load_rows
from sft_recipes.data.token_rows import to_dataset
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.errors import ConfigError, DataError
from sft_recipes.evaluation.token_loss import token_losses

Verdict = Literal["passed", "warning", "failed"]
MAX_DOCUMENTS = 2000  # documents of a dataset that are read


def load_documents(source: str | Mapping[str, Any]) -> list[str]:
    """The texts of a file, of a dataset on the hub, or of what a mapping with a source's fields names.

    They are read as the rows of `data` are, with the same errors. Raises ConfigError where there is no column `text`.
    """
    chosen = asked_source("evaluate.raw_text", source)
    rows = load_rows("evaluate.raw_text", chosen, chosen.split or "train")
    texts = []
    for _, row, place in rows.records(range(min(MAX_DOCUMENTS, len(rows)))):
        if isinstance(row, Fault):
            raise DataError(f"evaluate.raw_text: {place}: {row}")
        texts += [text for text in [row.get("text")] if isinstance(text, str) and text.strip()]
    if "text" not in rows.columns:
        raise ConfigError(f"evaluate.raw_text has no text column, but {', '.join(rows.columns)}.")
    if not texts:
        raise ConfigError("evaluate.raw_text has no text in it.")
    return texts


def evaluate_raw_text(model: PreTrainedModel, encoder: Encoder, texts: list[str], batch_size: int) -> dict[str, Any]:
    """`loss`, the mean in nats over every token but each document's first, and `bits_per_byte` of the same tokens.

    Bits per byte are comparable between tokenizers. Documents are cut where the model's positions end. Raises
    ConfigError where each of them is one token.
    """
    ids = encoder.encode([{"text": text} for text in texts])["input_ids"]
    longest = getattr(model.config, "max_position_embeddings", None)
    ids = [row[:longest] for row in ids]
    shown = encoder.tokenizer.batch_decode([row[1:] for row in ids], skip_special_tokens=True)
    size = sum(len(text.encode()) for text in shown)
    if not size:
        raise ConfigError("evaluate.raw_text has no text of two tokens or more, so it has no loss. Give a longer one.")
    rows = to_dataset({"input_ids": ids, "labels": ids})
    losses = np.concatenate(token_losses(model, encoder.tokenizer, rows, batch_size))
    bits = float(losses.sum()) / math.log(2) / size
    return {"loss": float(losses.mean()), "bits_per_byte": bits, "tokens": len(losses), "bytes": size}


def classify_regression(change: float, warn_above: float = 0.10, fail_above: float = 0.15) -> Verdict:
    """The verdict on a relative rise of the loss on raw text (0.10 is 10 %); NaN has failed.

    >>> classify_regression(0.08, fail_above=0.05)
    'failed'
    >>> [classify_regression(change) for change in (-0.02, 0.10, 0.11, 0.15, 0.16, float("nan"))]
    ['passed', 'passed', 'warning', 'warning', 'failed', 'failed']
    """
    if not change <= fail_above:  # first, since a user may lower this limit alone, below the other
        return "failed"
    return "warning" if change > warn_above else "passed"
