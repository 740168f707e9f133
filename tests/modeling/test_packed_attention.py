"""Packed documents do not see each other, and models that would let them are refused."""

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from sft_recipes.errors import ConfigError
from sft_recipes.modeling.packed_attention import BY_DOCUMENT, check_no_cross_document_attention, choose_attention

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "n_embd": 32, "n_layer": 2, "n_head": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def small(architecture: str, **changes):
    torch.manual_seed(0)
    known = AutoConfig.for_model(architecture)
    read_only = {name for name in dir(type(known)) if isinstance(getattr(type(known), name), property)}
    values = {key: value for key, value in (SMALL | changes).items() if hasattr(known, key) and key not in read_only}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **values))


SAFE = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "gpt_neox", "gpt2", "phi", "phi3", "olmo2", "smollm3",
        "granite", "cohere2", "starcoder2", "mixtral", "olmoe"]  # fmt: skip
LEAKING = ["bloom", "opt", "mpt", "xglm", "gpt_oss", "mamba", "falcon_mamba", "recurrent_gemma", "jamba", "rwkv", "biogpt",
           "qwen3_next"]  # fmt: skip

# transformers 5.24 gives falcon's mask the position ids, by which it keeps documents apart
(SAFE if Version(transformers.__version__) >= Version("5.24") else LEAKING).append("falcon")


@pytest.mark.parametrize("architecture", SAFE)
def test_these_keep_documents_apart(architecture):
    model = small(architecture)
    assert check_no_cross_document_attention(model) <= 1e-5
    model.set_attn_implementation(choose_attention(model, model.device))
    assert check_no_cross_document_attention(model) <= 1e-5


@pytest.mark.parametrize("architecture", LEAKING)
def test_these_are_refused_with_the_way_out(architecture):
    with pytest.raises(ConfigError, match="Write trainer.packing=false"):
        check_no_cross_document_attention(small(architecture))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_lets_rounding_pass_and_no_document(dtype):
    for architecture in ("llama", "gpt_neox", "gemma2"):
        assert check_no_cross_document_attention(small(architecture).to(dtype)) <= 0.01
    for architecture in ("mamba", "falcon_mamba", "rwkv"):  # with random weights the next logits change by 0.4 to 1.5
        with pytest.raises(ConfigError, match="Write trainer.packing=false"):
            check_no_cross_document_attention(small(architecture).to(dtype))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt_neox", "olmo2"])
def test_by_document_gives_the_logits_of_each_document_alone(architecture):
    model = small(architecture).eval()
    model.set_attn_implementation(BY_DOCUMENT)
    documents = torch.randint(3, 99, (1, 12), generator=torch.Generator().manual_seed(1)).split([5, 7], dim=1)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    with torch.no_grad():
        together = model(
            torch.cat(documents, dim=1), position_ids=positions, cu_seq_lens_q=ends, use_cache=False
        ).logits
        model.set_attn_implementation("eager")
        apart = torch.cat([model(document, use_cache=False).logits for document in documents], dim=1)
    assert torch.allclose(together, apart, atol=1e-5)


def test_by_document_still_knows_padding():
    model = small("llama").eval()
    ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        known = model(ids, attention_mask=mask).logits[mask == 1]
        model.set_attn_implementation(BY_DOCUMENT)
        assert torch.allclose(model(ids, attention_mask=mask).logits[mask == 1], known, atol=1e-5)


def test_a_sliding_window_keeps_the_model_s_own_attention():
    assert choose_attention(small("mistral", sliding_window=16), CPU) == "sdpa"
    assert choose_attention(small("llama"), CPU) == BY_DOCUMENT


def test_on_a_gpu_flash_attention_is_taken_where_it_is_installed_else_the_model_s_own(monkeypatch):
    gpu, model = torch.device("cuda"), small("llama")
    monkeypatch.setattr("sft_recipes.modeling.packed_attention.find_spec", lambda name: name == "flash_attn")
    assert choose_attention(model, gpu) == "flash_attention_2"
    monkeypatch.setattr("sft_recipes.modeling.packed_attention.find_spec", lambda name: None)
    assert choose_attention(model, gpu) == "sdpa"


def test_a_model_with_an_adapter_is_chosen_for_and_checked_as_well():
    model = get_peft_model(small("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.set_attn_implementation(choose_attention(model, CPU))
    assert model.get_base_model().config._attn_implementation == BY_DOCUMENT
    assert check_no_cross_document_attention(model) <= 1e-5


def test_in_bf16_rounding_is_no_leak_and_a_leak_is_one():
    assert check_no_cross_document_attention(small("llama").bfloat16()) <= 0.2
    leaking = small("bloom").bfloat16()
    with torch.no_grad():
        for weight in leaking.parameters():
            weight.mul_(8)  # logits as large as a trained model's
    with pytest.raises(ConfigError, match="bloom with eager attention lets one document change the logits"):
        check_no_cross_document_attention(leaking)
