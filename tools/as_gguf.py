"""Merged folders as GGUF, asked through llama.cpp's server: `python tools/as_gguf.py LLAMA_CPP TOKENIZER`.

LLAMA_CPP is a checkout with `build/bin/llama-server`, TOKENIZER the folder of a base model's tokenizer. A random Llama
of two layers learns one answer in each template and is merged. Then the server has to make the same tokens of
conversations as the saved template does, to give the next token the same probability, and to answer as transformers
does. It is asked for tokens again without tokenizer.model and added_tokens.json, and without the flag that the
Modelfile names.
"""

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from sft_recipes.merge import merge
from sft_recipes.reporting.text import render_table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.tuned import GROUPED, ROOT, ROW, lora, tune

TEMPLATES = ("chatml", "llama2", "llama3", "vicuna", "zephyr")


def main() -> None:
    llama_cpp, tokenizer = map(Path, sys.argv[1:])
    rows = [["template", "tied", "same tokens", "without pieces", "without flag", "log p off by", "same answer"]]
    with tempfile.TemporaryDirectory() as scratch:
        for template in TEMPLATES:
            for tied in (True, False):
                folder = merged(Path(scratch) / f"{template} {tied}", tokenizer, template, tied)
                rows.append([template, "yes" if tied else "no", *compare(llama_cpp, folder)])
    print("\n".join(render_table(rows)))


def merged(folder: Path, source: Path, template: str, tied: bool) -> Path:
    """A random Llama with this tokenizer that has learnt one answer with LoRA, merged."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(0)
    stop = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=tied, **stop, **GROUPED)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    for file in source.glob("tokenizer*"):
        (folder / "base" / file.name).write_bytes(file.read_bytes())
    tune(folder / "base", lora(), folder / "run", template)
    merge(folder / "run", folder / "merged")
    return folder / "merged"


def compare(llama_cpp: Path, folder: Path) -> list[str]:
    """One row of the table: the server's tokens, probabilities and answer beside those of transformers."""
    flag = next((line for line in (folder / "Modelfile").read_text().splitlines() if "--override-kv" in line), "")
    flags = flag[flag.index("--") :].split() if flag else []
    tokenizer, talks = AutoTokenizer.from_pretrained(folder), conversations()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    encoded = [tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False) for talk in talks]
    bare = folder.with_name("bare")
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("tokenizer.model", "added_tokens.json"))
    with served(llama_cpp, bare, flags) as port:
        without_pieces = same(port, talks, encoded)
    with served(llama_cpp, folder, []) as port:
        without_flag = same(port, talks, encoded)
    with served(llama_cpp, folder, flags) as port:
        whole, off = same(port, talks, encoded), 0.0
        for ids in encoded:
            found = ask(port, "completion", prompt=ids, n_predict=1, n_probs=5, temperature=0)
            with torch.no_grad():
                log_p = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            top = found["completion_probabilities"][0]["top_logprobs"]
            off = max(off, *(abs(token["logprob"] - log_p[token["id"]].item()) for token in top))
        said = ask(port, "v1/chat/completions", messages=ROW[:1], temperature=0, max_tokens=16)["choices"][0]
    prompt = torch.tensor([tokenizer.apply_chat_template(ROW[:1], add_generation_prompt=True, return_dict=False)])
    ours = model.generate(prompt, max_new_tokens=16, do_sample=False)[0, prompt.shape[1] :]
    answer = tokenizer.decode(ours, skip_special_tokens=True) == said["message"]["content"]
    ended = (said["finish_reason"] == "stop") == (ours[-1].item() in model.generation_config.eos_token_id)
    return [whole, without_pieces, without_flag, f"{off:.0e}", "yes" if answer and ended else "NO"]


def same(port: int, talks: list[list[dict[str, str]]], encoded: list[list[int]]) -> str:
    """How many conversations the server makes the same tokens of as the saved template."""
    prompts = [ask(port, "apply-template", messages=talk)["prompt"] for talk in talks]
    tokens = [ask(port, "tokenize", content=text, add_special=True, parse_special=True)["tokens"] for text in prompts]
    return f"{sum(one == other for one, other in zip(tokens, encoded, strict=True))} of {len(talks)}"


@contextmanager
def served(llama_cpp: Path, folder: Path, flags: list[str]) -> Iterator[int]:
    """The port of a server that has loaded this folder, converted."""
    gguf = folder.with_suffix(".gguf")
    convert = [sys.executable, llama_cpp / "convert_hf_to_gguf.py", folder, "--outfile", gguf, "--outtype", "f32"]
    subprocess.run(convert, check=True, capture_output=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [llama_cpp / "build" / "bin" / "llama-server", "-m", gguf, "--port", str(port), "-c", "2048", "--jinja"]
    server = subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait(port)
        yield port
    finally:
        server.kill()
        server.wait()


def conversations() -> list[list[dict[str, str]]]:
    """Each paragraph of the README as a question, and every third one behind an exchange and a system message."""
    paragraphs = [text.strip() for text in (ROOT / "README.md").read_text(encoding="utf-8").split("\n\n")]
    before = [{"role": "system", "content": "Be brief."}, *ROW]
    return [
        [*(before if number % 3 == 0 else []), {"role": "user", "content": text}]
        for number, text in enumerate(paragraphs)
        if len(text) < 1500
    ]


def wait(port: int) -> None:
    """Until the server has loaded its model."""
    for _ in range(240):
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
        except urllib.error.URLError:
            time.sleep(0.25)
    raise TimeoutError("llama-server did not start.")


def ask(port: int, path: str, **body: Any) -> Any:
    """What the server answers to this."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


if __name__ == "__main__":
    main()
