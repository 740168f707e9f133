"""The embedded model and its data, rebuilt in about five minutes on a CPU: `python -m sft_recipes.tiny.build`."""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sft_recipes.tiny.world import documents, rows, world

HERE = Path(__file__).parent
END = "<|endoftext|>"


def build(folder: Path = HERE, prose: int = 50_000) -> None:
    """Write `model/` and `data/`: the base model and tokenizer, questions by entity, prose it has read and has not."""
    random = Random(0)
    entities = world()
    known, held_out = entities[: len(entities) * 4 // 5], entities[len(entities) * 4 // 5 :]
    read = documents(random, entities, prose)
    unread = sorted(set(documents(random, entities, 400)) - set(read))

    tokenizer = train_tokenizer(read)
    model = train_model(tokenizer, read)
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    names = {fact.subject for entity in held_out for fact in entity}
    write(folder / "data/train.jsonl", rows(random, known))
    write(folder / "data/held_out.jsonl", rows(random, held_out))
    write(
        folder / "data/prose.jsonl", [{"text": text} for text in read if not any(name in text for name in names)][:400]
    )
    write(folder / "data/prose_held_out.jsonl", [{"text": text} for text in random.sample(unread, 200)])


def train_tokenizer(texts: list[str], size: int = 1700) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of a base model: one special token, which ends documents and pads, and no chat template."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=size, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END, bos_token=END, pad_token=END)


def train_model(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], peak: float = 5e-3, batch_size: int = 8, length: int = 128
) -> LlamaForCausalLM:
    """A Llama that has read the texts once, packed end to end, the learning rate rising for 5 % and then falling to 0."""
    torch.manual_seed(0)
    batches = list(pack(tokenizer, texts, batch_size, length))
    model = LlamaForCausalLM(config(tokenizer))
    spare = torch.arange(len(tokenizer), model.config.vocab_size)
    model.get_input_embeddings().weight.register_hook(lambda gradient: gradient.index_fill(0, spare, 0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, len(batches), pct_start=0.05, cycle_momentum=False)
    for step, batch in enumerate(batches):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 500 == 0 or step == len(batches) - 1:
            print(f"step {step} of {len(batches)}, loss {loss.item():.3f}", flush=True)
    return model


def config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Half a million parameters; the embedding has spare rows beyond the tokenizer's length, as large models do."""
    return LlamaConfig(
        vocab_size=(len(tokenizer) // 64 + 1) * 64,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str], batch_size: int, length: int) -> Iterator[dict]:
    """Batches of shape (batch_size, length), cut from the documents laid end to end; positions keep them apart."""
    documents = tokenizer([text + END for text in texts])["input_ids"]
    ids = torch.tensor([token for document in documents for token in document])
    positions = torch.tensor([position for document in documents for position in range(len(document))])
    step = batch_size * length
    for start in range(0, len(ids) - step + 1, step):
        batch = ids[start : start + step].view(batch_size, length)
        yield {"input_ids": batch, "labels": batch, "position_ids": positions[start : start + step].view_as(batch)}


def write(path: Path, lines: list[dict[str, str]]) -> None:
    """One JSON object on each line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    build()
