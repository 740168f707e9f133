"""Workarounds for faults of our dependencies, each with its source, its versions and the condition for its removal.

tests/modeling/test_workarounds.py shows every fault on the installed versions and fails on the day it is gone. What has
to be in force before any dependency is imported, the silenced lines that they write about each other, stands in
sft_recipes/__init__.py; the limits of chat templates, for which transformers has no hook (its `render_jinja_template`
and its sandbox are replaced), in encoding/template_limits.py; the evaluation loss
(https://github.com/huggingface/transformers/issues/39241) is a hook of the trainer, training/trainer.py.
"""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from unittest.mock import patch

import torch
from bitsandbytes.optim import GlobalOptimManager
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel

log = logging.getLogger(__name__)

# Names of dependencies that begin with an underscore and have no public counterpart, by file, with the reason.
# A test compares the list with the code.
PRIVATE_NAMES = {
    "config/command_line.py": {
        "hydra._internal": "a config's files before they are composed",
        "_parse_overrides_and_create_caching_repo": "the search path that Hydra itself will use",
    },
    "config/config_files.py": {
        "hydra._internal": "as above: composing would run what a recipe names",
        "_parse_overrides_and_create_caching_repo": "as above",
    },
    "data/token_rows.py": {"_indices": "whether a dataset's columns stand in the order of its table"},
    "encoding/conversation_shapes.py": {"_replace": "what Python's named tuples have, under this name in its docs"},
    "data/sources.py": {"_fingerprint": "the identity of a dataset's rows"},
    "modeling/packed_attention.py": {
        "_attn_implementation": "the attention in force",
        "_supports_flash_attn": "whether a model hands its attention windows and boundaries, not a mask alone",
        "_supports_flex_attn": "as above",
    },
    "sweeps/job_folders.py": {"hydra._internal": "BasicSweeper, Hydra's own, which the docs tell plugins to follow"},
    "sweeps/local_gpus.py": {
        "hydra._internal": "BasicLauncher, as above",
        "_return_value": "a failed job's exception, which JobReturn.return_value raises",
    },
    "training/resumable_trainer.py": {
        "_get_train_sampler": "a sampler whose order an epoch's number decides, which transformers gives no generator",
        "_init_training_state": "where a resumed run begins",
        "_run_epoch": "no further step after the last one",
        "_save_checkpoint": "a checkpoint that is written aside and published whole",
        "_get_output_dir": "the place aside",
        "_finalize_training": "the time before a run was resumed",
    },
    "sweeps/ray_train.py": {
        "hydra._internal": "BasicLauncher, as above",
        "_return_value": "what a job raised: return_value raises it",
    },
    "training/trainer.py": {"_prepare_for_training": "where accelerate shards the model"},
    "training/choices.py": {"_attn_implementation": "the attention in force"},
    "training/activation_memory.py": {
        "torch._subclasses": "FakeTensorMode, which torch documents under this name",
        "torch.utils._python_dispatch": "TorchDispatchMode, as above",
        "_reparametrize_module": "functional_call's own, for the backward pass, too",
        "_CHUNKED_LOGPROB_CHUNK_SIZE": "the tokens that TRL's LM head takes at once on a CPU",
        "_forward_tile": "the GPU kernel of TRL's LM head, which takes no fake tensors",
        "_backward_tile": "as _forward_tile",
    },
}


