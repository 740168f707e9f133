"""How far training moved the weights: `relative_change(model, load_base)` gives each group's relative change."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from sft_recipes.modeling.adapters import changes_base_weights

# A base weight, its dotted name, and what was added to it (None: nothing).
Weight = tuple[str, Tensor, Tensor | None]
NORM_PATTERN = re.compile(
    r"norm|^ln(_\w+)?$"
)  # of a module's own name: self_attn.q_norm is a norm, attention.dense is none
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
    Empty for adapters that act on some tokens only and cannot be merged.
    """
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    edges = {name: label.replace("tied", "head") for label, name in edge_names(plain).items()}
    moved, size = defaultdict(float), defaultdict(float)
    try:
        for name, base, delta in iterate_weights(model, load_base):
            group = weight_group(name, edges)
            size[group] += sum_of_squares(base)
            moved[group] += 0.0 if delta is None else sum_of_squares(delta)
    except NotImplementedError:  # what PEFT raises for variants without a merge, such as aLoRA
        return {}
    return {group: math.sqrt(moved[group] / size[group]) for group in sorted(size, key=group_order) if size[group]}


def iterate_weights(model: PreTrainedModel | PeftModel, load_base: Callable[[], PreTrainedModel]) -> Iterator[Weight]:
    """Every weight once, with what training added to it."""
    if not isinstance(model, PeftModel):
        reference = dict(load_base().named_parameters())
        for name, tuned in model.named_parameters():
            yield weight_difference(name, tuned, reference[name])
        return
    moves = any(is_base_changed(config) for config in model.peft_config.values())
    reference = dict(load_base().named_parameters()) if moves else {}
    plain = model.get_base_model()
    for name, base, delta in iterate_adapted(plain, "", skip=edge_names(plain).get("tied")):
        if moves:
            yield weight_difference(name, base if delta is None else base.float() + delta.float(), reference[name])
        else:
            yield name, base, delta


def is_base_changed(config: PeftConfig) -> bool:
    """Whether an adapter's base is no longer as it was loaded: its initialization changed it, or biases are trained."""
    return getattr(config, "bias", "none") != "none" or changes_base_weights(config)


def weight_difference(name: str, tuned: Tensor, base: Tensor) -> Weight:
    """The rows that both have, compared on the CPU: the GPU may hold an optimizer still."""
    rows = min(len(tuned), len(base)) if base.ndim else None
    tuned, base = (weight.detach().cpu()[:rows] if rows else weight.detach().cpu() for weight in (tuned, base))
    return name, base, tuned.float() - base.float()


def iterate_adapted(module: nn.Module, path: str, skip: str | None) -> Iterator[Weight]:
    """The weights below a module under the names that they have without an adapter."""
    if path and path == skip:
        return
    if isinstance(module, AuxiliaryTrainingWrapper):
        yield from iterate_retrained(module, path)
    elif isinstance(module, ParamWrapper):  # one parameter; the next wrapper, or the module itself, has the others
        inner = module.base_layer
        for name, base, delta in iterate_adapted(inner, path, skip):
            mine = name == f"{path}.{module.parameter_name}"
            yield name, base, adapter_product(module, base) if mine else delta
    elif isinstance(module, LoraLayer):
        for name, base, _ in iterate_adapted(module.get_base_layer(), path, skip):
            is_bias = name.endswith(".bias")
            yield name, base, adapter_bias(module) if is_bias else adapter_product(module, base)
    else:
        for name, parameter in module.named_parameters(recurse=False):
            quantized = name == "weight" and type(parameter).__name__ in ("Params4bit", "Int8Params")
            yield f"{path}.{name}".lstrip("."), dequantize_module_weight(module) if quantized else parameter, None
        for name, child in module.named_children():
            yield from iterate_adapted(child, f"{path}.{name}".lstrip("."), skip)


def iterate_retrained(wrapper: AuxiliaryTrainingWrapper, path: str) -> Iterator[Weight]:
    """A module that PEFT trains a copy of (`modules_to_save`), or some rows of (`trainable_token_indices`)."""
    tuned = {}
    for adapter in wrapper.active_adapters:
        if isinstance(wrapper, ModulesToSaveWrapper):
            tuned |= dict(wrapper.modules_to_save[adapter].named_parameters())
        else:
            tuned["weight"] = wrapper.token_adapter.get_merged_weights([adapter])
    for name, base in wrapper.original_module.named_parameters():
        delta = tuned[name].float() - base.float() if name in tuned else None
        yield f"{path}.{name}", base, delta


def adapter_product(layer: LoraLayer, base: Tensor) -> Tensor | None:
    """What a layer's active adapters add to its weight, in all."""
    total = None
    for adapter in layer.active_adapters:
        if adapter not in layer.scaling:
            continue
        if adapter in layer.lora_variant:  # DoRA and others scale the sum; in fp32, since bf16 would round ΔW away
            merged = layer.lora_variant[adapter].merge_safe(layer, adapter, base.float())
            delta = merged - base.float()
            layer.lora_variant[adapter].unmerge(layer, adapter, merged)  # frees what merge_safe keeps for an unmerge
        else:
            delta = layer.get_delta_weight(adapter).float()
        total = delta if total is None else total + delta
    return total


def adapter_bias(layer: LoraLayer) -> Tensor | None:
    """What `lora_bias` adds to a layer's bias, or None."""
    trained = [adapter for adapter in layer.active_adapters if layer.lora_bias.get(adapter)]
    return sum(layer.lora_B[adapter].bias * layer.scaling[adapter] for adapter in trained) if trained else None


def sum_of_squares(weight: Tensor) -> float:
    """The sum of the squares in float64, by pieces: a whole embedding in float64 may not fit a full GPU."""
    return sum(part.double().square().sum().item() for part in weight.detach().flatten().split(2**24))


def edge_names(model: PreTrainedModel) -> dict[str, str]:
    """The names of the input embedding and the head; a head that is tied to the embedding is `tied`."""
    names = {id(module): name for name, module in model.named_modules()}
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    found = {"embeddings": names[id(layers[0])]}
    if layers[1] is not None:
        first, last = (getattr(layer, "original_module", layer) for layer in layers)
        first, last = (layer.get_base_layer() if isinstance(layer, LoraLayer) else layer for layer in (first, last))
        found["tied" if first.weight is last.weight else "head"] = names[id(layers[1])]
    return found


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


def group_order(group: str) -> tuple[int, int, int]:
    """Where a group stands: the embeddings, layer by layer, the last norm, the head.

    >>> sorted(["head", "layer 10 mlp", "norms", "layer 2 mlp", "layer 2 attention", "embeddings"], key=group_order)
    ['embeddings', 'layer 2 attention', 'layer 2 mlp', 'layer 10 mlp', 'norms', 'head']
    """
    if group.startswith("layer "):
        _, number, kind = group.split()
        return 1, int(number), ("attention", "mlp", "norms", "other").index(kind)
    return ("embeddings", "layer", "norms", "other", "head").index(group), 0, 0
