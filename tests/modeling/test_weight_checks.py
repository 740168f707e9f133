"""A base that cannot be trained as it is: weights that are no numbers, tokens without an embedding row."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaConfig

from sft_recipes.errors import ConfigError
from sft_recipes.modeling.loading import check_weights
from support.small_models import small_llama
from support.tuned import BASES, GROUPED, in_fresh_process, lora, make_base, tune

PLAIN = """{#- control tokens: none -#}{%- for message in messages -%}{%- if message.role == 'assistant' -%}
{% generation %}{{ message.content }}<|endoftext|>{% endgeneration %}{%- else -%}{{ message.role }}: {{ message.content }}
{% endif -%}{%- endfor -%}"""


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_matrix_is_named(value):
    model = small_llama()
    check_weights(model, "mine")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3:] = value
    with pytest.raises(ConfigError, match="model.id=mine: model.layers.1.mlp.up_proj.weight .*not finite"):
        check_weights(model, "mine")


def test_an_embedding_of_zeros_is_refused_and_another_matrix_of_zeros_is_named(caplog):
    model = small_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    check_weights(model, "mine")
    assert "mine: 1 matrix is all zeros (model.layers.1.mlp.up_proj.weight …)" in caplog.text
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(ConfigError, match="model.id=mine: .* is all zeros"):
        check_weights(model, "mine")


def test_a_model_that_names_no_head_is_checked(monkeypatch):
    model = small_llama()
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    check_weights(model, "mine")


def test_a_bias_and_a_fresh_adapter_may_be_zero():
    model = small_llama()
    with torch.no_grad():
        model.model.norm.weight.zero_()
    check_weights(get_peft_model(model, LoraConfig(target_modules="all-linear")), "mine")


@pytest.mark.parametrize("template", ["chatml", "one that adds no token"])
@pytest.mark.parametrize("tied", [True, False])
def test_tokens_without_a_row_are_the_same_after_a_true_reload(tmp_path, monkeypatch, caplog, tied, template):
    """Rows that training fills one way and loading another make two models; a fresh process knows nothing of the first."""
    monkeypatch.setitem(BASES, "few rows", (LlamaConfig(tie_word_embeddings=tied, **GROUPED), -140))
    base = make_base("few rows", tmp_path / "base")
    if template != "chatml":
        (tmp_path / "plain.jinja").write_text(PLAIN)
        template = str(tmp_path / "plain.jinja")
    tune(base, lora(), tmp_path / "run", template, max_steps=20)
    rows = AutoConfig.from_pretrained(base).vocab_size
    assert load_file(tmp_path / "run" / "expected.safetensors")["ids"].max() >= rows
    assert f"has embedding rows for {rows} of its tokenizer's 400 tokens" in caplog.text
    (found,) = in_fresh_process([(tmp_path / "run", base, True)])
    assert found and all(difference < 1e-4 for difference in found.values()), found
