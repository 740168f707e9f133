"""The memory estimate against published counts, sums by hand, and a run that was measured."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, Trainer, TrainingArguments

from sft_recipes.config.options import AdapterOptions, ModelOptions
from sft_recipes.modeling.workarounds import forget_optimizer_overrides
from sft_recipes.training.activation_memory import StepShape, build_meta_model, peak_bytes, shorten_config, step_bytes
from sft_recipes.training.arguments import build_arguments
from sft_recipes.training.memory import (
    check_memory,
    describe_out_of_memory,
    describe_step,
    estimate_memory,
    format_bytes,
    memory_advice,
    optimizer_state_bytes,
    smaller_steps,
)
from support.configs import composed, error_of
from support.paths import ALL_TESTS, ROOT
from support.shapes import WIDE, WIDE_PARAMETERS

SHAPES = json.loads((ROOT / "benchmarks" / "shapes.json").read_text(encoding="utf-8"))
SMALL = LlamaConfig(vocab_size=1000, hidden_size=64, intermediate_size=160, num_hidden_layers=5, num_attention_heads=4)
LORA = AdapterOptions("lora", {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"})
GIB = 2**30


def shape_of(id: str):
    return AutoConfig.for_model(**SHAPES[id])


def small(**changes) -> StepShape:
    """A full step on a small Llama, two rows of 50 tokens, nothing accumulated or recomputed, on a CPU."""
    plain = StepShape(
        model=ModelOptions("small"), adapter=AdapterOptions(), model_config=SMALL, new_token_ids=(), gpu=False, rows=2,
        length=50, packing=False, accumulation_steps=1, activation_checkpointing=False, optimizer="adamw_torch", shards=1,
    )  # fmt: skip
    return replace(plain, **changes)


def recipe_step(name: str, folder: Path, length: int | None = None, shape: str | None = None) -> StepShape:
    """A recipe's step on a GPU, of rows as long as its trainer.max_length unless `length` says."""
    config = composed(f"+recipe={name}")
    arguments, _ = build_arguments(config, folder)
    shape = shape or config.model.id
    model_config = shape_of(shape) if shape in SHAPES else None
    step = describe_step(config, arguments, length or arguments.max_length, model_config=model_config)
    return replace(step, gpu=True)


# As the model cards and papers of these models say
@pytest.mark.parametrize(
    ("id", "parameters"),
    [
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("meta-llama/Llama-2-70b-hf", 68_976_648_192),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("mistralai/Mistral-7B-v0.1", 7_241_732_096),
        ("EleutherAI/pythia-1.4b", 1_414_647_808),
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
        ("Qwen/Qwen3-8B-Base", 8_190_735_360),
    ],
)
def test_parameters_are_counted_without_weights(id, parameters):
    with torch.device("meta"):
        model = build_meta_model(small(model_config=shape_of(id)))
    assert sum(weight.numel() for weight in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("recipe", "trained"),
    [("alpaca_lora", 4_194_304), ("guanaco_7b", 159_907_840)],  # as alpaca-lora and QLoRA print them for LLaMA-7B
)
def test_what_an_adapter_trains_is_counted(recipe, trained, tmp_path):
    found = estimate_memory(recipe_step(recipe, tmp_path, 32, "meta-llama/Llama-2-7b-hf"))
    assert found.trainable == trained
    assert (found.gradients, found.optimizer) == (4 * trained, 8 * trained)


def test_four_bits_are_half_a_byte_and_the_rest_of_the_model_is_bf16(tmp_path):
    found = estimate_memory(recipe_step("guanaco_7b", tmp_path, 32, "meta-llama/Llama-2-7b-hf"))
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    rest = 6_738_415_616 - linear
    assert found.weights == pytest.approx(linear * 0.5159 + rest * 2 + 4 * 159_907_840, rel=1e-3)


def test_full_fine_tuning_holds_sixteen_bytes_a_parameter_and_activations():
    found = estimate_memory(small())
    assert found.weights + found.gradients + found.optimizer == 16 * found.parameters
    assert found.total == 16 * found.parameters + found.activations


