"""Every workaround's fault, shown on the installed versions: a test that fails says that its workaround can go."""

import ast
import os
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit
from bitsandbytes.optim import AdamW8bit, GlobalOptimManager
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from sft_recipes.modeling.save_load import load_run
from sft_recipes.modeling.workarounds import (
    PRIVATE_NAMES,
    complete_reference,
    disable_bnb_cpu_repacking,
    ensure_lm_head_bias,
    forget_optimizer_overrides,
    head_sharded_with_root,
    save_adapter_only,
    weights_not_tied_again,
)
from sft_recipes.training.trainer import SupervisedTrainer
from support.paths import ROOT
from support.small_models import VOCABULARY, small_llama

NEW = [VOCABULARY - 2, VOCABULARY - 1]


def tied_llama(vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    """The small Llama with one weight for input embedding and LM head."""
    torch.manual_seed(0)
    shape = small_llama().config.to_dict() | {"tie_word_embeddings": True, "vocab_size": vocabulary}
    return LlamaForCausalLM(LlamaConfig(**shape))


def with_new_tokens(model: torch.nn.Module) -> PeftModel:
    """LoRA that trains the rows of two tokens."""
    layers = ["embed_tokens"] if model.config.tie_word_embeddings else ["embed_tokens", "lm_head"]
    return get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=dict.fromkeys(layers, NEW))
    )  # fmt: skip


def trainer_arguments(folder: Path, **values) -> dict:
    """What a trainer of TRL's needs besides its model, on eight short rows."""
    rows = Dataset.from_dict(
        {key: [[5, 6, 7 + place][: 1 + place % 3 + 1] for place in range(8)] for key in ("input_ids", "labels")}
    )
    arguments = SFTConfig(
        output_dir=str(folder), max_steps=1, report_to="none", save_strategy="no", bf16=False, use_cpu=True, disable_tqdm=True,
        activation_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True}, **values,
    )  # fmt: skip
    return {"args": arguments, "train_dataset": rows, "eval_dataset": rows}


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes repacks on CPUs with AVX512-BF16 only")
def test_bitsandbytes_repacks_4_bit_weights_on_a_cpu_when_a_model_is_evaluated():
    def forward(width: int, disabled: bool) -> torch.Tensor:
        torch.manual_seed(0)
        layer = Linear4bit(width, 64, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16).to("cpu").eval()
        if disabled:
            disable_bnb_cpu_repacking(layer)
        before = layer.weight.data.clone()
        with torch.no_grad():
            layer(torch.ones(1, width))
        return before, layer.weight.data

    before, after = forward(128, disabled=True)
    assert torch.equal(before, after)
    before, after = forward(128, disabled=False)
    assert before.shape != after.shape or not torch.equal(before, after)
    forward(96, disabled=True)
    with pytest.raises(Exception):  # noqa: B017 no multiple of 64: whatever the kernel raises
        forward(96, disabled=False)


def test_trl_casts_the_adapters_of_a_4_bit_model_to_bf16(tmp_path, chat_tokenizer):
    tokenizer, _, _ = chat_tokenizer("llama3", "chatml")
    small_llama().save_pretrained(tmp_path / "base")
    quantized = LlamaForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    trainer = SFTTrainer(quantized, processing_class=tokenizer, peft_config=lora, **trainer_arguments(tmp_path))
    assert {value.dtype for value in trainer.model.parameters() if value.requires_grad} == {torch.bfloat16}


def test_peft_hides_the_bias_of_an_lm_head_whose_rows_are_trained():
    model = with_new_tokens(small_llama())
    assert not hasattr(model.get_output_embeddings(), "bias")
    ensure_lm_head_bias(model)
    assert model.get_output_embeddings().bias is None


def test_peft_drops_the_bias_of_an_lm_head_whose_rows_are_trained():
    base = small_llama().eval()
    base.lm_head.bias = torch.nn.Parameter(torch.arange(VOCABULARY, dtype=torch.float32))
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        wanted = base(ids, use_cache=False).logits
        model = with_new_tokens(base).eval()
        assert torch.allclose(wanted - model(ids, use_cache=False).logits, torch.arange(VOCABULARY).float(), atol=1e-4)


