"""Tokenizer, chat template, weights and adapter, from the config's `model` and `adapter`."""

import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerFast
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from sft_recipes.binding import ConfigError, call, did_you_mean, one_line
from sft_recipes.encoding import stop_token

TEMPLATES = Path(__file__).parent / "templates"
PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|padding|>", "<pad>", "[PAD]", "<|endoftext|>", "<unk>")


def load_tokenizer(
    id: str,
    chat_template: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str | None = None,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedTokenizerFast, str, list[int]]:
    """The tokenizer as it is saved and served, the template with `{% generation %}` markers, and the new tokens' ids.

    `chat_template` is the name of one of ours, a path, or None for the tokenizer's own. The tokenizer carries the same
    template without the markers, has the template's control tokens as single special ids, and has a pad token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(id, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise not_found(id, error) from error
    template = template_text(chat_template, tokenizer)
    new = add_control_tokens(tokenizer, template)
    template = with_bos(tokenizer, template)
    stop_token(tokenizer, template)
    tokenizer.chat_template = without_markers(template)
    if tokenizer.pad_token is None:
        known = tokenizer.get_vocab()
        tokenizer.pad_token = next((token for token in PAD_TOKENS if token in known), tokenizer.eos_token)
    return tokenizer, template, new


def not_found(id: str, error: Exception) -> ConfigError:
    """The line for a model that is neither a folder here nor in the hub's reach."""
    if Path(id).exists() or id.startswith((".", "/", "~")):
        return ConfigError(f"model.id={id} is not a folder with a model and its tokenizer: {one_line(error)[:200]}")
    return ConfigError(
        f"model.id={id} could not be loaded. Offline, give a folder: model=local model.id=path/to/model. Gated or "
        f"private models need `hf auth login`. ({one_line(error)[:120]}…)"
    )


def template_text(choice: str | None, tokenizer: PreTrainedTokenizerFast) -> str:
    """The chosen template with markers; raises ConfigError where there is none, or where it depends on today's date."""
    if choice is None:
        text = own_template(tokenizer)
    elif (TEMPLATES / f"{choice}.jinja").is_file():
        text = (TEMPLATES / f"{choice}.jinja").read_text(encoding="utf-8")
    elif Path(choice).is_file():
        text = Path(choice).read_text(encoding="utf-8")
    else:
        names = [path.stem for path in TEMPLATES.glob("*.jinja")]
        raise ConfigError(f"model.chat_template={choice} is no template of ours and no file.{did_you_mean(choice, names)}")
    if "strftime_now" in text:
        raise ConfigError(
            "model.chat_template writes today's date into the prompt (strftime_now), so that every day trains another "
            "text. Give a copy with a fixed date, or one of ours."
        )
    return text


def own_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """The tokenizer's own template, or TRL's marked twin of it."""
    text = tokenizer.chat_template
    if isinstance(text, dict):
        text = text.get("default")
    if not text:
        raise ConfigError("model.chat_template is null and the tokenizer has no template. Write model.chat_template=chatml.")
    if has_generation_markers(text):
        return text
    try:
        return get_training_chat_template(tokenizer) or text
    except ValueError as error:
        raise ConfigError(
            "model.chat_template is null, and the tokenizer's own template has no {% generation %} markers around the "
            "answers and no marked twin in TRL. Write model.chat_template=chatml, or the path of a copy with markers."
        ) from error