def disable_bnb_cpu_repacking(model: torch.nn.Module) -> None:
    """Leaves 4-bit weights as they are: bitsandbytes repacks them for a CPU's AVX512 when a model is evaluated.

    It fails on widths that are no multiple of 64, and DoRA then reads the repacked ones (logits change by 0.3 to 1).
    bitsandbytes 0.50, nn/modules.py, Linear4bit.forward; another consequence is
    https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2078. Goes when forward leaves `self.weight` alone.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def whole_under_zero3() -> AbstractContextManager:
    """Lets models without weights be made and run where DeepSpeed's ZeRO-3 is on, which shares out those of any model.

    transformers 5.24, modeling_utils.py, PreTrainedModel._from_config fills them with values ("Cannot copy out of meta
    tensor"), and TRL gathers the LM head's. Goes when both leave parameters on the meta device as they are.
    """
    return patch("transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref", None)


def forget_optimizer_overrides() -> None:
    """Empties the list of parameters whose optimizer state is not 8-bit: bitsandbytes keeps it as long as the process.

    transformers puts a model's embeddings in it. The list holds places, not parameters, so that the next model of the
    process (a sweep's, or the one after the trial step) has 32-bit state in those places; it also keeps the embeddings
    themselves in memory. bitsandbytes 0.50, optim/optimizer.py, GlobalOptimManager and `check_overrides`. Goes when an
    optimizer has a list of its own.
    """
    GlobalOptimManager.get_instance().initialize()


def cast_trainable_to_fp32(model: torch.nn.Module) -> None:
    """Casts trained weights to fp32: TRL casts QLoRA's adapters to bf16, where small updates are rounded away.

    A checkpoint that is trained in full gets fp32 weights in the same way, whatever `model.dtype` says, unless the
    optimizer keeps small updates (training/memory.py). TRL 1.16,
    trainer/sft_trainer.py, SFTTrainer.__init__ ("the PEFT adapter weights are converted to bf16"); only DoRA's
    magnitudes are spared (https://github.com/huggingface/trl/issues/7268). The cast of adapters goes when all are.
    """
    number = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            number += getattr(parameter, "ds_numel", parameter.numel())  # of which DeepSpeed leaves a part here
    size = 16 * number / 2**20  # weight, gradient and AdamW's two moments, 4 bytes each
    size = f"{size / 1024:.1f} GiB" if size > 1024 else f"{size:.1f} MiB"
    log.info("Trained weights are fp32 and take %s with their gradients and AdamW's two moments, which are fp32, too.",
             size)  # fmt: skip


def ensure_lm_head_bias(model: PreTrainedModel | PeftModel) -> None:
    """Gives a wrapped LM head the `bias` None: TRL's fused head reads it, and PEFT's TrainableTokensWrapper hides it.

    Heads that have a bias never come here, `adapters.train_new_tokens` refuses them, since PEFT's forward drops it
    (https://github.com/huggingface/peft/issues/3649). PEFT 0.21, utils/other.py, TrainableTokensWrapper: goes when its
    `_hasattr_wrapped` passes `bias` on to the wrapped layer; the refusal goes with the issue.
    """
    head = model.get_output_embeddings()
    if not hasattr(head, "bias"):
        head.bias = None


@contextmanager
def head_sharded_with_root(model: torch.nn.Module) -> Iterator[None]:
    """Lets accelerate shard (FSDP2) a model whose LM head PEFT wraps: both embeddings go into the root's group.

    accelerate 1.15, utils/fsdp_utils.py, fsdp2_prepare_model, gives such a head a group of its own, which gathers
    nothing: TRL's fused loss reads the head's weight and never calls it. It does not see either that two embeddings are
    tied, as `TrainableTokensWrapper.weight` is computed anew each time, and shards their weight twice; and what it
    calls to tie them again, transformers' tie_weights, knows no wrapped layers. Goes when it compares parameters and
    has the head in a group with what is called. The rows of a tied head get one name, too: PEFT 0.21,
    tuners/trainable_tokens/layer.py, registers the input embedding's under both layers, and a checkpoint that has both
    names cannot be loaded (KeyError: torch 2.13, distributed/checkpoint/state_dict.py, visits a module once). Goes when
    a layer with a `tied_adapter` leaves `trainable_tokens_delta` out of its modules.
    """
    if not isinstance(model.get_output_embeddings(), AuxiliaryTrainingWrapper):
        yield
        return
    places: dict[torch.nn.Parameter, list[tuple[torch.nn.Module, str]]] = {}
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer) and module.tied_adapter:
            del module.trainable_tokens_delta
            object.__setattr__(module, "trainable_tokens_delta", module.tied_adapter.trainable_tokens_delta)
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(parameter, []).append((module, name))

    def tie() -> None:
        for (first, own), *others in places.values():
            for module, name in others:
                setattr(module, name, getattr(first, own))

    hidden = dict.fromkeys(("get_input_embeddings", "get_output_embeddings"), lambda: None)
    with patch.multiple(model, tie_weights=tie, **hidden):
        yield


@contextmanager
def save_adapter_only(model: torch.nn.Module) -> Iterator[None]:
    """Saves an adapter without two things that PEFT adds to it; transformers' Trainer cannot tell it not to.

    Both whole embeddings, when the vocabulary has grown: the rows of new tokens are in the adapter already, and loading
    adds them to the base. PEFT 0.21, utils/save_and_load.py, get_peft_model_state_dict; discussed in
    https://github.com/huggingface/peft/pull/2649. Goes when save_embedding_layers="auto" leaves out embeddings whose
    new rows are trainable tokens. And a model card without content, in every checkpoint (peft_model.py,
    create_or_update_model_card). Goes when save_pretrained can be told to write none.
    """
    if not isinstance(model, PeftModel):
        yield
        return
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    model.create_or_update_model_card = lambda *_, **__: None
    try:
        yield
    finally:
        del model.save_pretrained, model.create_or_update_model_card  # the class's own again


@contextmanager
def weights_not_tied_again(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Lets lm-eval take a model in memory: it ties the weights of any, which fails where PEFT wraps a tied embedding.

    lm-eval 0.4.13, models/huggingface.py, HFLM.__init__ (`self.model.tie_weights()`), and transformers 5.23 and 5.24.
    Goes when HFLM leaves a model that it is given as it is.
    """
    model.tie_weights = lambda: None
    try:
        yield
    finally:
        del model.tie_weights


def complete_reference(model: PeftModel) -> None:
    """Copies the rows of new tokens to the reference adapter that TRL's DPOTrainer makes: it copies all but those.

    TRL 1.16, trainer/dpo_trainer.py, after `model.add_adapter("ref", …)`: names that end in `.default` have no
    `.default.` in them. Goes when TRL copies those, too.
    """
    parameters = dict(model.named_parameters())
    for name, value in parameters.items():
        if name.endswith(".default"):
            parameters[name.removesuffix("default") + "ref"].data.copy_(value.data)
