"""Adapters on small models of every kind: what they learn, in which precision, and what is left after a reload."""

import logging
import math
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sft_recipes.config.options import AdapterOptions, ModelOptions
from sft_recipes.config.schema import parse_adapter
from sft_recipes.modeling.adapters import (
    build_peft_config,
    build_quantization_config,
    changes_base_weights,
    prepare_peft_config,
    train_new_tokens,
)
from sft_recipes.modeling.embeddings import are_rows_distinct
from sft_recipes.modeling.loading import load_adapter_config, load_model, load_tokenizer
from sft_recipes.modeling.save_load import check_saved_adapter
from sft_recipes.training.memory import optimizer_state_bytes
from sft_recipes.training.setup import set_up_run
from support.configs import composed, error_of
from support.small_models import VOCABULARY, small_llama
from support.tuned import ADAPTERS, CASES, in_fresh_process, logits, lora, make_base, tune

SAME = ["LoRA", "rsLoRA", "DoRA", "LoRA+", "IA3", "VeRA"]


@pytest.mark.parametrize(("base", "kind"), [(base, kind) for base, kind in CASES if kind in ("LoRA", "QLoRA")])
def test_new_chat_tokens_are_learnt(tuned, base, kind):
    made = tuned(base, kind)
    model, (start, stop) = made.trainer.model, made.trainer.new_tokens
    said = load_file(made.run / "expected.safetensors")
    ids, best = said["ids"][0].tolist(), said["logits"][0].argmax(-1).tolist()
    end = max(place for place, id in enumerate(ids) if id == stop)
    assert made.trainer.stop_id == stop and best[end - 1] == stop and best[end - 3] != stop
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert are_rows_distinct(layer.weight.detach()[[start, stop]])
    rows = {name: value for name, value in model.named_parameters() if "trainable_tokens_delta" in name}
    assert len(rows) == (1 if model.config.tie_word_embeddings else 2)
    assert all((value - made.trainer.at_start[name]).abs().amax(1).min() > 1e-3 for name, value in rows.items())


@pytest.fixture(scope="module")
def found(tuned):
    """For every case the differences of both loaders, from one fresh process; DoRA in 4 bits without repacking."""
    cases = []
    for base, kind in CASES:
        made = tuned(base, kind)
        plain = "QLoRA" not in kind or (kind == "QLoRA" and base != "tiny, tied")  # 96 is no multiple of 64
        cases.append((made.run, made.base, plain))
    return dict(zip(CASES, in_fresh_process(cases), strict=True))


@pytest.mark.parametrize(("base", "kind"), CASES)
def test_plain_peft_gives_the_trained_models_logits_in_a_fresh_process(found, base, kind):
    limit = 3e-2 if "QLoRA" in kind else 1e-5
    for loader in ("AutoPeftModelForCausalLM", "PeftModel on the base"):
        assert found[base, kind][loader] <= limit, loader


@pytest.mark.parametrize("kind", ["LoRA", "QLoRA"])
def test_the_stop_token_is_in_the_saved_generation_config(tuned, kind):
    made = tuned("Llama, untied", kind)
    tokenizer = AutoTokenizer.from_pretrained(made.run / "model")
    stops = GenerationConfig.from_pretrained(made.run / "model").eos_token_id
    assert stops == [tokenizer.convert_tokens_to_ids("<|im_end|>"), 0]


def test_an_adapter_of_a_resized_base_stays_small(tuned):
    saved = load_file(tuned("Llama, untied", "LoRA").run / "model" / "adapter_model.safetensors")
    assert not [name for name in saved if "base_layer" in name]
    assert {tuple(value.shape) for name, value in saved.items() if "trainable_tokens_delta" in name} == {(2, 128)}