@pytest.mark.parametrize(
    ("typed", "bytes_each"),
    [
        (["trainer.optim=adamw_torch"], 16),  # whose bf16 weights would stand still, so they are trained in fp32
        (["trainer.optim=stable_adamw"], 2 + 2 + 6),
        (
            ["trainer.optim=adamw_torch_8bit", "trainer.optim_args='bf16_stochastic_round=True, block_size=256'"],
            2 + 2 + 2,
        ),
        (["trainer.optim=adamw_torch_8bit"], 4 + 4 + 2),
    ],
)
def test_weights_named_as_bf16_are_it_where_the_optimizer_keeps_their_small_updates(
    typed, bytes_each, tmp_path, caplog
):
    config = composed("model=tiny", "data=tiny", "model.dtype=bfloat16", "mode=preview", *typed)
    with caplog.at_level("INFO"):
        arguments, _ = build_arguments(config, tmp_path)
    found = estimate_memory(describe_step(config, arguments, 8))
    assert found.weights + found.gradients + found.optimizer == bytes_each * found.parameters
    assert f"trained weights are {'bf16' if found.weights == 2 * found.parameters else 'fp32'}." in caplog.text


@pytest.mark.parametrize(
    "name",
    ["adamw_torch", "adamw_torch_fused", "adamw_8bit", "lion_32bit", "rmsprop", "adagrad", "adafactor", "sgd"],
)
def test_an_optimizer_s_state_is_what_the_optimizer_itself_holds_after_a_step(name, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), optim=name, use_cpu=True, report_to="none")
    forget_optimizer_overrides()  # of a model that another test trained in this process
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    layer = torch.nn.Linear(256, 128, bias=False)
    optimizer = optimizer_class(layer.parameters(), **options)
    layer(torch.ones(1, 256)).sum().backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    tables = {"qmap1", "qmap2"} if "8bit" in name else set()  # 256 codes, whatever the layer's size
    held = sum(state.numel() * state.element_size() for state in states if state.numel() > 1) - 1024 * len(tables)
    assert optimizer_state_bytes(name, layer.weight) == pytest.approx(held, rel=0.04)  # 8 bits have a scale a block


def test_a_layer_of_llama_keeps_ten_hidden_and_four_intermediate_states_of_every_token():
    # input, its norm before and after the weight; queries, keys, values and attention's output; the same three of the
    # second norm; gate, up, the activated gate and their product; a number a head and token, two a norm; and the mask of
    # padding, which sdpa makes a number for every pair of tokens
    four, three = (step_bytes(small(), layers)[0] for layers in (4, 3))
    assert four - three == 100 * (10 * 64 + 4 * 160 + 4 + 2 + 50) * 4


def test_recomputed_activations_leave_one_hidden_state_a_layer():
    step = small(activation_checkpointing=True)
    four, three = (step_bytes(step, layers)[0] for layers in (4, 3))
    assert four - three == pytest.approx(100 * 64 * 4, rel=0.05)


def test_accumulated_gradients_stay_while_the_next_batch_runs():
    once, twice = (estimate_memory(small(accumulation_steps=n)) for n in (1, 2))
    assert twice.activations > once.activations
    forward = step_bytes(small(), 5)[0]
    again = step_bytes(small(accumulation_steps=2), 5)[0]
    assert again - forward == pytest.approx(once.gradients, rel=0.01)


@pytest.mark.parametrize("layers", [1, 2, 5, 9])
def test_a_model_of_any_depth_is_estimated_as_if_it_were_run_whole(layers):
    shape = shorten_config(SMALL, layers) if layers <= 5 else LlamaConfig(**SMALL.to_dict() | {"num_hidden_layers": 9})
    whole = max(step_bytes(small(model_config=shape), layers))
    assert peak_bytes(small(model_config=shape)) == pytest.approx(whole, rel=0.01)


def test_a_run_that_does_not_fit_is_refused_with_what_to_write(tmp_path):
    step = recipe_step("alpaca_7b", tmp_path)
    line = error_of(check_memory, step, 24 * GIB)
    assert (
        line.startswith("This run needs an estimated 1")
        and " GiB of memory, of 24.0 GiB available: weights 25.1 GiB, " in line
    )
    assert line.endswith("Write adapter=lora. Or trainer.check_memory=false, which trains anyway.")
    tight = error_of(check_memory, small(), 2**20)
    assert "Take a smaller model or a shorter trainer.max_length" in tight


