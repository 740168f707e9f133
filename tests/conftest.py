"""What several tests need: real rows and real tokenizers where ../shared/data is there, small made ones always."""

import contextlib
import io
import json
import logging
import os
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from absl import logging as absl_logging
from hydra.core.global_hydra import GlobalHydra
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sft_recipes.__main__ import main
from sft_recipes.config.options import ModelOptions
from sft_recipes.modeling.loading import load_tokenizer

# rouge-score brings absl, whose handler keeps the stderr it was imported with, pytest's, and closes it when Hydra sets up
# logging in a test with another one; the process's own it leaves open
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__
# The models are tiny: a second thread only waits for the first, long if the machine is busy. The variable is for notebooks
# and other processes
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
TEMPLATES = sorted(path.stem for path in (ROOT / "sft_recipes" / "encoding" / "templates").glob("*.jinja"))
LLAMA3_SPLIT = (  # the split pattern of Llama 3 and Qwen
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(autouse=True)
def no_handlers_left():
    """Takes away what Hydra logs to in a run: it outlives the test, and the file that pytest caught the text in."""
    before = logging.getLogger().handlers[:]
    yield
    for handler in logging.getLogger().handlers[:]:
        if handler not in before:
            logging.getLogger().removeHandler(handler)


def rows(name: str) -> list[dict]:
    """The rows of one real file, or a skipped test."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data")
    return json.loads((SHARED / name).read_text(encoding="utf-8"))


@cache
def base_tokenizer_folder(kind: str, root: Path) -> Path:
    """A folder with a base model's tokenizer of one kind: byte-level BPE, SentencePiece, or Llama-3 like."""
    folder = root / kind
    folder.mkdir(exist_ok=True)
    if kind in ("neox", "llama2", "legacy") and not SHARED.is_dir():
        pytest.skip("needs ../shared/data")
    if kind == "neox":
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(SHARED / "neox_20b_tokenizer.json"), eos_token="<|endoftext|>", bos_token="<|endoftext|>"
        )
        tokenizer.save_pretrained(folder)
    elif kind == "llama2":
        (folder / "tokenizer.model").write_bytes((SHARED / "llama2_tokenizer.model").read_bytes())
        config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        config["add_bos_token"] = True
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    elif (
        kind == "legacy"
    ):  # SentencePiece as Mistral 7B's tokenizer.json has it: a dummy prefix after every special token
        spec = json.loads(
            AutoTokenizer.from_pretrained(base_tokenizer_folder("llama2", root)).backend_tokenizer.to_str()
        )
        replaced = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        spec["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replaced]}
        spec["pre_tokenizer"] = None
        PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(spec)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        ).save_pretrained(folder)
    elif kind == "llama3":
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        bpe.decoder = decoders.ByteLevel()
        special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        trainer = trainers.BpeTrainer(
            vocab_size=1200,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(
            [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("sft_recipes/**/*.py"))], trainer
        )
        PreTrainedTokenizerFast(
            tokenizer_object=bpe, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
        ).save_pretrained(folder)
    else:
        AutoTokenizer.from_pretrained(ROOT / "sft_recipes" / "tiny" / "model").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """`tokenizer_folder("neox")`: a folder with that base tokenizer."""
    root = tmp_path_factory.mktemp("tokenizers")
    return lambda kind: base_tokenizer_folder(kind, root)


@pytest.fixture(scope="session")
def tuned(tmp_path_factory):
    """`tuned("Llama, tied", "LoRA")`: the run of a small model that has learnt one answer, its trainer and its base."""
    from tuned import ADAPTERS, make_base, tune

    root = tmp_path_factory.mktemp("tuned")

    @cache
    def make(base: str, adapter: str) -> SimpleNamespace:
        folder, run = make_base(base, root / base), root / f"{base} {adapter}"
        return SimpleNamespace(trainer=tune(folder, ADAPTERS[adapter], run), run=run, base=folder)

    return make


@pytest.fixture(scope="session")
def chat_tokenizer(tokenizer_folder):
    """`chat_tokenizer("neox", "chatml")`: that tokenizer, the marked template, and the new tokens' ids."""
    return cache(lambda kind, template: load_tokenizer(ModelOptions(str(tokenizer_folder(kind)), template)))


def run_command(folder: Path, *arguments: str) -> tuple[int, str]:
    """Runs the command in this process, its run's folder given: its exit code and what it printed."""
    printed, code, before = io.StringIO(), 0, sys.argv
    sys.argv = ["sft_recipes", f"hydra.run.dir={folder}", *arguments]
    GlobalHydra.instance().clear()
    try:
        with contextlib.redirect_stdout(printed):
            main()
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
    return code, printed.getvalue()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of one run of the embedded model's recipe, two of its eight epochs long, asked a hundred questions."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    code, _ = run_command(folder, "trainer.num_train_epochs=2", "evaluate.rows=100")
    assert code == 0
    return folder
