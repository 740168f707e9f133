"""A run's model saved so that it loads on the unchanged base, and loaded again as it was trained."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import create_repo, upload_folder, whoami
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import CHAT_TEMPLATE_DIR
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import has_generation_markers

from sft_recipes.config.nested_values import load_yaml
from sft_recipes.config.options import ModelOptions
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.errors import ConfigError, explained_files_of, one_line
from sft_recipes.modeling.inference import stop_token_ids
from sft_recipes.modeling.loading import load_model_config, load_own_tokenizer, load_weights, model_folder
from sft_recipes.modeling.sentencepiece_model import save_sentencepiece_model

log = logging.getLogger(__name__)
QUANTIZATION_FILE = "quantization_config.json"


def save_model(
    trainer: SFTTrainer, folder: Path, encoder: Encoder, initial_adapter: dict[str, torch.Tensor] | None = None
) -> dict[str, Any]:
    """Writes weights or adapter, the tokenizer with its templates, and the generation config with the stop token.

    With an adapter goes how its base was quantized, which PEFT does not save; the saved adapter is read back and
    compared. `initial_adapter` is the adapter's state before training, where its initialization changed the base.
    Gives back what `describe_loading` says of an adapter; nothing for whole weights, which any tool loads.
    """
    if trainer.is_fsdp_enabled:  # whatever its checkpoints are
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder))  # by all processes, each of which may have a shard
    is_adapter, is_first = isinstance(trainer.model, PeftModel), trainer.is_world_process_zero()
    if is_adapter and trainer.is_fsdp_enabled:
        check_saved_shards(trainer.model, folder, is_first)
    if not is_first:
        return {}
    trainer.model.generation_config.save_pretrained(folder)
    stops = stop_token_ids(GenerationConfig.from_pretrained(folder))
    if not {*encoder.stop_ids} <= {*stops}:
        raise ConfigError(f"{folder}: its generation config stops at {stops}, without the template's {encoder.stop}.")
    save_sentencepiece_model(encoder.tokenizer, folder)
    if has_generation_markers(encoder.chat_template):  # for TRL's assistant_only_loss, as the template `training`
        (folder / CHAT_TEMPLATE_DIR).mkdir(exist_ok=True)
        (folder / CHAT_TEMPLATE_DIR / "training.jinja").write_text(encoder.chat_template, encoding="utf-8")
    if not is_adapter:
        return {}
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):  # which leaves no weight whole
        check_saved_adapter(trainer.model, folder)
    if quantization := getattr(trainer.model.config, "quantization_config", None):
        (folder / QUANTIZATION_FILE).write_text(quantization.to_json_string(), encoding="utf-8")
    if initial_adapter is not None:
        convert_to_plain_lora(folder, initial_adapter)
    return describe_loading(trainer.model, encoder)


def convert_to_plain_lora(folder: Path, initial: dict[str, torch.Tensor]) -> None:
    """Rewrites the adapter in `folder` as a plain LoRA, which loads on the unchanged base.

    PiSSA and OLoRA take parts out of the base, so their adapter fits the changed base only. The difference between
    the trained and the initial adapter is a plain LoRA of twice the rank: AB - A0 B0 = [A | A0] [B | -B0]
    (arXiv 2404.02948, appendix C).
    """
    weights, config = load_file(folder / "adapter_model.safetensors"), folder / "adapter_config.json"
    for key, value in weights.items():  # PEFT's own conversion leaves out the rows of new tokens
        if "lora_A" in key:
            weights[key] = torch.cat([value, initial[key]], dim=0)
        elif "lora_B" in key:
            weights[key] = torch.cat([value, -initial[key]], dim=1)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    values = json.loads(config.read_text(encoding="utf-8"))
    values |= {"init_lora_weights": True, "r": 2 * values["r"]}
    values["lora_alpha"] *= 2**0.5 if values["use_rslora"] else 2
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def check_saved_adapter(model: PeftModel, folder: Path) -> None:
    """Reads the adapter back from `folder`; raises ConfigError where the file lacks trained weights.

    The model's trained weights are set to zero, loaded from the file as PEFT loads them, compared, and restored; no
    second model is needed. Of trained prompts PEFT saves their final embeddings only, and nothing is compared.
    """
    if model.active_peft_config.is_prompt_learning:
        return
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    trained = {name: value.detach().clone() for name, value in parameters.items()}
    try:
        for value in parameters.values():
            value.zero_()
        set_peft_model_state_dict(model, load_peft_weights(str(folder)))
        lost = [name for name, value in parameters.items() if not torch.equal(value, trained[name])]
    finally:  # a file that cannot be read must not leave the model empty
        for name, value in parameters.items():
            value.copy_(trained[name])
    if lost:
        raise ConfigError(f"{folder} lacks {len(lost)} of {len(trained)} trained tensors, the first is {lost[0]}.")
    log.info("Saved to %s; all %d trained tensors verified.", folder, len(trained))


@torch.no_grad()
def check_saved_shards(model: PeftModel, folder: Path, is_first: bool) -> None:
    """As `check_saved_adapter` for a model of shards, each tensor of which all processes put together.

    PEFT 0.21 loads nothing into shards, so their values are looked for in the file, by the first process.
    """
    saved = list(load_peft_weights(str(folder), device="cpu").values()) if is_first else []
    whole = ((name, value.full_tensor().cpu()) for name, value in model.named_parameters() if value.requires_grad)
    lost = [name for name, value in whole if not any(torch.equal(value, one) for one in saved)]
    if is_first and lost:
        raise ConfigError(f"{folder} lacks {len(lost)} trained tensors, the first is {lost[0]}.")


def describe_loading(model: PeftModel, encoder: Encoder) -> dict[str, Any]:
    """How the adapter is loaded as it was trained: the base's `dtype`, and what the base by itself lacks.

    PEFT, transformers and lm-eval load the base in the dtype of its files and take its generation config, of which
    `base_stops` says whether it knows the template's `stop`; `rows` are the embedding rows that the tokenizer needs
    where the base has fewer, else 0, and `trained_rows` says whether rows of tokens were trained.
    """
    peft, config = model.active_peft_config, model.get_base_model().config
    id, revision, rows = peft.base_model_name_or_path, peft.revision, config.get_text_config().vocab_size
    base = type(config).from_pretrained(id, revision=revision)  # its code, where it has some, is loaded already
    try:
        stops = stop_token_ids(GenerationConfig.from_pretrained(id, revision=revision))
    except OSError:
        stops = stop_token_ids(base)
    return {
        "dtype": str(config.dtype).removeprefix("torch."),
        "stop": encoder.stop,
        "base_stops": {*encoder.stop_ids} <= {*stops},
        "rows": rows if rows > base.get_text_config().vocab_size else 0,
        "trained_rows": bool(getattr(peft, "trainable_token_indices", None)),
    }


def load_run(
    run: str | Path, dtype: str | None = None, dequantize: bool = False, trust_remote_code: bool = False
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerFast]:
    """The model of a finished run as it was trained, an adapter on its base quantized as then, and its tokenizer.

    `dtype` replaces the run's own. Whether code that comes with the model may run, its opener alone decides, never the
    folder: without `trust_remote_code` such a model is refused. Raises ConfigError, also for a folder that is not of a
    finished run.
    """
    check_finished_run(run := Path(run))
    with explained_files_of(run):
        folder, saved = model_folder(str(run)), saved_config(run)["model"]
        options = ModelOptions(
            folder,
            attn_implementation=saved.get("attn_implementation"),
            dtype=dtype or saved.get("dtype"),
            trust_remote_code=trust_remote_code,
        )
        load_model_config(options)  # refuses a model with code of its own before its tokenizer is loaded
        tokenizer = load_own_tokenizer(options)
        if isinstance(tokenizer.chat_template, dict):  # of which one is served, the other is `training`
            tokenizer.chat_template = tokenizer.chat_template.get("default")
        quantization = saved_quantization(folder)
        if quantization and dtype:
            quantization.bnb_4bit_compute_dtype = getattr(torch, dtype)
        model = load_weights(options, quantization, True, tokenizer, [], dequantize and quantization is not None)
    return model.eval(), tokenizer


def push_or_tell(folder: Path, name: str, arguments: SFTConfig) -> None:
    """Uploads `model/` with its card to the hub as `trainer.hub_model_id`, or the run's name; where the hub cannot be
    reached or refuses, the model stays saved and the log says how.

    transformers would push the whole run folder, with its log and the answers to held-out questions.
    """
    name = arguments.hub_model_id or name
    try:
        repo = create_repo(name, private=arguments.hub_private_repo, exist_ok=True)
        upload_folder(repo_id=repo.repo_id, folder_path=folder)
        log.info("Pushed to %s.", repo.url)
    except Exception as error:  # whatever the hub's client raises, the model is there
        log.error("The model is in %s, but was not pushed (%s). Push it with: hf upload %s %s", folder,
                  one_line(error)[:200], name, folder)  # fmt: skip


def check_push() -> None:
    """Raises ConfigError where the hub cannot be reached or nobody is logged in, before a run that is to be pushed."""
    try:
        whoami()
    except Exception as error:  # the hub's, or those of the client's own HTTP library
        raise ConfigError(
            f"trainer.push_to_hub=true: {one_line(error)[:200].rstrip('.')}. Log in with `hf auth login`, or leave it "
            "out and push later with `hf upload NAME RUN/model`."
        ) from error


def check_finished_run(run: Path) -> None:
    """Raises ConfigError for a folder that is not of a finished run."""
    if not (Path(model_folder(str(run))) / "tokenizer_config.json").is_file():
        raise ConfigError(f"{run} is not the folder of a finished run: it has no model/ with a tokenizer.")


def saved_quantization(folder: str) -> BitsAndBytesConfig | None:
    """How the base of the adapter in this folder was quantized; None where it was not."""
    file = Path(folder) / QUANTIZATION_FILE
    return BitsAndBytesConfig.from_dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def saved_config(run: Path) -> dict[str, Any]:
    """The run's composed config, with empty `model` and `data` where there is none (a merged model's folder)."""
    own = run.parent if run.name == "model" else run  # no other parent decides anything
    file = own if (own / ".hydra" / "config.yaml").is_file() else None
    return {"model": {}, "data": {}} | (load_yaml(file / ".hydra" / "config.yaml") if file else {})
