"""Packed documents do not see each other, and models that would let them are refused."""

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import sdpa_mask

from sft_recipes.errors import ConfigError
from sft_recipes.modeling import packed_attention
from sft_recipes.modeling.packed_attention import (
    BY_DOCUMENT,
    VARLEN,
    attention_choices,
    check_no_cross_document_attention,
    sdpa_by_document,
    take_first_that_isolates,
    varlen_attention,
)
from support.small_models import slow_varlen

CPU, GPU = torch.device("cpu"), torch.device("cuda")
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
    take_first_that_isolates(model, attention_choices(model, CPU, False))


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
    assert attention_choices(small("mistral", sliding_window=16), CPU, False) == ["sdpa"]
    assert attention_choices(small("llama"), CPU, False) == [BY_DOCUMENT, "sdpa"]


@pytest.mark.parametrize(
    ("architecture", "half", "installed", "choices"),
    [
        ("llama", True, {"triton"}, [VARLEN, "flex_attention", "sdpa"]),
        ("mistral", True, {"triton", "flash_attn"}, [VARLEN, "flex_attention", "flash_attention_2", "sdpa"]),
        ("llama", False, {"triton", "flash_attn"}, ["flex_attention", "sdpa"]),  # flash attention takes no fp32
        ("llama", True, set(), [VARLEN, "sdpa"]),
        ("gemma2", True, {"triton"}, ["flex_attention", "eager"]),  # caps its logits, which torch's kernel does not
        ("bloom", True, {"triton"}, ["eager"]),
        ("gpt2", True, {"triton", "flash_attn"}, ["flash_attention_2", "sdpa"]),  # drops a tenth of its attention
        ("seed_oss", True, {"triton"}, ["sdpa"]),  # as gpt2, and flex attention would refuse to train it
    ],
)
def test_on_a_gpu_the_kernels_that_know_boundaries_come_first(architecture, half, installed, choices, monkeypatch):
    monkeypatch.setattr(packed_attention, "find_spec", lambda name: name in installed)
    assert attention_choices(small(architecture), GPU, half) == choices


def test_an_attention_that_fails_here_makes_way_for_the_next_one(caplog):
    model = small("llama")
    with caplog.at_level("INFO"):
        assert take_first_that_isolates(model, [VARLEN, "sdpa"]) == "sdpa"  # torch has no such kernel for a CPU
    assert model.config._attn_implementation == "sdpa"
    assert caplog.messages[0].startswith("Not with torch_varlen attention: ")
    with pytest.raises(ConfigError, match="Write trainer.packing=false"):
        take_first_that_isolates(small("bloom"), ["eager"])


def test_a_kernel_whose_way_back_fails_or_leaks_makes_way_for_the_next_one(monkeypatch, caplog):
    """Forward both are sdpa document by document, and take_first_that_isolates has to look at the gradients."""

    def fails(*tensors, **options):
        output, _ = sdpa_by_document(*tensors, **options)
        if output.requires_grad:
            output.register_hook(lambda gradient: 1 / 0)
        return output, None

    def leaks(module, query, key, value, *rest, **options):
        output, _ = sdpa_by_document(module, query, key, value, *rest, **options)
        before = query - query.detach()  # zero, but for its gradient
        return output + before.cumsum(2).transpose(1, 2), None

    for name, attention in (("fails", fails), ("leaks", leaks)):
        monkeypatch.setitem(AttentionInterface._global_mapping, name, attention)
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, sdpa_mask)
    model = small("llama")
    with caplog.at_level("INFO"):
        assert take_first_that_isolates(model, ["fails", "leaks", BY_DOCUMENT]) == BY_DOCUMENT
    assert "Not with fails attention: division by zero" in caplog.messages[0]
    assert (
        "leaks attention keeps logits of packed documents apart, but those of one have a gradient of "
        in caplog.messages[1]
    )
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("llama", {}), ("qwen3", {}), ("gpt_neox", {}), ("olmo2", {}), ("mistral", {"sliding_window": 3}),
     ("gemma3_text", {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]})],
)  # fmt: skip
def test_varlen_attention_has_the_logits_and_gradients_of_each_document_alone(architecture, changes, monkeypatch):
    monkeypatch.setattr(packed_attention, "varlen_attn", slow_varlen)
    model, lengths = small(architecture, **changes), [5, 7, 1]
    documents = torch.randint(3, 99, (1, 13), generator=torch.Generator().manual_seed(1)).split(lengths, dim=1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    ends = torch.tensor([0, 5, 12, 13], dtype=torch.int32)
    boundaries = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 7, "max_length_k": 7}

    def logits_and_gradients(*batches):
        model.zero_grad()
        logits = torch.cat([model(use_cache=False, **batch).logits for batch in batches], dim=1)
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        return [logits.detach(), *(weight.grad.clone() for weight in model.parameters())]

    model.set_attn_implementation("eager")
    alone = logits_and_gradients(*({"input_ids": document} for document in documents))
    model.set_attn_implementation(VARLEN)
    packed = {"input_ids": torch.cat(documents, dim=1), "position_ids": positions} | boundaries
    together = logits_and_gradients(packed)
    for one, other in zip(alone, together, strict=True):
        assert torch.allclose(one, other, atol=1e-4, rtol=1e-4)
    assert check_no_cross_document_attention(model) <= 1e-5


def test_varlen_attention_leaves_padded_rows_to_sdpa_and_refuses_packed_ones_without_boundaries():
    model, ids = small("mistral", sliding_window=3).eval(), torch.arange(3, 21).view(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        known = model(ids, attention_mask=mask).logits[mask == 1], model(ids).logits
        model.set_attn_implementation(VARLEN)
        assert torch.equal(model(ids, attention_mask=mask).logits[mask == 1], known[0])
        assert torch.equal(model(ids).logits, known[1])
        with pytest.raises(ValueError, match="Packed rows need cu_seq_lens_q"):
            model(ids[:1], position_ids=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]]), use_cache=False)


def test_torch_s_kernel_takes_what_we_give_it():
    """Shapes alone, by its own description for devices without values."""
    like = {"device": "meta", "dtype": torch.bfloat16, "requires_grad": True}
    query, key, value = (torch.empty(1, heads, 24, 8, **like) for heads in (4, 2, 2))
    ends = {"cu_seq_lens_q": torch.empty(3, dtype=torch.int32, device="meta"), "max_length_q": 12}
    output, _ = varlen_attention(None, query, key, value, None, scaling=0.3, sliding_window=8, **ends)
    output.sum().backward()
    assert output.shape == (1, 24, 4, 8) and [one.grad.shape for one in (query, key)] == [query.shape, key.shape]


def test_a_model_with_an_adapter_is_chosen_for_and_checked_as_well():
    model = get_peft_model(small("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    take_first_that_isolates(model, attention_choices(model, CPU, False))
    assert model.get_base_model().config._attn_implementation == BY_DOCUMENT
    assert check_no_cross_document_attention(model) <= 1e-5


def test_in_bf16_rounding_is_no_leak_and_a_leak_is_one():
    assert check_no_cross_document_attention(small("llama").bfloat16()) <= 0.2
    leaking = small("bloom").bfloat16()
    with torch.no_grad():
        for weight in leaking.parameters():
            weight.mul_(8)  # logits as large as a trained model's
    with pytest.raises(ConfigError, match="bloom with eager attention lets a document change the logits"):
        check_no_cross_document_attention(leaking)