@pytest.mark.parametrize("base", [tied_llama, small_llama])
def test_accelerate_shards_an_lm_head_that_peft_wraps_apart_from_the_root(monkeypatch, base):
    """Whatever is no group of its own is the root's: a tied weight would be in two groups, one that is read not gathered."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no")
    model, groups = with_new_tokens(base()), []
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda modules, **_: groups.append(modules))
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    assert layers[0].weight is not layers[0].weight  # computed anew
    fsdp2_prepare_model(accelerator, model)
    assert groups == [layers[0], [layers[1]], model]
    groups.clear()
    with head_sharded_with_root(model):
        fsdp2_prepare_model(accelerator, model)
    assert groups == [model]


def test_accelerate_makes_bf16_weights_fp32_where_fsdp2_shards_them_and_bf16_is_computed_in(monkeypatch):
    """training/memory.py, keeps_small_updates, counts on it."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="bf16", is_main_process=False
    )
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda *_, **__: None)
    model = fsdp2_prepare_model(accelerator, small_llama().to(torch.bfloat16))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_peft_gives_the_rows_of_tied_embeddings_two_names():
    ids, model = torch.tensor([[3, *NEW]]), with_new_tokens(tied_llama()).eval()
    wanted = model(ids, use_cache=False).logits
    before = [name for name in model.state_dict() if "trainable_tokens_delta" in name]
    with head_sharded_with_root(model):
        after = [name for name in model.state_dict() if "trainable_tokens_delta" in name]
    assert len(before) == 2 and after == [name for name in before if "embed_tokens" in name]
    assert torch.equal(model(ids, use_cache=False).logits, wanted)


def test_peft_saves_both_embeddings_of_a_model_whose_vocabulary_has_grown_and_an_empty_card(tmp_path):
    tied_llama(VOCABULARY - 2).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(VOCABULARY)
    model = with_new_tokens(base)
    model.save_pretrained(tmp_path / "plain")
    with save_adapter_only(model):
        model.save_pretrained(tmp_path / "ours")
    whole = [
        {
            name
            for name, value in load_file(tmp_path / name / "adapter_model.safetensors").items()
            if len(value) == VOCABULARY
        }
        for name in ("plain", "ours")
    ]
    assert len(whole[0]) >= 1 and whole[1] == set()
    assert "[More Information Needed]" in (tmp_path / "plain" / "README.md").read_text()
    assert not (tmp_path / "ours" / "README.md").exists()
    assert model.save_pretrained.__func__ is PeftModel.save_pretrained  # and afterwards it is PEFT's again


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_lm_eval_ties_the_weights_of_a_model_in_memory_and_fails_where_peft_wraps_them(chat_tokenizer):
    from lm_eval.models.huggingface import HFLM

    tokenizer, _, _ = chat_tokenizer("llama3", "chatml")
    model = with_new_tokens(tied_llama())
    with weights_not_tied_again(model):
        HFLM(pretrained=model, tokenizer=tokenizer)
    with pytest.raises(Exception):  # noqa: B017 an AttributeError or a ValueError, by transformers' version
        HFLM(pretrained=model, tokenizer=tokenizer)


def test_trl_s_reference_adapter_lacks_the_rows_of_new_tokens(tuned, tmp_path):
    model, tokenizer = load_run(tuned("Llama, tied", "LoRA").run)
    pair = {"prompt": [{"role": "user", "content": "Hi."}], "chosen": [{"role": "assistant", "content": "Yes."}],
            "rejected": [{"role": "assistant", "content": "No."}]}  # fmt: skip
    arguments = DPOConfig(output_dir=str(tmp_path), report_to="none", bf16=False, use_cpu=True)
    trainer = DPOTrainer(model, args=arguments, train_dataset=Dataset.from_list([pair]), processing_class=tokenizer)

    def differing() -> set[str]:
        policy, reference = (get_peft_model_state_dict(trainer.model, adapter_name=name) for name in ("default", "ref"))
        return {name for name, value in policy.items() if not torch.equal(value, reference[name])}

    assert differing() == {  # two names of one parameter, since the layers are tied
        f"base_model.model.{layer}.token_adapter.trainable_tokens_delta" for layer in ("model.embed_tokens", "lm_head")
    }
    complete_reference(trainer.model)
    assert differing() == set()


def eight_bit_state(model: torch.nn.Module) -> torch.dtype:
    """The type of AdamW's first moment of a model's first weight, after a step in 8 bits."""
    optimizer = AdamW8bit(model.parameters(), min_8bit_size=1)
    given = torch.ones(1, 1, dtype=torch.long) if isinstance(model, torch.nn.Embedding) else torch.ones(1, 64)
    model(given).sum().backward()
    optimizer.step()
    return optimizer.state[next(model.parameters())]["state1"].dtype


