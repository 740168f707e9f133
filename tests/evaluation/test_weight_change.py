"""How far the weights moved, against dense matrices: what PEFT itself merges, minus what was there before."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from sft_recipes.evaluation.weight_change import relative_change

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 50,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "neox": GPTNeoXConfig(**SMALL, tie_word_embeddings=True),
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=50, n_positions=16),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16),
    "moe": Qwen3MoeConfig(
        **SMALL, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
}
# Each architecture's groups by the beginnings of its parameters' names; {} is the layer.
NAMES = {
    "llama": {
        "embeddings": ["model.embed_tokens."],
        "attention": ["model.layers.{}.self_attn."],
        "mlp": ["model.layers.{}.mlp."],
        "norms": ["model.layers.{}.input_layernorm.", "model.layers.{}.post_attention_layernorm."],
        "last": ["model.norm."],
    },
    "neox": {
        "embeddings": ["gpt_neox.embed_in."],
        "attention": ["gpt_neox.layers.{}.attention."],
        "mlp": ["gpt_neox.layers.{}.mlp."],
        "norms": ["gpt_neox.layers.{}.input_layernorm.", "gpt_neox.layers.{}.post_attention_layernorm."],
        "last": ["gpt_neox.final_layer_norm."],
    },
    "gpt2": {
        "embeddings": ["transformer.wte.", "transformer.wpe."],
        "attention": ["transformer.h.{}.attn."],
        "mlp": ["transformer.h.{}.mlp."],
        "norms": ["transformer.h.{}.ln_1.", "transformer.h.{}.ln_2."],
        "last": ["transformer.ln_f."],
    },
}
QK_NORMS = [f"model.layers.{{}}.self_attn.{name}." for name in ("q_norm", "k_norm")]
QWEN3 = NAMES["llama"] | {
    "attention": [f"model.layers.{{}}.self_attn.{name}_proj." for name in "qkvo"],
    "norms": NAMES["llama"]["norms"] + QK_NORMS,
}
NAMES |= {"qwen3": QWEN3, "moe": QWEN3}


def model(config: str, tied: bool = True):
    torch.manual_seed(0)
    made = copy.deepcopy(CONFIGS[config])
    made.tie_word_embeddings = tied
    return AutoModelForCausalLM.from_config(made)


def drawn_anew(trained, deviation: float = 0.1):
    """The model with noise on all that is trained."""
    generator = torch.Generator().manual_seed(1)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data += deviation * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return trained


def adapted(base, **fields):
    fields = {"target_modules": "all-linear", "r": 4, "lora_alpha": 16, "task_type": "CAUSAL_LM"} | fields
    return drawn_anew(get_peft_model(base, LoraConfig(**fields)))


def dense(tuned, base, config: str, rows: int | None = None) -> dict[str, float]:
    """Each group's relative norm from two plain models, summed over its parameters in float64."""
    before, after = dict(base.named_parameters()), dict(tuned.named_parameters())
    groups = {"embeddings": NAMES[config]["embeddings"]}
    for layer in range(2):
        for kind in ("attention", "mlp", "norms"):
            groups[f"layer {layer} {kind}"] = [start.format(layer) for start in NAMES[config][kind]]
    groups |= {"norms": NAMES[config]["last"], "head": ["lm_head."]}
    left, ratios = set(before), {}
    for group, starts in groups.items():
        names = [name for name in before if name.startswith(tuple(starts))]
        left -= set(names)
        moved = sum((after[name].double()[:rows] - before[name].double()[:rows]).square().sum() for name in names)
        size = sum(before[name].double()[:rows].square().sum() for name in names)
        if names:
            ratios[group] = (moved / size).sqrt().item()
    assert not left
    return ratios


def never():
    raise AssertionError("the base was read again")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config", ["llama", "neox", "gpt2", "qwen3"])
