"""Small models, tuned on one short answer, saved, and loaded again in a fresh process: `python tests/support/tuned.py [BASE …]`."""

import copy
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from trl import SFTConfig

from sft_recipes.config.options import ModelOptions
from sft_recipes.config.schema import parse_adapter
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.merge import merge
from sft_recipes.modeling.adapters import build_peft_config, build_quantization_config, prepare_peft_config
from sft_recipes.modeling.loading import load_model, load_tokenizer
from sft_recipes.modeling.save_load import save_model
from sft_recipes.modeling.workarounds import disable_bnb_cpu_repacking
from sft_recipes.training.trainer import SupervisedTrainer

ROOT = Path(__file__).parents[2]  # not from support.paths: this file is a script, too
TINY = ROOT / "sft_recipes" / "tiny" / "model"
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
NF4 |= {"bnb_4bit_compute_dtype": "bfloat16"}
ROW = [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi there."}]
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SHAPE | {"num_key_value_heads": 2}

# name: the config of a random model, and how many spare rows it has beyond its tokenizer's tokens; None is the tiny one
BASES = {
    "tiny, tied": None,
    "Llama, tied": (LlamaConfig(tie_word_embeddings=True, **GROUPED), 0),
    "Llama, untied": (LlamaConfig(tie_word_embeddings=False, **GROUPED), 0),
    "Llama, tied, spare rows": (LlamaConfig(tie_word_embeddings=True, **GROUPED), 64),
    "Llama, untied, spare rows": (LlamaConfig(tie_word_embeddings=False, **GROUPED), 64),
    "Qwen3, tied, spare rows": (Qwen3Config(tie_word_embeddings=True, head_dim=32, **GROUPED), 64),
    "Qwen3, untied": (Qwen3Config(tie_word_embeddings=False, head_dim=32, **GROUPED), 0),
    "GPT-NeoX, tied": (GPTNeoXConfig(tie_word_embeddings=True, **SHAPE), 0),
    "GPT-NeoX, untied": (GPTNeoXConfig(tie_word_embeddings=False, **SHAPE), 0),
}


def lora(**fields) -> dict:
    """The config's `adapter` for LoRA with these fields."""
    return {"type": "lora", "lora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"} | fields}


ADAPTERS = {
    "LoRA": lora(),
    "rsLoRA": lora(use_rslora=True),
    "DoRA": lora(use_dora=True),
    "PiSSA": lora(init_lora_weights="pissa"),
    "OLoRA": lora(init_lora_weights="olora", use_rslora=True),
    "LoRA+": lora() | {"loraplus_lr_ratio": 4.0},
    "IA3": {"type": "ia3"},
    "VeRA": {"type": "vera", "vera": {"r": 32, "target_modules": ".*(q_proj|o_proj|attention.dense)"}},
    "QLoRA": lora() | {"quantization": NF4},
    "QLoRA, DoRA": lora(use_dora=True) | {"quantization": NF4},
}


# What the tests tune: every base with LoRA and, where bitsandbytes packs it otherwise, in 4 bits; one base with every adapter
CASES = [(base, "LoRA") for base in BASES] + [
    (base, "QLoRA") for base in BASES if not base.startswith("Llama, ") or base == "Llama, tied"
]
CASES += [("Llama, tied", kind) for kind in ADAPTERS if kind not in ("LoRA", "QLoRA")]
# Those that only `make test-all` tunes: others have the same architecture, ties and rows, or compute the same
ALIKE = [("Llama, tied, spare rows", "LoRA"), ("GPT-NeoX, tied", "LoRA"), ("GPT-NeoX, tied", "QLoRA"), ("Llama, tied", "QLoRA"),
         ("Qwen3, tied, spare rows", "QLoRA"), ("Llama, tied", "OLoRA"), ("Llama, tied", "LoRA+")]  # fmt: skip
CASES = CASES if "ALL_TESTS" in os.environ else [case for case in CASES if case not in ALIKE]


