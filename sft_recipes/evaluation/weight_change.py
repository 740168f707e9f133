"""How far training moved the weights: `relative_change(model, load_base)` gives each group's relative change."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor
from transformers import PreTrainedModel

from sft_recipes.modeling.adapters import changes_base_weights

INNER = ("base_layer", "original_module", "token_adapter")  # where PEFT's wrappers keep the base's own module
# of a module's own name: self_attn.q_norm is a norm, attention.dense is none
NORM_PATTERN = re.compile(r"norm|^ln(_\w+)?$")
GROUP_WORDS = {
    "attention": re.compile("attn|attention"),
    "mlp": re.compile(r"mlp|ffn|feed_forward|moe|expert|\bfc|\bdense_\w+_to"),
}


@torch.no_grad()
def relative_change(model: PreTrainedModel | PeftModel, load_base: Callable[[], PreTrainedModel]) -> dict[str, float]:
    """‖ΔW‖ / ‖W‖ (Frobenius) of the embeddings, of each layer's attention, mlp and norms, and of the head.

    ΔW is the adapter's product, scaled, and W the base weight it acts on, dequantized where it is 4-bit or 8-bit;
    weights that were not trained count in W. `load_base` gives the weights as training found them, unquantized; it is
    called for full fine-tuning and where an adapter changed the base (PiSSA, trained biases), and rows that only one
    of the two has are left out. A tied head is its embeddings. Weights sharded over GPUs are not put together here.
    Empty for adapters that add nothing to a weight, or act on some tokens only.
    """
    adapted = isinstance(model, PeftModel)
    plain = model.get_base_model() if adapted else model
    moves = not adapted or any(
        getattr(config, "bias", "none") != "none" or changes_base_weights(config)
        for config in model.peft_config.values()
    )
    reference = dict(load_base().named_parameters()) if moves else {}
    names = {id(module): name for name, module in plain.named_modules()}
    ends = {"embeddings": plain.get_input_embeddings(), "head": plain.get_output_embeddings()}
    edges = {names[id(module)]: group for group, module in ends.items() if module is not None}
    moved, size = defaultdict(float), defaultdict(float)
    try:
        for name, base, delta in iterate_weights(plain):
            if moves:
                base, delta = weight_difference(base if delta is None else base.float() + delta, reference[name])
            group = weight_group(name, edges)
            size[group] += sum_of_squares(base)
            moved[group] += 0.0 if delta is None else sum_of_squares(delta)
    except NotImplementedError:  # of PEFT for variants without a merge, such as aLoRA, and ours
        return {}
    return {group: math.sqrt(moved[group] / size[group]) for group in size if size[group]}


def iterate_weights(plain: PreTrainedModel) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Every weight once: its name without an adapter, its value, and what PEFT's wrappers add to it (None: nothing)."""
    for path, weight in plain.named_parameters():  # a tied head's comes once, as the embeddings
        module, wrappers, name = plain, [], []
        *steps, own = path.split(".")
        for place, step in enumerate(steps):
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                wrappers.append((module, step, ".".join([*steps[place + 1 :], own])))
            else:
                name.append(step)
            module = getattr(module, step)
        if any(step not in INNER for _, step, _ in wrappers):
            continue  # one of the adapter's own
        base = dequantize_module_weight(module) if own == "weight" else weight
        added = [delta for wrapper, _, rest in wrappers if (delta := added_weight(wrapper, rest, base)) is not None]
        yield ".".join([*name, own]), base, sum(added) if added else None


def added_weight(wrapper: BaseTunerLayer | AuxiliaryTrainingWrapper, name: str, base: Tensor) -> Tensor | None:
    """What one of PEFT's wrappers adds to the weight `name` of the module in it, in fp32; None where nothing."""
    (adapter,) = wrapper.active_adapters  # a run has one
    own = name.rpartition(".")[2]  # a ParamWrapper may have another one in it
    if isinstance(wrapper, ModulesToSaveWrapper):
        return wrapper.modules_to_save[adapter].get_parameter(name).float() - base.float()
    if isinstance(wrapper, TrainableTokensLayer):
        return wrapper.get_merged_weights([adapter]).float() - base.float()
    if isinstance(wrapper, TrainableTokensWrapper):
        return None  # the layer in it does
    if not isinstance(wrapper, LoraLayer):
        raise NotImplementedError
    if own != (wrapper.parameter_name if isinstance(wrapper, ParamWrapper) else "weight"):
        biased = own == "bias" and wrapper.lora_bias.get(adapter)
        return wrapper.lora_B[adapter].bias.float() * wrapper.scaling[adapter] if biased else None
    if variant := wrapper.lora_variant.get(adapter):  # DoRA and others scale the sum; bf16 would round ΔW away
        merged = variant.merge_safe(wrapper, adapter, base.float())
        variant.unmerge(wrapper, adapter, merged)  # frees what merge_safe keeps for it
        return merged - base.float()
    return wrapper.get_delta_weight(adapter).float()


def weight_difference(tuned: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """The base weight and the change, of the rows that both have, on the CPU: the GPU may hold an optimizer still."""
    rows = min(len(tuned), len(base)) if base.ndim else None
    tuned, base = (weight.detach().cpu()[:rows] if rows else weight.detach().cpu() for weight in (tuned, base))
    return base, tuned.float() - base.float()


def sum_of_squares(weight: Tensor) -> float:
    """The sum of the squares in float64, by pieces: a whole embedding in float64 may not fit a full GPU."""
    return sum(part.double().square().sum().item() for part in weight.detach().flatten().split(2**24))


def weight_group(name: str, edges: dict[str, str]) -> str:
    """The group of a dotted name, by the words and the first number in it.

    >>> [weight_group(f"model.layers.3.{name}.weight", {}) for name in ("self_attn.q_proj", "post_attention_layernorm")]
    ['layer 3 attention', 'layer 3 norms']
    >>> weight_group("gpt.h.0.mlp.dense_h_to_4h.weight", {}), weight_group("lm_head.weight", {"lm_head": "head"})
    ('layer 0 mlp', 'head')
    >>> weight_group("transformer.wpe.weight", {}), weight_group("model.norm.weight", {})
    ('embeddings', 'norms')
    """
    module = name.rpartition(".")[0]
    if module in edges:
        return edges[module]
    own = module.rpartition(".")[2]
    if not (number := re.search(r"\.(\d+)\.", name)):
        return "norms" if NORM_PATTERN.search(own) else "embeddings" if re.search("emb|wpe", own) else "other"
    within = module[number.end() :]
    kind = next((kind for kind, word in GROUP_WORDS.items() if word.search(within)), "other")
    return f"layer {number[1]} {'norms' if NORM_PATTERN.search(own) else kind}"