def test_how_an_adapter_is_loaded_elsewhere_is_recorded(tuned):
    """400 tokens and two of ChatML's, for which one base has no rows; both stop at their own end of text alone."""
    known = {"dtype": "float32", "stop": "<|im_end|>", "base_stops": False, "trained_rows": True}
    assert tuned("Llama, tied", "LoRA").trainer.loading == known | {"rows": 402}
    assert tuned("Llama, untied, spare rows", "LoRA").trainer.loading == known | {"rows": 0}


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_pissa_is_saved_as_a_plain_lora_on_the_untouched_base(tuned, start):
    made = tuned(
        "Llama, tied, spare rows" if start == "pissa" else "Qwen3, untied", {"pissa": "PiSSA"}.get(start, "OLoRA")
    )
    config = LoraConfig.from_pretrained(made.run / "model")
    scale = math.sqrt(2) if config.use_rslora else 2  # alpha / sqrt(r) or alpha / r stays as it was
    assert (config.init_lora_weights, config.r, config.lora_alpha) == (True, 16, pytest.approx(16 * scale))
    ids = made.trainer.train_dataset[0]["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32)
    base.resize_token_embeddings(max(402, base.config.vocab_size))
    known = logits(base, ids)[..., :400]
    adapted = PeftModel.from_pretrained(base, made.run / "model")
    with adapted.disable_adapter():
        assert (logits(adapted, ids)[..., :400] - known).abs().max() == 0


@pytest.mark.parametrize("kind", ["LoRA", "QLoRA"])
def test_small_updates_are_not_rounded_away(tmp_path, kind):
    base = make_base("Llama, tied", tmp_path / "base")
    trainer = tune(base, ADAPTERS[kind], tmp_path / "run", learning_rate=2e-5, max_steps=15)
    moved = [
        (value != trainer.at_start[name]).float().mean().item()
        for name, value in trainer.model.named_parameters()
        if "lora_A" in name
    ]
    assert min(moved) >= 0.95
    assert {value.dtype for value in trainer.model.parameters() if value.requires_grad} == {torch.float32}


def test_a_bf16_checkpoint_is_trained_whole_in_fp32_and_the_log_says_what_it_takes(tmp_path, caplog):
    base = make_base("Llama, tied, spare rows", tmp_path / "base")
    with caplog.at_level(logging.INFO, logger="sft_recipes"):
        trainer = tune(base, {"type": "none"}, tmp_path / "run", dtype="bfloat16", learning_rate=2e-5, max_steps=15)
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = dict(trainer.model.named_parameters())[name]
    assert weight.dtype == torch.float32 and (weight != trainer.at_start[name]).float().mean() >= 0.95
    size = 16 * sum(value.numel() for value in trainer.model.parameters()) / 2**20
    assert f"Trained weights are fp32 and take {size:.1f} MiB" in caplog.text


def test_bf16_weights_are_trained_by_an_optimizer_that_keeps_small_updates_and_stand_still_with_adamw(
    tmp_path, monkeypatch
):
    """15 updates of 2e-5 in weights of about 0.02, whose neighbours in bf16 are 1.2e-4 away."""
    pytest.importorskip("optimi")
    base, name = make_base("Llama, tied, spare rows", tmp_path / "base"), "model.layers.0.self_attn.q_proj.weight"

    def weight_state_and_share_that_moved(optimizer):
        rest = {"dtype": "bfloat16", "learning_rate": 2e-5, "max_steps": 15, "optim": optimizer}
        trainer = tune(base, {"type": "none"}, tmp_path / optimizer, **rest)
        weight = dict(trainer.model.named_parameters())[name]
        assert weight.dtype == torch.bfloat16
        state = [value for value in trainer.optimizer.state[weight].values() if value.numel() > 1]
        return weight, state, (weight != trainer.at_start[name]).float().mean()

    weight, state, moved = weight_state_and_share_that_moved("stable_adamw")
    assert moved >= 0.9 and sum(value.nbytes for value in state) == optimizer_state_bytes("stable_adamw", weight)
    monkeypatch.setattr("sft_recipes.training.trainer.keeps_small_updates", lambda _: True)  # or AdamW's would be fp32
    assert weight_state_and_share_that_moved("adamw_torch")[2] <= 0.5


def test_loraplus_multiplies_the_rate_of_the_b_matrices(tuned):
    trainer = tuned("Llama, tied", "LoRA+").trainer
    rates = {id(value): group["lr"] for group in trainer.optimizer.param_groups for value in group["params"]}
    for name, value in trainer.model.named_parameters():
        if value.requires_grad:
            assert rates[id(value)] == pytest.approx(2e-3 * (4 if "lora_B" in name else 1)), name


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama with spare rows, and the ids of ChatML's tokens in it."""
    folder = make_base("Llama, untied, spare rows", tmp_path_factory.mktemp("names") / "base")
    tokenizer, _, new = load_tokenizer(ModelOptions(str(folder), "chatml"))
    return load_model(ModelOptions(str(folder)), None, True, tokenizer, ["<|im_end|>"], new), new


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"target_modules": ["q_proj", "v_porj"]},
         "adapter.lora.target_modules: no module of this model is called 'v_porj'. Did you mean v_proj?"),
        ({"target_modules": "q_proj"}, "adapter.lora.target_modules: no module of this model is called 'q_proj'. Write [q_proj]."),
        ({"modules_to_save": ["lm_heed"]},
         "adapter.lora.modules_to_save: no module of this model is called 'lm_heed'. Did you mean lm_head?"),
        ({"target_modules": "all-linear", "exclude_modules": ["mlp.up_prj"]},
         "adapter.lora.exclude_modules: no module of this model is called 'mlp.up_prj'. Did you mean up_proj?"),
        ({"target_modules": ["q_proj", "lm_head"]},
         "adapter.lora.target_modules names lm_head: the loss uses its weight directly, without an adapter. Write "
         "adapter.lora.modules_to_save=[lm_head], which trains it in full, or leave it out."),
        ({"target_modules": ["embed_tokens"]},
         "adapter.lora.target_modules names model.embed_tokens, whose rows of new tokens are trained already. Leave it "
         "out, or write adapter.lora.modules_to_save=[model.embed_tokens], which trains it in full."),
    ],
)  # fmt: skip
def test_a_name_that_would_be_passed_over_gets_a_line(llama, fields, line):
    peft = build_peft_config(parse_adapter({"type": "lora", "lora": fields}))
    assert error_of(prepare_peft_config, peft, *llama) == line


