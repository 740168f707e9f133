"""Random models that are made in a moment."""

from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 97


def small_llama() -> LlamaForCausalLM:
    """Two layers, untied, VOCABULARY tokens, the same weights each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Parrot(torch.nn.Module):
    """A model that says the same ids to every question, and keeps what it was asked."""

    def __init__(self, said: list[list[int]], stops: int | list[int]):
        super().__init__()
        self.said, self.device = said, torch.device("cpu")
        self.config, self.generation_config = SimpleNamespace(use_cache=False), SimpleNamespace(eos_token_id=stops)

    def generate(self, input_ids, attention_mask, generation_config, stopping_criteria):
        self.input_ids, self.attention_mask, self.options = input_ids, attention_mask, generation_config
        return torch.cat([input_ids, torch.tensor(self.said)], dim=1)


def slow_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """torch.nn.attention.varlen.varlen_attn from its documentation: (tokens, heads, width), one document at a time."""
    back, ahead = window_size
    assert (cu_seq_q == cu_seq_k).all() and max_q == max_k == cu_seq_q.diff().max() and ahead == 0
    repeats, rows = query.shape[1] // key.shape[1], []
    assert enable_gqa == (repeats > 1)
    for begin, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        for place in range(begin, end):
            first = begin if back < 0 else max(begin, place - back)
            keys, values = (one[first : place + 1].repeat_interleave(repeats, 1) for one in (key, value))
            weights = (torch.einsum("hd,nhd->hn", query[place], keys) * scale).softmax(-1)
            rows.append(torch.einsum("hn,nhd->hd", weights, values))
    return torch.stack(rows)
