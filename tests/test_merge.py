"""A run as one folder: the trained model's logits, nothing of ours to load it, and nothing half written."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

import sft_recipes.merge as merging
from sft_recipes.encoding.chat_template import prepare_tokenizer
from sft_recipes.errors import ConfigError
from sft_recipes.merge import main, merge, merge_adapter
from sft_recipes.modeling.modelfile import build_modelfile, ollama_template
from support.paths import ROOT, TEMPLATES
from support.tuned import CASES as TUNED
from support.tuned import GROUPED, ROW, in_fresh_process, lora, make_base, tune

CASES = [case for case in TUNED if case != ("tiny, tied", "QLoRA")]  # its logits of 100 are rounded by more in bf16


@pytest.fixture(scope="module")
def merged(tuned):
    """For every case the merged folder, what merging measured, and what a fresh process finds."""
    results, runs = {}, []
    for base, kind in CASES:
        made = tuned(base, kind)
        shutil.rmtree(made.run / "merged", ignore_errors=True)
        results[base, kind] = SimpleNamespace(folder=made.run / "merged", checked=merge(made.run, made.run / "merged"))
        runs.append((made.run, made.base, False))
    for case, found in zip(CASES, in_fresh_process(runs), strict=True):
        results[case].found = found["merged"]
    return results


@pytest.mark.parametrize(("base", "kind"), CASES)
def test_a_merged_model_gives_the_trained_models_logits(merged, base, kind):
    limit = 5e-2 if "QLoRA" in kind else 1e-4  # four bits were computed with in bf16
    assert merged[base, kind].found <= limit and merged[base, kind].checked <= 1e-4


def test_four_bits_are_merged_into_what_they_stand_for_and_not_into_the_original(tuned, merged):
    base, kind = "Qwen3, untied", "QLoRA"
    made = tuned(base, kind)
    original = AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32).state_dict()
    name = "model.layers.0.mlp.down_proj.weight"
    own = load_file(merged[base, kind].folder / "model.safetensors")[name]
    parts = load_file(made.run / "model" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"
    without = own - parts[key.format("B")] @ parts[key.format("A")] * 2  # alpha 16 / r 8
    values = torch.tensor([len(block.unique()) for block in without.mul(1e4).round().flatten().split(64)])
    assert (
        values.max() <= 16 < torch.tensor([len(block.unique()) for block in original[name].flatten().split(64)]).min()
    )


def test_it_loads_in_a_plain_pipeline_and_renders_the_training_text(merged):
    folder = merged["Llama, tied", "LoRA"].folder
    code = (
        "import json, sys\nfrom transformers import pipeline\n"
        f"chat = pipeline('text-generation', {str(folder)!r}, max_new_tokens=8, do_sample=False)\n"
        f"row = {ROW!r}\n"
        "answer = chat(row[:1])[0]['generated_text'][-1]\n"
        "print(json.dumps([answer, chat.tokenizer.apply_chat_template(row, tokenize=False),"
        " 'sft_recipes' in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    answer, text, ours = json.loads(done.stdout.splitlines()[-1])
    assert text == "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\nHi there.<|im_end|>\n"
    assert answer["role"] == "assistant" and not ours


def test_stop_token_template_card_and_modelfile_are_there(merged):
    folder = merged["Qwen3, untied", "LoRA"].folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stops = [tokenizer.convert_tokens_to_ids("<|im_end|>"), 0]
    assert GenerationConfig.from_pretrained(folder).eos_token_id == stops
    assert (folder / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")
    lines = (folder / "Modelfile").read_text()
    assert lines.startswith("FROM .\n") and lines.endswith(
        'PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\n'
    )
    assert not AutoConfig.from_pretrained(folder).tie_word_embeddings


@pytest.mark.parametrize(("kind", "flag"), [("llama2", True), ("legacy", False)])
def test_of_a_sentencepiece_base_there_is_what_llama_cpp_reads(tokenizer_folder, tmp_path, kind, flag):
    """Scores and new tokens; and its flag where no space stands behind a special token: tools/as_gguf.py asks the server."""
    base = shutil.copytree(tokenizer_folder(kind), tmp_path / "base")
    pieces = tokenizer_folder("llama2") / "tokenizer.model"
    if kind == "legacy":
        shutil.copy(pieces, base)
    torch.manual_seed(0)
    stop = {"bos_token_id": 1, "eos_token_id": 2}
    size = len(AutoTokenizer.from_pretrained(base))
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=size, **stop, **GROUPED)).save_pretrained(base)
    tune(base, lora(), tmp_path / "run", max_steps=2)
    merge(tmp_path / "run", tmp_path / "merged")
    for folder in (tmp_path / "run" / "model", tmp_path / "merged"):
        assert (folder / "tokenizer.model").read_bytes() == pieces.read_bytes()
        added = json.loads((folder / "added_tokens.json").read_text())
        assert added == {"<|im_start|>": size, "<|im_end|>": size + 1}
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.tokenize("</s>user")[1].startswith("u" if flag else "▁u")
        assert tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<|im_start|>"]) == [1, 2, size]
    lines = (tmp_path / "merged" / "Modelfile").read_text().splitlines()
    assert ("--override-kv tokenizer.ggml.add_space_prefix=bool:false" in lines[1]) is flag


@pytest.mark.parametrize(("kind", "warned"), [("legacy", True), ("llama3", False)])
def test_a_sentencepiece_base_without_its_pieces_gets_a_warning(tokenizer_folder, tmp_path, caplog, kind, warned):
    base = shutil.copytree(tokenizer_folder(kind), tmp_path / "base")
    size = len(AutoTokenizer.from_pretrained(base))
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=size, **GROUPED)).save_pretrained(base)
    tune(base, lora(), tmp_path / "run", max_steps=2)
    merge(tmp_path / "run", tmp_path / "merged")
    assert ("The base has no tokenizer.model" in caplog.text) is warned
    assert not (tmp_path / "merged" / "added_tokens.json").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_half_as_large_and_rounded_once(tuned, merged, tmp_path, dtype):
    made = tuned("Llama, tied", "LoRA")
    merge(made.run, tmp_path / "half", dtype)
    whole = load_file(merged["Llama, tied", "LoRA"].folder / "model.safetensors")
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert {value.dtype for value in half.values()} == {getattr(torch, dtype)}
    close = [(half[name] == value.to(getattr(torch, dtype))).float().mean() for name, value in whole.items()]
    assert min(close) > 0.6  # the base was rounded before the sum, so that not every weight is the same


def test_a_run_of_whole_weights_is_written_in_another_dtype(tmp_path, tuned):
    base = make_base("Llama, tied, spare rows", tmp_path / "base")
    tune(base, {"type": "none"}, tmp_path / "run", max_steps=3)
    merge(tmp_path / "run", tmp_path / "out", "bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_a_merge_that_is_not_the_trained_model_is_refused(tuned, tmp_path, monkeypatch):
    made = tuned("Llama, untied", "LoRA")
    right = merge_adapter

    def wrong(model, dtype):
        model = right(model, dtype)
        model.model.layers[0].mlp.down_proj.weight.data *= 1.01
        return model

    monkeypatch.setattr(merging, "merge_adapter", wrong)
    with pytest.raises(ConfigError, match=r"The merged model's logits differ by [\d.e-]+ from the trained model's"):
        merge(made.run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_and_a_folder_that_is_there_are_refused_before_anything_is_loaded(tuned, tmp_path, monkeypatch):
    made = tuned("Llama, untied", "LoRA")
    (tmp_path / "there").mkdir()
    monkeypatch.setattr(merging, "load_run", None)
    with pytest.raises(ConfigError, match="there is there already. Remove it, or write another --out."):
        merge(made.run, tmp_path / "there")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(ConfigError, match=r"needs 0\.0 GiB, and .* has 0\.0 GiB free\."):
        merge(made.run, tmp_path / "out")


def test_a_folder_whose_parent_is_a_file_is_refused_by_a_line(tuned, tmp_path):
    (tmp_path / "file").write_text("A file.\n")
    with pytest.raises(ConfigError, match="out cannot be made: (File exists|Not a directory)."):
        merge(tuned("Llama, untied", "LoRA").run, tmp_path / "file" / "out")


def test_a_folder_that_cannot_get_its_name_is_told_as_such(tuned, tmp_path, monkeypatch):
    made = tuned("Llama, untied", "LoRA")
    monkeypatch.setattr(merging, "write_merged", lambda *_: 0.0)

    def rename(partial, out):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(ConfigError, match="out cannot be made: Disk quota exceeded."):
        merge(made.run, tmp_path / "out")


def test_killed_in_the_middle_it_leaves_no_folder_of_that_name_and_the_next_one_works(tuned, tmp_path):
    made, out = tuned("Llama, untied", "LoRA"), tmp_path / "out"
    slow = (
        "import time, sft_recipes.merge as merging\n"
        "merging.check_merged = lambda *_: time.sleep(60)\n"
        f"merging.main([{str(made.run)!r}, '--out', {str(out)!r}])\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", slow], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out.*.partial/README.md")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (partial,) = tmp_path.glob("out.*.partial")
    assert (partial / "model.safetensors").is_file() and not out.exists()
    main([str(made.run), "--out", str(out)])
    assert (
        out / "model.safetensors"
    ).is_file() and partial.exists()  # a merge deletes what it has made itself, and nothing else


def test_what_is_no_run_gets_a_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path), "--out", str(tmp_path / "out")])
    line = f"{tmp_path} is not the folder of a finished run: it has no model/ with a tokenizer.\n"
    assert (stopped.value.code, capsys.readouterr().err) == (2, line)


def say(template: str, messages: list[dict[str, str]]) -> str:
    """What Ollama would make of the one form of template that `go_template` writes."""
    body, opening = re.fullmatch(
        r"\{\{- range \.Messages \}\}(.*)\{\{ end \}\}(?!.*\{\{ end)(.*)", template, re.DOTALL
    ).groups()
    cases = dict(
        re.findall(r'\{\{ if eq \.Role "(\w+)" \}\}(.*?)(?:\{\{ else \}\}|(?:\{\{ end \}\})+$)', body, re.DOTALL)
    )
    return "".join(cases[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages) + opening


@pytest.mark.parametrize("name", TEMPLATES)
def test_ollamas_template_says_what_the_saved_one_says_or_is_left_out(name, tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder("llama3"))
    prepare_tokenizer(tokenizer, name)
    made = ollama_template(tokenizer)
    assert (made is None) == (
        name in {"llama2", "vicuna", "alpaca", "alpaca_long", "gemma", "mistral", "qwen3"}
    )  # a preamble, or no text of its own for every role
    if made is None:
        assert "TEMPLATE" not in build_modelfile(tokenizer, GenerationConfig(eos_token_id=0))
        return
    roles = ["system", "user", "assistant", "user"]
    messages = [{"role": role, "content": f"the {role}'s"} for role in roles]
    for talk in (messages, messages[1:], messages[1:2]):
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert say(made, talk) == text.removeprefix(tokenizer.bos_token)