def test_names_by_their_ends_and_as_a_pattern_are_found(llama):
    for targets in (["self_attn.q_proj", "down_proj"], r".*layers\.1\..*(q|v)_proj", "all-linear"):
        peft = build_peft_config(
            parse_adapter({"type": "lora", "lora": {"target_modules": targets, "exclude_modules": ["up_proj"]}})
        )
        assert prepare_peft_config(peft, *llama).trainable_token_indices == dict.fromkeys(
            ("model.embed_tokens", "lm_head"), llama[1]
        )


def test_a_layer_that_is_trained_whole_needs_no_rows_of_its_own(llama):
    peft = build_peft_config(parse_adapter({"type": "lora", "lora": {"modules_to_save": ["lm_head"]}}))
    assert prepare_peft_config(peft, *llama).trainable_token_indices == {"model.embed_tokens": llama[1]}


def test_rows_that_the_config_names_are_trained_with_the_new_ones(llama):
    peft = build_peft_config(parse_adapter({"type": "lora", "lora": {"trainable_token_indices": [5]}}))
    assert prepare_peft_config(peft, *llama).trainable_token_indices == {
        "model.embed_tokens": [5, *llama[1]],
        "lm_head": llama[1],
    }


def test_one_of_two_tied_layers_cannot_go_its_own_way(tmp_path):
    base, layers = make_base("Llama, tied", tmp_path / "base"), ("embed_tokens", "lm_head")
    for whole in layers:
        tune(base, lora(modules_to_save=[whole]), tmp_path / whole, max_steps=5)
        model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / whole / "model", dtype=torch.float32)
        assert torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    for found in in_fresh_process([(tmp_path / whole, base, True) for whole in layers]):
        assert max(found.values()) <= 1e-5


