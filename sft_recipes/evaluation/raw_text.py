"""The loss on raw text, by which a run shows what it forgot."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import load_dataset
from datasets.exceptions import DatasetsError
from transformers import PreTrainedModel

from sft_recipes.data.sources import BUILDERS
from sft_recipes.data.token_rows import to_dataset
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.errors import ConfigError, one_line
from sft_recipes.evaluation.token_loss import token_losses

MAX_DOCUMENTS = 2000  # documents of a dataset that are read


def load_documents(source: str | Mapping[str, Any]) -> list[str]:
    """The texts of a file, of a dataset on the hub, or of what a mapping of `load_dataset`'s arguments names.

    Raises ConfigError where it is not to be had, or has no column `text`.
    """
    if isinstance(source, str):
        is_file = Path(source).suffix in BUILDERS
        source = {"path": BUILDERS[Path(source).suffix], "data_files": source} if is_file else {"path": source}
    try:
        rows = load_dataset(**{"split": "train", **source})
    except (DatasetsError, OSError, ValueError, TypeError, StopIteration) as error:
        name = source.get("data_files") or source.get("path")
        raise ConfigError(
            f"evaluate.raw_text={name} should be a file ({', '.join(BUILDERS)}) or a dataset: {one_line(error)[:160]}"
        ) from error
    if "text" not in rows.column_names:
        raise ConfigError(f"evaluate.raw_text has no text column, but {', '.join(rows.column_names)}.")
    texts = rows.select(range(min(MAX_DOCUMENTS, len(rows))))["text"]
    texts = [text for text in texts if isinstance(text, str) and text.strip()]
    if not texts:
        raise ConfigError("evaluate.raw_text has no text in it.")
    return texts


def evaluate_raw_text(model: PreTrainedModel, encoder: Encoder, texts: list[str], batch_size: int) -> dict[str, Any]:
    """`loss`, the mean in nats over every token but each document's first, and `bits_per_byte` of the same tokens.

    Bits per byte are comparable between tokenizers. Documents are cut where the model's positions end.
    """
    ids = encoder.encode([{"text": text} for text in texts])["input_ids"]
    longest = getattr(model.config, "max_position_embeddings", None)
    ids = [row[:longest] for row in ids]
    losses = np.concatenate(
        token_losses(model, encoder.tokenizer, to_dataset({"input_ids": ids, "labels": ids}), batch_size)
    )
    shown = encoder.tokenizer.batch_decode([row[1:] for row in ids], skip_special_tokens=True)
    size = sum(len(text.encode()) for text in shown)
    bits = float(losses.sum()) / math.log(2) / size
    return {"loss": float(losses.mean()), "bits_per_byte": bits, "tokens": len(losses), "bytes": size}