def add_control_tokens(tokenizer: PreTrainedTokenizerFast, template: str) -> list[int]:
    """Makes every control token of the template one special id and gives the new ids; ConfigError where it names none.

    Our templates name theirs in the first comment (`control tokens: …`); a template of another's without that comment
    is refused when it writes something like `<|user|>` that the tokenizer does not know.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    declared = re.search(r"\{#-?.*?control tokens:([^#]*?)-?#\}", template, re.DOTALL)
    if declared:
        size = len(tokenizer)
        missing = [token for token in declared[1].split() if token != "none" and token not in special]
        if missing:
            tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
        return list(range(size, len(tokenizer)))
    known = set(tokenizer.get_vocab())
    unknown = sorted(set(re.findall(r"<\|\w+\|>", template)) - known)
    if unknown:
        raise ConfigError(
            f"model.chat_template writes {' '.join(unknown)}, which the tokenizer does not know as single tokens. Name "
            "those to be added in its first line: {#- control tokens: … -#} (or none)."
        )
    return []


def with_bos(tokenizer: PreTrainedTokenizerFast, template: str) -> str:
    """The template with a BOS in front where the tokenizer wants one and the template does not write it."""
    bos = tokenizer.bos_token
    wants_one = bos is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    if not wants_one:
        return template
    probe = [{"role": "user", "content": "?"}]
    written = tokenizer.apply_chat_template(probe, chat_template=template, tokenize=False).startswith(bos)
    return template if written else "{{- bos_token }}" + template


def without_markers(template: str) -> str:
    """The same template without `{% generation %}`, for serving engines that do not know it; the text is the same.

    >>> without_markers("{%- generation -%} yes {% endgeneration %}")
    '{%- if true -%} yes {% endif %}'
    """
    template = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", template)


def load_model(
    options: dict[str, Any], adapter: dict[str, Any], tokenizer: PreTrainedTokenizerFast, stop: str, new: list[int]
) -> PreTrainedModel:
    """The base model, with an embedding for every token and the stop token in its generation config.

    Weights are fp32 when they are trained; under an adapter the frozen base is bf16 on a GPU that has it.
    """
    half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    dtype = options.get("dtype") or ("bfloat16" if adapter["type"] != "none" and half else "float32")
    rest = {key: options[key] for key in ("revision", "trust_remote_code", "attn_implementation") if key in options}
    quantization = quantization_config(adapter)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            options["id"], dtype=dtype, quantization_config=quantization, **rest
        )
    except (OSError, ValueError) as error:
        raise not_found(options["id"], error) from error
    add_rows(model, new)
    stop_id = tokenizer.convert_tokens_to_ids(stop)
    others = model.generation_config.eos_token_id
    others = others if isinstance(others, list) else [] if others is None else [others]
    model.generation_config.eos_token_id = list(dict.fromkeys([stop_id, *others]))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def add_rows(model: PreTrainedModel, new: list[int]) -> None:
    """Gives every new token an embedding of its own: spare rows first, more rows only where those run out.

    A new row is drawn from the spread of the rows before it. transformers' default, all new rows close to their mean,
    leaves two control tokens equal to 3e-6, which a frozen embedding never tells apart.
    """
    if not new:
        return
    if new[-1] >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(new[-1] + 1, mean_resizing=False)
    generator = torch.Generator().manual_seed(0)
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    with torch.no_grad():
        for weight in {id(layer.weight): layer.weight for layer in layers}.values():  # one, where they are tied
            known = weight[: new[0]].float()
            noise = torch.randn(len(new), known.shape[1], generator=generator).to(known.device)
            weight[new] = (known.mean(0) + known.std(0) * noise).to(weight.dtype)


def quantization_config(adapter: dict[str, Any]) -> BitsAndBytesConfig | None:
    """The 4-bit or 8-bit config of `adapter.quantization`, if there is one."""
    if "quantization" not in adapter:
        return None
    return call(BitsAndBytesConfig, adapter["quantization"], "adapter.quantization")


def peft_config(adapter: dict[str, Any]) -> PeftConfig | None:
    """The adapter's PEFT config, or None for full fine-tuning; raises ConfigError for an unknown type or field."""
    if adapter["type"] == "none":
        return None
    if adapter["type"] != "lora":
        raise ConfigError(f"adapter.type should be none or lora, not {adapter['type']!r}.")
    return call(LoraConfig, {"task_type": "CAUSAL_LM", **adapter["lora"]}, "adapter.lora")


def train_new_tokens(peft: PeftConfig, model: PreTrainedModel, new: list[int]) -> None:
    """Lets an adapter train the rows of new tokens, in the input embedding and, where it is not tied, in the output's."""
    if not new:
        return
    names = {id(module): name for name, module in model.named_modules()}
    layers = [model.get_input_embeddings()]
    if model.get_output_embeddings().weight is not layers[0].weight:
        layers.append(model.get_output_embeddings())
    peft.trainable_token_indices = {names[id(layer)]: new for layer in layers}
