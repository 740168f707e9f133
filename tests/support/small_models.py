"""Random models that are made in a moment."""

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
