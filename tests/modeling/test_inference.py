"""What is changed on a model while it answers or is measured is changed back."""

import pytest
import torch

from sft_recipes.evaluation.generation import generate_answers
from sft_recipes.evaluation.token_loss import token_losses
from sft_recipes.modeling.inference import eval_mode
from sft_recipes.modeling.packed_attention import check_no_cross_document_attention
from support.small_models import small_llama

QUESTION = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_cache_are_afterwards_as_they_were(training):
    model = small_llama().train(training)
    model.config.use_cache = False
    with eval_mode(model, use_cache=True):
        assert not model.training and model.config.use_cache
    assert model.training == training and not model.config.use_cache
    with eval_mode(model):
        assert not model.training and not model.config.use_cache


@pytest.mark.parametrize("what", ["answers", "losses", "packing check"])
def test_an_exception_while_a_model_is_asked_or_measured_leaves_it_in_training_mode(what, chat_tokenizer):
    tokenizer, _, _ = chat_tokenizer("llama3", "chatml")
    model = small_llama().train()
    model.config.use_cache = False

    def fails(*_, **__):
        raise RuntimeError("CUDA out of memory")

    model.generate = model.forward = fails
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        if what == "answers":
            generate_answers(model, tokenizer, [QUESTION], batch_size=1, max_new_tokens=4)
        elif what == "losses":
            from sft_recipes.data.token_rows import to_dataset

            ids = [torch.tensor([3, 4, 5]).numpy()]
            token_losses(model, tokenizer, to_dataset({"input_ids": ids, "labels": ids}), 1)
        else:
            check_no_cross_document_attention(model)
    assert model.training and not model.config.use_cache
