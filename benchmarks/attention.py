"""Packed rows on a CPU: one dense mask against sdpa document by document: `python benchmarks/attention.py`."""

import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sft_recipes.modeling.packed_attention import BY_DOCUMENT

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 1000,
}
DOCUMENT, ROUNDS = 160, 3  # tokens a document, as the rows of ../shared/data have on average


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=8192, **SHAPE))
    print(f"{model.num_parameters():,} parameters, {torch.get_num_threads()} threads, documents of {DOCUMENT} tokens\n")
    print("tokens a row   dense mask   by document   ratio   largest difference of logits")
    for tokens in (2048, 8192):
        batch = packed_row(tokens)
        seconds, logits = {}, {}
        for name in ("sdpa", BY_DOCUMENT) * ROUNDS:  # taking turns, the best of each counts
            model.set_attn_implementation(name)
            start = time.perf_counter()
            logits[name] = step(model, batch)
            seconds[name] = min(time.perf_counter() - start, seconds.get(name, 1e9))
        difference = (logits["sdpa"] - logits[BY_DOCUMENT]).abs().max().item()
        dense, apart = seconds["sdpa"], seconds[BY_DOCUMENT]
        print(f"{tokens:>12} {dense:>10.2f} s {apart:>11.2f} s {dense / apart:>7.2f} {difference:>10.1g}")


def packed_row(tokens: int) -> dict[str, torch.Tensor]:
    """One packed row of equal documents, as TRL's padding-free collator gives it."""
    ends = torch.tensor([*range(0, tokens, DOCUMENT), tokens], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in ends.diff().tolist()])[None]
    ids = torch.randint(1000, (1, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "position_ids": positions, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends}


def step(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of one forward pass, with the backward pass done too."""
    logits = model(**batch, use_cache=False).logits
    logits.square().mean().backward()
    model.zero_grad()
    return logits.detach()


if __name__ == "__main__":
    main()