def test_the_same_training_in_smaller_parts_is_advised_before_another_one():
    """Smaller batches with activations computed again give the same weights; LoRA, which would fit alone, does not."""
    line = error_of(check_memory, small(model_config=WIDE, rows=4, length=100, accumulation_steps=2), GIB // 4)
    assert (
        "Write trainer.per_device_train_batch_size=1 trainer.gradient_accumulation_steps=8 "
        "trainer.activation_checkpointing=true. Or" in line
    )


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize(
    ("bytes_each", "installed", "advice"),
    [  # weights, gradients and AdamW's state: 16 bytes a parameter in fp32, 10 in bf16 with Kahan summation
        (13, True, "model.dtype=bfloat16 trainer.optim=stable_adamw."),
        (13, False, "model.dtype=bfloat16 trainer.optim=stable_adamw (pip install 'sft-recipes[bf16]')."),
        (9, True, "adapter=lora."),
    ],
)
def test_bf16_weights_are_advised_before_lora_where_their_10_bytes_a_parameter_fit(
    bytes_each, installed, advice, gpu, monkeypatch
):
    monkeypatch.setattr("sft_recipes.training.memory.is_torch_optimi_available", lambda: installed)
    step = small(model_config=WIDE, rows=1, length=4, activation_checkpointing=True, gpu=gpu)
    assert memory_advice(step, bytes_each * WIDE_PARAMETERS) == f"Write {advice}"


def test_lora_is_advised_in_the_place_of_bf16_weights_not_on_top_of_them():
    step = small(rows=4, length=100)
    smallest = replace(step, rows=1, accumulation_steps=4, activation_checkpointing=True, adapter=LORA)
    assert memory_advice(step, estimate_memory(smallest).total) == (
        "Write trainer.per_device_train_batch_size=1 trainer.gradient_accumulation_steps=4 "
        "trainer.activation_checkpointing=true adapter=lora."
    )


def test_a_run_that_is_out_of_memory_names_bf16_weights_before_adapters():
    line = describe_out_of_memory(small(rows=1, activation_checkpointing=True), "in training step 3")
    helps = "1. model.dtype=bfloat16 trainer.optim=stable_adamw; 2. adapter=lora; 3. adapter=qlora."
    assert line.endswith(f"What helps, in this order: {helps}")


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": LORA},
        {"shards": 2},
        {"fp16": True},
        {"model": ModelOptions("small", dtype="bfloat16"), "optimizer": "adamw_torch_8bit"},
        {"optimizer": "adamw_torch_8bit"},  # 4 + 4 + 2 bytes in fp32 as well
        {"optimizer": "sgd"},
    ],
)
def test_bf16_weights_are_not_advised_where_they_take_no_less_or_were_not_tried(changes):
    assert not any("bfloat16" in what for what, _ in smaller_steps(small(**changes)))


def test_what_fits_is_not_refused():
    assert check_memory(small(), memory=GIB).total < GIB


def test_with_fsdp_every_device_holds_its_part():
    alone, shared = (estimate_memory(small(shards=n)) for n in (1, 4))
    assert shared.weights == alone.weights // 4 and shared.optimizer == alone.optimizer // 4


@pytest.mark.parametrize("name", ["guanaco_7b", "tiny", "smollm2_135m"][: 3 if ALL_TESTS else 2])
def test_what_a_recipe_says_it_needs_is_the_estimate(name, tmp_path):
    found = estimate_memory(recipe_step(name, tmp_path))
    assert composed(f"+recipe={name}").provenance.needs == f"{format_bytes(found.total)}, estimated"


@pytest.mark.parametrize("name", ["single_gpu_24gb", "single_gpu_24gb_llama3_8b", "single_gpu_24gb_gemma3_4b"])
def test_a_recipe_for_a_gpu_of_24_gb_fits_it(name):
    assert float(composed(f"+recipe={name}").provenance.needs.split(" GiB")[0]) < 22


def test_a_measured_run_is_within_15_percent():
    command = [sys.executable, str(ROOT / "benchmarks" / "memory.py"), "1"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()[-1]
    assert abs(float(printed.split("|")[-2].strip().removesuffix("%"))) < 15
