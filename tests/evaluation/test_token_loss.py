"""Where the held-out loss comes from, against sums made by hand and token by token."""

import numpy as np
import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from sft_recipes.data.token_rows import to_dataset
from sft_recipes.encoding.encoder import IGNORE_INDEX
from sft_recipes.evaluation import token_loss
from sft_recipes.evaluation.token_loss import break_down_loss, token_losses
from support.small_models import small_llama

STOP = 9


def rows(labels: list[list[int]], sources: list[int]):
    """Rows whose ids are their labels, with 5 where no loss is taken."""
    ids = [np.array([5 if label == IGNORE_INDEX else label for label in row], dtype=np.int32) for row in labels]
    numbers = {"source": np.array(sources), "row": np.arange(len(labels))}
    return to_dataset({"input_ids": ids, "labels": [np.array(row, dtype=np.int32) for row in labels]}, numbers)


N = IGNORE_INDEX
TALKS = [[N, 3, STOP, N, N, 4, 4, STOP], [N, N, 3, STOP], [N, N, N, 6, STOP, N]]
LOSSES = [[1.0, 2.0, N, N, 3.0, 4.0, 5.0], [N, 6.0, 7.0], [N, N, 8.0, 9.0, N]]


def test_the_parts_are_means_over_their_own_tokens():
    losses = [np.array([np.nan if loss == N else loss for loss in row]) for row in LOSSES]
    found = break_down_loss(rows(TALKS, [0, 0, 1]), losses, STOP, ["mine", "yours"])
    stops = np.array([2.0, 5.0, 7.0, 9.0])
    assert found == {
        "loss": 5.0, "rows": 3, "tokens": 9, "p_stop": pytest.approx(np.exp(-stops).mean()),
        "source": {"mine": (1 + 2 + 3 + 4 + 5 + 6 + 7) / 7, "yours": 8.5},
        "turn": {"first": (1 + 2 + 6 + 7 + 8 + 9) / 6, "later": 4.0},
        "position": {"stop": stops.mean(), "other": (1 + 3 + 4 + 6 + 8) / 5},
        "length": {"4 to 4 tokens": 6.5, "6 to 6 tokens": 8.5, "8 to 8 tokens": 3.0},
    }  # fmt: skip


def test_a_row_of_one_token_and_one_that_begins_with_an_answer_count_right():
    labels = [[7], [3, 3, STOP], [N, 3, N, 4]]
    losses = [np.zeros(0), np.array([1.0, 2.0]), np.array([3.0, np.nan, 4.0])]
    found = break_down_loss(rows(labels, [0, 0, 0]), losses, STOP, ["mine"])
    assert found["turn"] == {"first": 2.0, "later": 4.0} and found["tokens"] == 4


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_token_losses_are_those_of_each_row_alone(batch, chat_tokenizer):
    tokenizer, _, _ = chat_tokenizer("llama3", "chatml")
    model = small_llama()
    talks = rows(TALKS, [0, 0, 1])
    expected = []
    for row in talks:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1].double()
        of_true = logits.log_softmax(-1)[range(len(logits)), row["input_ids"][1:]]
        expected.append(np.where(np.array(row["labels"][1:]) == IGNORE_INDEX, np.nan, -of_true.numpy()))
    add_fused_lm_head(model)
    found = token_losses(model.train(), tokenizer, talks, batch)
    assert model.training
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-6)


@pytest.mark.parametrize(("repeats", "switched"), [(10, {"disable": True}), (50, {})])
def test_many_rows_have_a_bar_that_tqdms_own_switch_turns_off(repeats, switched, chat_tokenizer, monkeypatch):
    tokenizer, _, _ = chat_tokenizer("llama3", "chatml")
    add_fused_lm_head(model := small_llama())
    seen = []
    monkeypatch.setattr(token_loss, "tqdm", lambda batches, **options: seen.append(options) or batches)
    token_losses(model, tokenizer, rows(TALKS[:2] * repeats, [0, 0] * repeats), 1)
    assert [{key: value for key, value in seen[0].items() if key == "disable"}] == [switched]
