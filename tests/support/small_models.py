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
