"""The collator for plain PyTorch loops: the encoder's masks, padded."""

import pytest
import torch
from transformers import AutoTokenizer

from sft_recipes import CompletionOnlyCollator

SHORT = {"instruction": "Add 1 and 1.", "input": "", "output": "2"}
LONG = [{"role": "user", "content": "Say it at length."}, {"role": "assistant", "content": "Two, or one and one."}]


@pytest.fixture
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder("llama3"))


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_and_messages_are_padded_and_masked(tokenizer, side):
    batch = CompletionOnlyCollator(tokenizer, "chatml", padding_side=side)([SHORT, LONG])
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    assert ids.dtype == mask.dtype == labels.dtype == torch.int64
    assert ids.shape == mask.shape == labels.shape
    assert mask[1].all() and not mask[0].all()
    assert bool(mask[0, 0]) is (side == "right")
    assert tokenizer.decode(ids[0][mask[0] == 1]) == (
        "<|im_start|>user\nAdd 1 and 1.<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
    )
    assert tokenizer.decode(labels[0][labels[0] != -100]) == "2<|im_end|>"
    assert tokenizer.decode(labels[1][labels[1] != -100]) == "Two, or one and one.<|im_end|>"
    assert (labels[mask == 0] == -100).all()


def test_pad_equal_to_eos_does_not_hide_the_stop_token(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    batch = CompletionOnlyCollator(tokenizer, "zephyr")([SHORT, LONG])  # zephyr's stop token is eos
    assert [int((row == tokenizer.eos_token_id).sum()) for row in batch["labels"]] == [1, 1]


def test_max_length_cuts(tokenizer):
    assert CompletionOnlyCollator(tokenizer, "chatml", max_length=5)([SHORT, LONG])["input_ids"].shape == (2, 5)


def test_a_loss_on_the_batch_is_the_loss_on_the_answers(tokenizer):
    batch = CompletionOnlyCollator(tokenizer, "chatml")([SHORT, LONG])
    logits = torch.randn(*batch["input_ids"].shape, len(tokenizer), generator=torch.Generator().manual_seed(0))
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    by_hand = [
        -logits[row, place - 1].log_softmax(-1)[batch["input_ids"][row, place]]
        for row in range(2)
        for place in range(1, batch["labels"].shape[1])
        if batch["labels"][row, place] != -100
    ]
    assert loss.item() == pytest.approx(sum(by_hand).item() / len(by_hand), abs=1e-5)
