"""The shape of a model whose weights take most of a step's memory, and its parameters, by hand."""

from transformers import LlamaConfig

WIDE = LlamaConfig(vocab_size=1000, hidden_size=512, intermediate_size=1280, num_hidden_layers=5, num_attention_heads=4)
WIDE_PARAMETERS = 2 * 1000 * 512 + 5 * (4 * 512**2 + 3 * 512 * 1280 + 2 * 512) + 512