def make_base(name: str, folder: Path) -> Path:
    """A folder with a base model that has never seen a chat: random weights, and a tokenizer without ChatML's tokens."""
    if BASES[name] is None:
        return TINY
    if not (folder / "config.json").is_file():
        config, spare = copy.deepcopy(BASES[name])
        tokenizer = make_tokenizer()
        tokenizer.save_pretrained(folder)
        config.vocab_size, config.bos_token_id, config.eos_token_id = len(tokenizer) + spare, 0, 0
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([(TINY.parent / "data" / "prose.jsonl").read_text(encoding="utf-8")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def tune(
    base: Path | str, adapter: dict, run: Path, template: str | None = "chatml", dtype: str | None = None, **settings
) -> SupervisedTrainer:
    """A trainer that has learnt one short answer, 60 steps at 2e-3 unless `settings` say otherwise, and was saved."""
    tokenizer, marked, new = load_tokenizer(ModelOptions(str(base), template))
    encoder = Encoder(tokenizer, marked)
    encoded = encoder.encode([{"messages": ROW}])
    rows = Dataset.from_dict({key: [encoded[key][0].tolist()] for key in ("input_ids", "labels")})
    options = parse_adapter(adapter)
    peft, quantization = build_peft_config(options), build_quantization_config(options)
    model = load_model(
        ModelOptions(str(base), dtype=dtype), quantization, peft is not None, tokenizer, encoder.answers.stops, new
    )
    peft = prepare_peft_config(peft, model, new)
    values = {"learning_rate": 2e-3, "max_steps": 60, "lr_scheduler_type": "constant", "report_to": "none"} | settings
    arguments = SFTConfig(
        output_dir=str(run), per_device_train_batch_size=1, logging_steps=1, save_strategy="no", disable_tqdm=True,
        bf16=False, dataset_kwargs={"skip_prepare_dataset": True}, seed=0, **values,
    )  # fmt: skip
    trainer = SupervisedTrainer(
        model, arguments, train_dataset=rows, processing_class=tokenizer, peft_config=peft,
        loraplus_lr_ratio=options.loraplus_lr_ratio,
    )  # fmt: skip
    trainer.new_tokens, trainer.stop_id = new, tokenizer.convert_tokens_to_ids(encoder.stop)
    trainer.at_start = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    trainer.loading = save_model(trainer, run / "model", encoder, trainer.initial_adapter)
    ids = rows[0]["input_ids"]
    save_file({"ids": torch.tensor([ids]), "logits": logits(trainer.model, ids)}, run / "expected.safetensors")
    (run / "adapter.json").write_text(json.dumps(adapter))
    return trainer


@torch.no_grad()
def logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """The model's logits of one row of tokens, in fp32."""
    model.eval()
    return model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits.float().cpu()


def logits_of(load: Callable[[], torch.nn.Module], ids: list[int], plain: bool) -> torch.Tensor:
    """The logits of the model that `load` gives; `plain` is with bitsandbytes' own CPU kernel, where there is one."""
    model = load()
    if not plain:
        disable_bnb_cpu_repacking(model)
    return logits(model, ids)


def reloaded(run: Path, base: Path | str, plain: bool = True) -> dict[str, float]:
    """For each loader the largest difference between its logits and those of the model that was trained."""
    expected = load_file(run / "expected.safetensors")
    adapter = json.loads((run / "adapter.json").read_text())
    values = {"dtype": torch.float32}
    if adapter.get("quantization"):
        values["quantization_config"] = BitsAndBytesConfig(**adapter["quantization"])
    tokenizer = AutoTokenizer.from_pretrained(run / "model")

    def by_hand() -> PeftModel:
        model = AutoModelForCausalLM.from_pretrained(base, **values)
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
        return PeftModel.from_pretrained(model, run / "model")

    loaders = {
        "AutoPeftModelForCausalLM": lambda: AutoPeftModelForCausalLM.from_pretrained(run / "model", **values),
        "PeftModel on the base": by_hand,
    }
    if (run / "merged").is_dir():
        loaders["merged"] = lambda: AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)
    ids = expected["ids"][0].tolist()
    wanted = expected["logits"]
    return {name: (logits_of(load, ids, plain) - wanted).abs().max().item() for name, load in loaders.items()}


def in_fresh_process(cases: list[tuple[Path, Path, bool]]) -> list[dict[str, float]]:
    """`reloaded` for each run, its base and whether plainly, in a process that knows nothing of the training."""
    from support.processes import Command

    text = json.dumps([[str(run), str(base), plain] for run, base, plain in cases])
    found = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = Command(Path.cwd(), "--reload", text, script=__file__, **found).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--reload"]:
        print(json.dumps([reloaded(Path(run), Path(base), plain) for run, base, plain in json.loads(sys.argv[2])]))
        return
    sys.path.append(str(ROOT / "tests"))  # for support.processes
    print("| base | adapter | AutoPeftModelForCausalLM | PeftModel on the base | merged |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        for name in sys.argv[1:] or BASES:
            cases = []
            for kind, adapter in ADAPTERS.items():
                run, base = Path(root) / f"{name} {kind}", make_base(name, Path(root) / name)
                tune(base, adapter, run)
                merge(run, run / "merged")
                cases += [(run, base, plain) for plain in ((True, False) if "QLoRA" in kind else (True,))]
                if base == TINY and "QLoRA" in kind:  # bitsandbytes' CPU kernel fails on its width of 96
                    cases.remove((run, base, True))
            for (run, _, plain), found in zip(cases, in_fresh_process(cases), strict=True):
                kind = run.name.removeprefix(f"{name} ") + ("" if plain else ", without repacking")
                print("|", " | ".join([name, kind, *(f"{value:.1e}" for value in found.values())]), "|", flush=True)


if __name__ == "__main__":
    main()