@pytest.mark.parametrize(
    ("adapter", "line"),
    [
        ({"type": "ia4"}, "adapter.type cannot be 'ia4'. Did you mean ia3?"),
        ({"type": "qlora"}, "adapter.type cannot be 'qlora'. Write adapter=qlora."),
        ({"type": "ia3", "loraplus_lr_ratio": 4.0}, "adapter.loraplus_lr_ratio needs adapter.type=lora."),
        (lora() | {"loraplus": 2}, "adapter.loraplus is not a field of adapter. Did you mean loraplus_lr_ratio?"),
        ({"type": "none", "quantization": {"load_in_4bit": True}},
         "adapter.quantization freezes the base, so that an adapter is needed. Write adapter=qlora."),
    ],
)  # fmt: skip
def test_a_value_that_trains_nothing_is_refused(adapter, line):
    assert error_of(parse_adapter, adapter) == line


@pytest.mark.parametrize("kind", ["prompt_tuning", "prefix_tuning", "p_tuning"])
def test_trained_prompts_refuse_packing_and_new_tokens(llama, kind, tmp_path):
    line = f"adapter.type={kind} puts tokens of its own before every row, so rows cannot be joined. Write trainer.packing=false."
    config = composed(
        "+recipe=tiny",
        "adapter=none",
        f"adapter.type={kind}",
        f"adapter.{kind}.num_virtual_tokens=4",
        "trainer.packing=true",
    )
    assert error_of(set_up_run, config, tmp_path) == line
    peft = build_peft_config(parse_adapter({"type": kind, kind: {"num_virtual_tokens": 4}}))
    assert error_of(prepare_peft_config, peft, *llama).startswith(
        f"adapter.type={kind} cannot train the 2 tokens that the chat template"
    )
    assert prepare_peft_config(peft, llama[0], []) is peft


@pytest.mark.parametrize(
    ("adapter", "line"),
    [
        ({"type": "vera", "vera": {"rank": 8}}, "adapter.vera.rank is not a field of VeraConfig. Write adapter.lora.r."),
        (lora(init_lora_weights="eva"), "adapter.lora.init_lora_weights=eva needs a pass over data first, which no run makes."),
        (lora(init_lora_weights="pissa") | {"quantization": {"load_in_4bit": True}},
         "adapter.lora.init_lora_weights=pissa changes the base, which 4 bits do not allow."),
    ],
)  # fmt: skip
def test_an_adapter_that_there_is_not_gets_a_line(adapter, line):
    assert error_of(lambda: build_peft_config(parse_adapter(adapter))) == line


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"load_in_4bits": True}, "adapter.quantization.load_in_4bits is not a field of BitsAndBytesConfig. Did you mean load_in_4bit?"),
        ({"load_in_4bit": "yes"}, "adapter.quantization.load_in_4bit must be a boolean"),
        ({"bnb_4bit_quant_type": "nf5"}, "adapter.quantization.bnb_4bit_quant_type cannot be 'nf5'. Choices: nf4, fp4."),
        ({"bnb_4bit_compute_dtype": "bf16"},
         "adapter.quantization.bnb_4bit_compute_dtype cannot be 'bf16'. Choices: bfloat16, float16, float32."),
    ],
)  # fmt: skip
def test_a_wrong_quantization_gets_a_line(values, line):
    assert error_of(build_quantization_config, AdapterOptions("lora", quantization=values)) == line


def test_an_adapter_run_is_trained_further(tuned, tmp_path):
    made = tuned("Llama, untied", "LoRA")
    trainer = tune(made.run, lora(), tmp_path / "run", template=None, max_steps=20)
    assert trainer.new_tokens == [] and trainer.state.log_history[0]["loss"] < 3.1  # the first run began at 6
    assert load_adapter_config(str(tmp_path / "run")).base_model_name_or_path == str(made.base)
    rows = [value for name, value in trainer.model.named_parameters() if "trainable_tokens_delta" in name]
    assert len(rows) == 2 and all(value.requires_grad for value in rows)
    assert max(in_fresh_process([(tmp_path / "run", made.base, True)])[0].values()) <= 1e-5


