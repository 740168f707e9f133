"""The weights a run starts from: rows for new tokens, the stop token, the dtype."""

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from sft_recipes.config.options import ModelOptions
from sft_recipes.config.schema import parse_adapter
from sft_recipes.errors import ConfigError
from sft_recipes.modeling.adapters import build_peft_config, train_new_tokens
from sft_recipes.modeling.embeddings import are_rows_distinct
from sft_recipes.modeling.loading import load_model, load_tokenizer

FULL = {"type": "none"}
LORA = {"type": "lora", "lora": {"r": 4, "target_modules": "all-linear"}}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def base(tokenizer_folder, tmp_path):
    """`base(spare=8, tied=True)`: a folder with a random Llama, so many rows beyond its tokenizer's tokens."""

    def make(spare: int = 0, tied: bool = True, neox: bool = False, zero_spare: bool = False) -> str:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder("llama3"))
        torch.manual_seed(0)
        values = SMALL | {"vocab_size": len(tokenizer) + spare, "tie_word_embeddings": tied}
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**values)) if neox else LlamaForCausalLM(LlamaConfig(**values))
        if zero_spare:
            model.get_input_embeddings().weight.data[len(tokenizer) :] = 0
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return str(tmp_path)

    return make


def load(folder: str, adapter: dict = FULL, template: str = "chatml"):
    tokenizer, _, new = load_tokenizer(ModelOptions(folder, template))
    return load_model(ModelOptions(folder), None, adapter is LORA, tokenizer, ["<|im_end|>"], new), tokenizer, new


@pytest.mark.parametrize("tied", [True, False])
def test_without_spare_rows_the_matrices_grow_by_the_new_tokens(base, tied):
    model, tokenizer, new = load(base(tied=tied))
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert layer.weight.shape[0] == len(tokenizer)
        assert are_rows_distinct(layer.weight[new])
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied


def test_spare_rows_are_used_first_and_nothing_shrinks(base):
    model, tokenizer, new = load(base(spare=64))
    assert model.get_input_embeddings().num_embeddings == new[0] + 64
    assert new == [len(tokenizer) - 2, len(tokenizer) - 1]


def test_spare_rows_that_are_alike_are_made_distinct(base):
    model, _, new = load(base(spare=64, zero_spare=True))
    assert are_rows_distinct(model.get_input_embeddings().weight[new])


def test_the_stop_token_comes_first_in_the_generation_config_and_eos_stays(base):
    model, tokenizer, _ = load(base())
    assert model.generation_config.eos_token_id == [
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
        tokenizer.eos_token_id,
    ]


def test_trained_weights_are_fp32_whatever_the_checkpoint_has(base):
    folder = base()
    LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    assert load(folder)[0].dtype == torch.float32


@pytest.mark.parametrize("neox", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_trains_the_new_rows_wherever_they_are(base, tied, neox):
    model, _, new = load(base(tied=tied, neox=neox), LORA)
    peft = build_peft_config(parse_adapter(LORA))
    train_new_tokens(peft, model, new)
    inputs = "gpt_neox.embed_in" if neox else "model.embed_tokens"
    assert peft.trainable_token_indices == ({inputs: new} if tied else {inputs: new, "lm_head": new})


def test_no_new_tokens_need_no_training(base):
    peft = build_peft_config(parse_adapter(LORA))
    train_new_tokens(peft, load(base())[0], [])
    assert peft.trainable_token_indices is None


@pytest.mark.parametrize(
    "adapter, line",
    [
        (
            {"type": "lora", "lora": {"rank": 8}},
            "adapter.lora.rank is not a field of LoraConfig. Write adapter.lora.r.",
        ),
        ({"type": "lora", "lora": {"r": "8"}}, "adapter.lora.r should be a whole number, not '8'."),
    ],
)
def test_a_wrong_adapter_field_gets_a_line(adapter, line):
    with pytest.raises(ConfigError) as caught:
        build_peft_config(parse_adapter(adapter))
    assert str(caught.value) == line


def test_a_model_that_is_not_there_gets_one_line(tmp_path):
    with pytest.raises(ConfigError, match="nowhere: there is no such folder.$") as caught:
        load_tokenizer(ModelOptions(str(tmp_path / "nowhere"), "chatml"))
    assert "\n" not in str(caught.value)
