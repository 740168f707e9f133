"""Raw rows or messages become a padded batch, for notebooks, plain PyTorch loops and streaming."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from sft_recipes.data.detection import detect_formatter
from sft_recipes.data.formatters import FORMATTERS, Conversation
from sft_recipes.encoding.chat_template import prepare_tokenizer
from sft_recipes.encoding.encoder import IGNORE_INDEX, Encoder


class CompletionOnlyCollator:
    """Pads what the encoder makes of a list of rows, to be given to `torch.utils.data.DataLoader(collate_fn=…)`.

    `chat_template` is the name of one of ours, a path, or None for the tokenizer's own. Rows longer than `max_length`
    are cut, as every collator cuts them; without it nothing is cut.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        chat_template: str | None = None,
        train_on: str = "assistant",
        padding_side: str = "right",
        max_length: int | None = None,
    ):
        template, _ = prepare_tokenizer(tokenizer, chat_template)
        self.encoder = Encoder(tokenizer, template)
        self.train_on, self.padding_side, self.max_length = train_on, padding_side, max_length

    def __call__(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels`, int64 of shape (rows, longest); padding has label -100."""
        encoded = self.encoder.encode([to_conversation(row) for row in rows], self.train_on)
        return {
            "input_ids": self.pad(encoded["input_ids"], self.encoder.tokenizer.pad_token_id),
            "attention_mask": self.pad([torch.ones(len(ids)) for ids in encoded["input_ids"]], 0),
            "labels": self.pad(encoded["labels"], IGNORE_INDEX),
        }

    def pad(self, rows: Sequence[Any], value: int) -> torch.Tensor:
        """Rows of unequal length as one tensor."""
        rows = [torch.as_tensor(row, dtype=torch.int64)[: self.max_length] for row in rows]
        return torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=value, padding_side=self.padding_side
        )


def to_conversation(row: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Conversation:
    """A list of messages, or a row in any format whose columns tell it, as a conversation."""
    if not isinstance(row, Mapping):
        row = {"messages": list(row)}
    columns = detect_formatter(row)
    return FORMATTERS[columns.pop("name")](row, **columns)
