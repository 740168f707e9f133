"""A run as one folder that any tool loads: `python -m sft_recipes.merge outputs/lima/<date> --out lima-merged`."""

import argparse
import gc
import logging
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from sft_recipes.config.options import ModelOptions
from sft_recipes.errors import ConfigError, exit_on_user_error, explained_files_of
from sft_recipes.modeling.loading import build_empty_model, model_folder
from sft_recipes.modeling.modelfile import build_modelfile, merged_model_card
from sft_recipes.modeling.save_load import check_finished_run, load_run, saved_quantization
from sft_recipes.modeling.sentencepiece_model import save_sentencepiece_model
from sft_recipes.reporting.run_folder import read_jsonl

log = logging.getLogger(__name__)
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
FALLBACK_CONVERSATIONS = [("Hello!", "Hello, how can I help?"), ("What is two and two?", "Four.")]


def merge(run: str | Path, out: str | Path, dtype: str = "float32", trust_remote_code: bool = False) -> float:
    """Writes the run's model as plain weights into `out`, and gives back how far its logits are from the trained ones.

    LoRA goes into the base, QLoRA into the dequantized base, the values that it was trained on. The folder gets its
    name when all is written and checked, so that what has the name is whole. Raises ConfigError where the check fails.
    """
    run, out = Path(run), Path(out)
    check_finished_run(run)
    if os.path.lexists(out):
        raise ConfigError(f"{out} is there already. Remove it, or write another --out.")
    with explained_files_of(run):
        check_disk_space(run, out, dtype, trust_remote_code)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staged = tempfile.TemporaryDirectory(prefix=f"{out.name}.", suffix=".partial", dir=out.parent)  # ours alone
    except OSError as error:
        raise ConfigError(f"{out} cannot be made: {error.strerror}.") from error
    with staged as partial:
        os.chmod(partial, 0o755)  # it is closed to others
        with explained_files_of(run):
            difference = write_merged(run, Path(partial), dtype, trust_remote_code)
        try:
            os.rename(partial, out)
        except OSError as error:
            fault = "was made by another merge meanwhile" if out.exists() else f"cannot be made: {error.strerror}"
            raise ConfigError(f"{out} {fault}.") from error
    return difference


def write_merged(run: Path, folder: Path, dtype: str, trust_remote_code: bool) -> float:
    """Writes the merged model into `folder` and gives back how far its logits are from the trained ones."""
    quantized = saved_quantization(model_folder(str(run))) is not None
    model, tokenizer = load_run(run, dtype, trust_remote_code=trust_remote_code)
    rows = check_conversations(run, tokenizer)
    expected = last_logits(model, rows)
    if quantized:
        del model
        gc.collect()
        model, _ = load_run(run, dtype, dequantize=True, trust_remote_code=trust_remote_code)
    model = merge_adapter(model, getattr(torch, dtype))
    log.info("Writing the merged model …")
    model.save_pretrained(folder, max_shard_size="5GB")
    tokenizer.save_pretrained(folder)
    if not save_sentencepiece_model(tokenizer, folder):
        log.warning("The base has no tokenizer.model: llama.cpp makes other tokens of texts from tokenizer.json alone.")
    (folder / "Modelfile").write_text(build_modelfile(tokenizer, model.generation_config), encoding="utf-8")
    (folder / "README.md").write_text(merged_model_card(run), encoding="utf-8")
    del model
    gc.collect()
    return check_merged(folder, rows, expected, dtype, trust_remote_code)


def check_disk_space(run: Path, out: Path, dtype: str, trust_remote_code: bool = False) -> None:
    """Raises ConfigError where the disk has no room for the weights."""
    options = ModelOptions(model_folder(str(run)), trust_remote_code=trust_remote_code)
    needed = build_empty_model(options).num_parameters() * getattr(torch, dtype).itemsize * 1.02
    parent = next(folder for folder in out.resolve().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise ConfigError(f"{out} needs {needed / 2**30:.1f} GiB, and {parent} has {free / 2**30:.1f} GiB free.")


def merge_adapter(model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    """The base with the adapter in its weights, each layer added in fp32 and rounded once; other models as they are."""
    if not isinstance(model, PeftModel):
        return model
    if not hasattr(model.base_model, "merge_and_unload"):
        raise ConfigError(f"{model.active_peft_config.peft_type.value} adds no weights that could be merged.")
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in tqdm(layers, desc="Merging", unit="layer"):
        weight = layer.get_base_layer().weight
        if not isinstance(layer, TrainableTokensLayer):  # rows are put in, nothing is added
            weight.data = weight.data.float()
        layer.merge(safe_merge=True)
        weight.data = weight.data.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that all is merged already
        return model.merge_and_unload().to(dtype)


def check_conversations(run: Path, tokenizer: PreTrainedTokenizerFast, number: int = 4) -> list[list[int]]:
    """A few conversations as tokens: held-out questions of the run with their answers, where it has some."""
    file = (run if (run / "answers.jsonl").is_file() else run.parent) / "answers.jsonl"
    asked = [(row["prompt"], row["reference"]) for row in read_jsonl(file)[:number]] or FALLBACK_CONVERSATIONS
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], return_dict=False
        )[-128:]
        for prompt, answer in asked
    ]


@torch.no_grad()
def last_logits(model: torch.nn.Module, rows: list[list[int]]) -> list[torch.Tensor]:
    """The logits of the last 32 tokens of every row, in fp32."""
    inputs = (torch.tensor([row], device=model.device) for row in rows)
    return [model(input_ids=ids, use_cache=False).logits[0, -32:].float().cpu() for ids in inputs]


def check_merged(
    folder: Path, rows: list[list[int]], expected: list[torch.Tensor], dtype: str, trust_remote_code: bool = False
) -> float:
    """The largest difference between the logits of the folder, loaded anew, and the trained model's.

    Both compute in `dtype`. Raises ConfigError where it is more than rounding brings: 1e-4, or 0.2 in half precision,
    times the spread of the logits where that is above 1.
    """
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    found = last_logits(merged.eval(), rows)
    difference = max((one - other).abs().max().item() for one, other in zip(found, expected, strict=True))
    limit = (1e-4 if dtype == "float32" else 0.2) * max(1.0, torch.cat(expected).std().item())
    if not difference <= limit:
        raise ConfigError(
            f"The merged model's logits differ by {difference:.2g} from the trained model's, more than the {limit:.2g} "
            "that rounding brings. Nothing was written."
        )
    return difference


def main(arguments: list[str] | None = None) -> None:
    """Merges a run's adapter into its base, checks the result on a few rows, and writes a folder for any tool."""
    parser = argparse.ArgumentParser(prog="python -m sft_recipes.merge", description=main.__doc__)
    parser.add_argument("run", type=Path, help="outputs/NAME/DATE")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; it must not be there")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="fp32 keeps everything, bf16 is half as large")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the base model")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with exit_on_user_error():
        difference = merge(given.run, given.out, DTYPES[given.dtype], given.trust_remote_code)
    print(f"{given.out}: its logits are within {difference:.1g} of the trained model's.")


if __name__ == "__main__":
    main()