def test_an_adapter_moved_the_weights_by_what_merging_adds_to_them(config, tied):
    base = model(config, tied)
    embeddings = NAMES[config]["embeddings"][0].rstrip(".")
    rows = {embeddings: [3, 7]} if tied else {embeddings: [3, 7], "lm_head": [3, 7]}
    peft = adapted(copy.deepcopy(base), trainable_token_indices=rows, use_rslora=True)
    found = relative_change(peft, never)
    expected = dense(peft.merge_and_unload(), base, config)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found["embeddings"] > 0 and found["layer 1 attention"] > 0 and found["norms"] == 0.0
    assert ("head" in found) is not tied


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ],
)
def test_other_ways_to_adapt_move_the_weights_by_what_merging_adds_to_the_base_as_it_was_loaded(fields):
    base = model("llama", tied=False)
    peft = adapted(copy.deepcopy(base), **fields)
    found = relative_change(peft, lambda: base)
    assert relative_change(peft, lambda: base) == found  # nothing was left behind
    assert found == pytest.approx(dense(peft.merge_and_unload(), base, "llama"), rel=1e-4)


def test_trained_biases_count():
    base = model("neox")
    for bias in (parameter for name, parameter in base.named_parameters() if name.endswith(".bias")):
        bias.data += 0.5
    peft = adapted(copy.deepcopy(base), lora_bias=True)
    assert relative_change(peft, never) == pytest.approx(dense(peft.merge_and_unload(), base, "neox"), rel=1e-5)
    peft = adapted(copy.deepcopy(base), bias="all")
    assert relative_change(peft, lambda: base) == pytest.approx(dense(peft.merge_and_unload(), base, "neox"), rel=1e-5)


def test_experts_that_are_one_parameter_are_part_of_the_mlp():
    base = model("moe")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    peft = adapted(copy.deepcopy(base), target_modules=["q_proj"], target_parameters=experts)
    found = relative_change(peft, never)
    assert found == pytest.approx(dense(peft.merge_and_unload(), base, "moe"), rel=1e-5)
    assert found["layer 0 mlp"] > 0


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_on_a_quantized_base_is_measured_against_the_dequantized_weight(tmp_path, bits):
    model("llama").save_pretrained(tmp_path)
    options = {"load_in_4bit": True} if bits == 4 else {"load_in_8bit": True}
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**options))
    peft = adapted(base, target_modules=["q_proj", "v_proj"])
    found = relative_change(peft, never)
    plain = model("llama")
    expected = {}
    for layer in range(2):
        ours, theirs = peft.get_base_model().model.layers[layer].self_attn, plain.model.layers[layer].self_attn
        moved, size = 0.0, 0.0
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            size += getattr(theirs, name).weight.double().square().sum()
            if name in ("q_proj", "v_proj"):
                lora = getattr(ours, name)
                a, b = lora.lora_A["default"].weight.double(), lora.lora_B["default"].weight.double()
                moved += (16 / 4 * b @ a).square().sum()
        expected[f"layer {layer} attention"] = (moved / size).sqrt().item()
    # rounding to 4 or 8 bits changes ‖W‖ itself by less than this
    assert {group: found[group] for group in expected} == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("tied", [True, False])
def test_full_fine_tuning_is_measured_against_the_base_weights(tied):
    base = model("llama", tied)
    tuned = drawn_anew(copy.deepcopy(base), 0.01)
    assert relative_change(tuned, lambda: base) == pytest.approx(dense(tuned, base, "llama"), rel=1e-5)


def test_rows_that_only_the_tuned_model_has_are_left_out():
    base = model("llama", tied=False)
    tuned = copy.deepcopy(base)
    tuned.resize_token_embeddings(60, mean_resizing=False)
    drawn_anew(tuned, 0.01)
    found = relative_change(tuned, lambda: base)
    expected = dense(tuned, base, "llama", rows=50)
    assert found["embeddings"] == pytest.approx(expected["embeddings"], rel=1e-5)
    assert found["head"] == pytest.approx(expected["head"], rel=1e-5)


def test_an_untrained_model_has_not_moved():
    base = model("gpt2")
    assert set(relative_change(copy.deepcopy(base), lambda: base).values()) == {0.0}
