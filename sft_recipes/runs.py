"""A run's model on its way out and back: saved so that it reloads on the untouched base, loaded as it was trained."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from trl import SFTTrainer

from sft_recipes.adapters import quantization_config
from sft_recipes.binding import ConfigError
from sft_recipes.encoding import Encoder
from sft_recipes.model import load_weights, model_folder

log = logging.getLogger(__name__)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.2, torch.float16: 0.02}  # of logits; what rounding brings


def save(trainer: SFTTrainer, folder: Path, encoder: Encoder, ids: list[int]) -> None:
    """Writes weights or adapter, the tokenizer with its template, and the generation config with the stop token.

    An adapter is read back and has to give the trained model's logits on `ids`, a row's.
    """
    trainer.save_model(str(folder))
    trainer.model.generation_config.save_pretrained(folder)
    stops = GenerationConfig.from_pretrained(folder).eos_token_id
    if encoder.tokenizer.convert_tokens_to_ids(encoder.stop) not in stops:
        raise ConfigError(f"{folder}: its generation config stops at {stops}, without the template's {encoder.stop}.")
    if hasattr(trainer, "adapter_at_start"):
        make_plain(folder, trainer.adapter_at_start)
    elif isinstance(trainer.model, PeftModel):
        check_saved(trainer.model, folder, ids)
    say_loader(trainer.model, folder)


def make_plain(folder: Path, start: dict[str, torch.Tensor]) -> None:
    """Makes a plain LoRA of the adapter in `folder`, which reloads on the untouched base.

    PiSSA and OLoRA take parts out of the base, so their adapter fits that base alone. The difference between their end
    and their start is a plain LoRA of twice the rank: AB - A0 B0 = [A | A0] [B | -B0] (arXiv 2404.02948, appendix C).
    """
    end, config = load_file(folder / "adapter_model.safetensors"), folder / "adapter_config.json"
    for key, value in end.items():  # PEFT's own conversion leaves out the rows of new tokens
        if "lora_A" in key:
            end[key] = torch.cat([value, start[key]], dim=0)
        elif "lora_B" in key:
            end[key] = torch.cat([value, -start[key]], dim=1)
    save_file(end, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    values = json.loads(config.read_text(encoding="utf-8"))
    values |= {"init_lora_weights": True, "r": 2 * values["r"]}
    values["lora_alpha"] *= 2**0.5 if values["use_rslora"] else 2
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def check_saved(model: PeftModel, folder: Path, ids: list[int]) -> float:
    """The largest difference between the logits of the trained model and of its adapter read back from `folder`.

    Raises ConfigError where it is more than rounding: then something that was trained is not in the folder.
    """
    training = model.training
    model.eval()
    row = torch.tensor([ids[:256]], device=model.device)
    trained = model(input_ids=row, use_cache=False).logits.float()
    model.load_adapter(folder, adapter_name="saved")
    model.set_adapter("saved")
    difference = (model(input_ids=row, use_cache=False).logits.float() - trained).abs().max().item()
    model.set_adapter("default")
    model.delete_adapter("saved")
    model.train(training)
    if not difference <= TOLERANCE.get(model.dtype, 0.2):
        raise ConfigError(f"{folder}: read back, the adapter gives logits that differ by {difference:.1g}.")
    log.info(
        "Read back from %s, the adapter gives the trained model's logits (they differ by %.1g).", folder, difference
    )
    return difference


def say_loader(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Logs how an adapter is loaded whose tokens are more than the rows of its base."""
    if not isinstance(model, PeftModel):
        return
    rows = model.get_input_embeddings().weight.shape[0]
    if rows > AutoConfig.from_pretrained(model.active_peft_config.base_model_name_or_path).vocab_size:
        log.warning(
            "The base has fewer rows than the tokenizer has tokens: AutoPeftModelForCausalLM.from_pretrained(%r) adds "
            "them; before PeftModel.from_pretrained(base, %r), write base.resize_token_embeddings(%d).",
            str(folder), str(folder), rows,
        )  # fmt: skip


def load_run(
    run: Path, dtype: str | None = None, dequantize: bool = False
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerFast]:
    """The model of a finished run as it was trained, the adapter on its base in 4 bits or not, and its tokenizer."""
    folder = model_folder(str(run))
    if not (Path(folder) / "tokenizer_config.json").is_file():
        raise ConfigError(f"{run} is not the folder of a finished run: it has no model/ with a tokenizer.")
    config = config_of(run)
    options = {
        key: value for key, value in config["model"].items() if key in ("trust_remote_code", "attn_implementation")
    }
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=options.get("trust_remote_code", False))
    options |= {"id": folder, "dtype": dtype or config["model"].get("dtype")}
    quantization = quantization_config(config["adapter"])
    model = load_weights(options, quantization, True, tokenizer, [], dequantize and quantization is not None)
    return model.eval(), tokenizer


def config_of(run: Path) -> dict[str, Any]:
    """The run's composed config, and what it has no word of empty; the folder `model/` alone has none."""
    file = next((path for path in (run, run.parent) if (path / ".hydra" / "config.yaml").is_file()), None)
    values = OmegaConf.to_container(OmegaConf.load(file / ".hydra" / "config.yaml")) if file else {}
    return {"model": {}, "adapter": {}, "evaluate": {}} | values