@pytest.mark.parametrize(
    ("adapter", "template", "start"),
    [
        (lora(r=4), None, "model.id is an adapter run with adapter.lora.r=8. Write that, or merge that run first"),
        ({"type": "ia3"}, None, "model.id is an adapter run, which goes on with adapter.type=lora."),
        ({"type": "none"}, None, "model.id is an adapter run, which goes on with adapter.type=lora."),
        (lora(), "llama3", "model.chat_template has 3 tokens that"),
    ],
)
def test_an_adapter_run_is_trained_further_as_it_is_or_not_at_all(tuned, tmp_path, adapter, template, start):
    run = tuned("Llama, untied", "LoRA").run
    assert error_of(tune, run, adapter, tmp_path / "run", template).startswith(start)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_run_with_a_damaged_file_is_one_line(tuned, tmp_path, file):
    run = shutil.copytree(tuned("Llama, untied", "LoRA").run, tmp_path / "run")
    path = next(run.rglob(file))
    path.write_bytes(path.read_bytes()[:40])
    line = error_of(tune, run, lora(), tmp_path / "again", None)
    assert line.startswith(f"{path.parent}: it") and "\n" not in line


def test_other_methods_train_both_embeddings_whole(llama, caplog):
    peft = build_peft_config(parse_adapter({"type": "ia3"}))
    with caplog.at_level(logging.WARNING, logger="sft_recipes"):
        train_new_tokens(peft, *llama)
    assert peft.modules_to_save == ["model.embed_tokens", "lm_head"]
    assert caplog.messages == [
        f"IA3 trains both embeddings in full, for 2 new tokens: {2 * 464 * 128} parameters more."
    ]


def test_a_folder_that_lacks_what_was_trained_is_refused(tuned):
    from safetensors.torch import save_file

    made = tuned("Qwen3, untied", "LoRA")
    file = made.run / "model" / "adapter_model.safetensors"
    whole = load_file(file)
    save_file({name: value for name, value in whole.items() if "layers.1" not in name}, file)
    line = error_of(check_saved_adapter, made.trainer.model, made.run / "model")
    save_file(whole, file)
    lost = [name for name in whole if "layers.1" in name]
    assert line.startswith(
        f"{made.run / 'model'} lacks {len(lost)} of {len(whole)} trained tensors, the first is base_model."
    )
    check_saved_adapter(made.trainer.model, made.run / "model")  # and the model is what it was


def test_an_adapter_that_cannot_be_read_back_leaves_the_model_as_it_was(tuned, tmp_path):
    model = tuned("Qwen3, untied", "LoRA").trainer.model
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    with pytest.raises(ValueError):
        check_saved_adapter(model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal", "mica", "pissa", "pissa_niter_2", "olora"])
def test_the_inits_that_are_listed_are_those_that_change_the_base(start):
    model = small_llama()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    peft = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=start)
    base = get_peft_model(model, peft).get_base_model()
    changed = not torch.equal(
        base.model.layers[0].self_attn.q_proj.base_layer.weight, before["model.layers.0.self_attn.q_proj.weight"]
    )
    assert changes_base_weights(peft) == changed


def test_a_head_with_a_bias_whose_rows_peft_would_train_without_it_is_refused():
    """https://github.com/huggingface/peft/issues/3649"""
    model = small_llama()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY))
    peft = build_peft_config(AdapterOptions("lora", {"target_modules": ["q_proj"]}))
    assert error_of(train_new_tokens, peft, model, [95, 96]) == (
        "lm_head has a bias, which PEFT drops where an adapter trains the rows of new tokens. Write "
        "adapter.lora.modules_to_save=[lm_head], which trains it in full."
    )
    peft = build_peft_config(AdapterOptions("lora", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}))
    train_new_tokens(peft, model, [95, 96])
    assert peft.trainable_token_indices == {"model.embed_tokens": [95, 96]}
