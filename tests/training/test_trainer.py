"""Training loss and one SGD step against a float64 reference that sees one document at a time."""

import numpy as np
import pytest
import torch
from trl import SFTConfig, SFTTrainer

from sft_recipes.data.packing import pack_rows
from sft_recipes.data.token_rows import to_dataset
from sft_recipes.encoding.encoder import IGNORE_INDEX
from sft_recipes.evaluation.token_loss import evaluate_loss, flatten_loss
from sft_recipes.training.trainer import NonFiniteLossError, evaluate_with, watch
from support.small_models import VOCABULARY, small_llama

ROWS, RATE = 12, 0.5


@pytest.fixture(scope="module")
def documents():
    """Twelve documents of 5 to 40 tokens, the first third of each without loss."""
    random = np.random.default_rng(0)
    ids = [random.integers(3, VOCABULARY, size=random.integers(5, 41)).astype(np.int32) for _ in range(ROWS)]
    labels = [np.where(np.arange(len(row)) < len(row) // 3, IGNORE_INDEX, row).astype(np.int32) for row in ids]
    numbers = {"source": np.zeros(ROWS, dtype=int), "row": np.arange(ROWS)}
    return to_dataset({"input_ids": ids, "labels": labels}, numbers)


def reference(documents) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss over all supervised tokens, and the weights after one step of plain gradient descent, in float64."""
    model = small_llama().double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in documents:
        logits = model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        labels = torch.tensor(row["labels"])[1:]
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        count += int((labels != IGNORE_INDEX).sum())
    (total / count).backward()
    stepped = {name: value - RATE * value.grad for name, value in model.named_parameters()}
    return (total / count).item(), stepped


def trainer(documents, folder, tokenizer, rows: int, accumulated: int, packing: int, **arguments) -> SFTTrainer:
    arguments = SFTConfig(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulated,
        optim="sgd", learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=1e9, weight_decay=0.0, logging_steps=1,
        bf16=False, use_cpu=True, activation_checkpointing=False, report_to="none", save_strategy="no",
        packing=bool(packing), max_length=packing or 64, dataset_kwargs={"skip_prepare_dataset": True}, **arguments,
    )  # fmt: skip
    train = pack_rows(documents, packing, seed=0) if packing else documents
    built = SFTTrainer(
        small_llama(), arguments, train_dataset=train, eval_dataset=documents, processing_class=tokenizer
    )
    watch(built)
    evaluate_with(built, lambda: flatten_loss(evaluate_loss(
        built.model, tokenizer, documents, 0, ["all"], built.args.per_device_eval_batch_size
    )))  # fmt: skip
    return built


ONE_STEP = [(12, 1, 0), (1, 12, 0), (3, 4, 0), (5, 3, 0), (8, 1, 64), (1, 9, 64)]


@pytest.mark.parametrize("rows, accumulated, packing", ONE_STEP)
def test_loss_and_step_are_the_mean_over_supervised_tokens(
    documents, tmp_path, chat_tokenizer, rows, accumulated, packing
):
    tokenizer, _, _ = chat_tokenizer("llama3", "chatml")
    run = trainer(documents, tmp_path, tokenizer, rows, accumulated, packing)
    assert rows * accumulated >= len(run.train_dataset)  # one step sees everything
    run.train()
    loss, weights = reference(documents)
    assert run.state.log_history[0]["loss"] == pytest.approx(loss, abs=5e-6)
    for name, value in run.model.named_parameters():
        assert torch.allclose(value.double(), weights[name], atol=5e-6), name


@pytest.mark.parametrize("packing", [0, 64])
@pytest.mark.parametrize("batch", [1, 5, 12])
def test_eval_loss_is_the_mean_over_supervised_tokens_at_any_batch_size(
    documents, tmp_path, chat_tokenizer, batch, packing
):
    tokenizer, _, _ = chat_tokenizer("llama3", "chatml")
    run = trainer(documents, tmp_path, tokenizer, 1, 1, packing, per_device_eval_batch_size=batch)
    assert run.evaluate()["eval_loss"] == pytest.approx(reference(documents)[0], abs=2e-6)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(documents, tmp_path, chat_tokenizer, value):
    tokenizer, _, _ = chat_tokenizer("llama3", "chatml")
    run = trainer(documents, tmp_path, tokenizer, 4, 1, 0)
    torch.nn.init.constant_(run.model.lm_head.weight, float(value))
    with pytest.raises(NonFiniteLossError, match="in step 1; no model is saved"):
        run.train()