def test_transformers_fills_a_model_without_weights_where_zero3_is_on(tmp_path):
    pytest.importorskip("deepspeed")
    script = f"""
import deepspeed, torch
from sft_recipes.modeling.workarounds import whole_under_zero3
from support.small_models import small_llama
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig
deepspeed.init_distributed("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1, auto_mpi_discovery=False)
zero3 = HfDeepSpeedConfig(dict(zero_optimization=dict(stage=3), train_micro_batch_size_per_gpu=1))
with torch.device("meta"):
    with whole_under_zero3():
        print("whole:", AutoModelForCausalLM.from_config(small_llama().config).lm_head.weight.shape)
    AutoModelForCausalLM.from_config(small_llama().config)
"""
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert "whole: torch.Size([97, 32])" in done.stdout and "Cannot copy out of meta tensor" in done.stderr


def test_bitsandbytes_takes_an_earlier_models_exceptions_for_a_later_one():
    forget_optimizer_overrides()
    assert eight_bit_state(torch.nn.Linear(64, 64)) is torch.uint8
    embedding = torch.nn.Embedding(64, 64)
    GlobalOptimManager.get_instance().register_module_override(embedding, "weight", {"optim_bits": 32})
    assert eight_bit_state(embedding) is torch.float32
    assert eight_bit_state(torch.nn.Linear(64, 64)) is torch.float32
    forget_optimizer_overrides()
    assert eight_bit_state(torch.nn.Linear(64, 64)) is torch.uint8


def test_a_trainer_s_optimizer_starts_without_an_earlier_models_exceptions(tmp_path, chat_tokenizer):
    tokenizer, _, _ = chat_tokenizer("llama3", "chatml")
    rows, manager = trainer_arguments(tmp_path, optim="adamw_8bit"), GlobalOptimManager.get_instance()
    manager.index2config[(0, 1)] = {"optim_bits": 32}
    trainer = SupervisedTrainer(model=small_llama(), processing_class=tokenizer, **rows)
    trainer.create_optimizer()
    assert manager.index2config == {}
    assert [module for module, *_ in manager.module_weight_config_triple] == [trainer.model.get_input_embeddings()]


def test_trl_s_evaluation_loss_depends_on_the_batch_size(tmp_path, chat_tokenizer):
    tokenizer, _, _ = chat_tokenizer("llama3", "chatml")
    losses = [
        SFTTrainer(
            small_llama(), processing_class=tokenizer, **trainer_arguments(tmp_path, per_device_eval_batch_size=size)
        ).evaluate()["eval_loss"]
        for size in (1, 8)
    ]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_peft_asks_models_by_a_name_that_transformers_has_deprecated():
    """The line of it is silenced in sft_recipes/__init__.py."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with_new_tokens(small_llama())
    assert any("`is_gradient_checkpointing` is deprecated" in str(warning.message) for warning in caught)


def test_importing_the_package_silences_what_dependencies_write_about_each_other():
    code = (
        "import warnings, logging, sft_recipes\n"
        "warnings.warn('`is_gradient_checkpointing` is deprecated and', FutureWarning)\n"
        "logging.getLogger('bitsandbytes.backends.cpu.ops').warning('pip install kernels')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def private_uses(path: Path) -> set[str]:
    """The private names of dependencies in a module: imported, read of anything but self and cls, or in a patched path."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            names = [alias.name for alias in node.names]
            for name in names if module is None else [module]:
                parts = name.split(".")
                private = next((place for place, part in enumerate(parts) if is_private(part)), None)
                found |= set() if private is None else {".".join(parts[: private + 1])}
            found |= {name for name in names if module and is_private(name)}
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            found |= set() if own else {node.attr}
        elif isinstance(node, ast.keyword) and is_private(node.arg or ""):
            found.add(node.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {part for part in node.value.split(".") if is_private(part)} if "." in node.value else set()
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.isidentifier() and name != "_"


def test_private_names_of_dependencies_are_listed_with_a_reason():
    package, used = ROOT / "sft_recipes", {}
    for path in package.rglob("*.py"):
        if names := private_uses(path):
            used[path.relative_to(package).as_posix()] = names
    used.pop("modeling/workarounds.py", None)  # the list itself
    assert used == {file: names.keys() for file, names in PRIVATE_NAMES.items()}
