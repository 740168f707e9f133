"""Training loss and one SGD step against a float64 reference that sees one document at a time."""

import numpy as np
import pytest
import torch
from sft_recipes.encoding import IGNORED
from sft_recipes.rows import packed, table
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

VOCABULARY, ROWS, RATE = 97, 12, 0.5


@pytest.fixture(scope="module")
def documents():
    """Twelve documents of 5 to 40 tokens, the first third of each without loss."""
    random = np.random.default_rng(0)
    ids = [random.integers(3, VOCABULARY, size=random.integers(5, 41)).astype(np.int32) for _ in range(ROWS)]
    labels = [np.where(np.arange(len(row)) < len(row) // 3, IGNORED, row).astype(np.int32) for row in ids]
    numbers = {"source": np.zeros(ROWS, dtype=int), "row": np.arange(ROWS)}
    return table({"input_ids": ids, "labels": labels}, numbers)


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def reference(documents) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss over all supervised tokens, and the weights after one step of plain gradient descent, in float64."""
    model = small_model().double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in documents:
        logits = model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        labels = torch.tensor(row["labels"])[1:]
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        count += int((labels != IGNORED).sum())
    (total / count).backward()
    stepped = {name: value - RATE * value.grad for name, value in model.named_parameters()}
    return (total / count).item(), stepped


@pytest.mark.parametrize("rows, accumulated, packing", [(12, 1, 0), (1, 12, 0), (3, 4, 0), (5, 3, 0), (8, 1, 64), (1, 9, 64)])
def test_loss_and_step_are_the_mean_over_supervised_tokens(
    documents, tmp_path, chat_tokenizer, rows, accumulated, packing
):
    tokenizer, _, _ = chat_tokenizer("llama3", "chatml")
    train = packed(documents, packing, seed=0) if packing else documents
    assert rows * accumulated >= len(train)  # one step sees everything
    arguments = SFTConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulated,
        optim="sgd", learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=1e9, weight_decay=0.0, logging_steps=1,
        bf16=False, use_cpu=True, activation_checkpointing=False, report_to="none", save_strategy="no",
        packing=bool(packing), max_length=packing or 64, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    trainer = SFTTrainer(small_model(), arguments, train_dataset=train, processing_class=tokenizer)
    trainer.train()
    loss, weights = reference(documents)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, abs=5e-6)
    for name, value in trainer.model.named_parameters():
        assert torch.allclose(value.double(), weights[name], atol=5e-6), name
