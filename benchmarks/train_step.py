"""A training step, ours beside raw TRL and a bare PyTorch loop: `python benchmarks/train_step.py`."""

import argparse
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from prepare import DATA, FILES, machine, neox, real_rows
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen3Config,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from sft_recipes.config.options import AdapterOptions, ModelOptions
from sft_recipes.data.packing import pack_rows
from sft_recipes.data.token_rows import row_lengths, to_dataset
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.modeling.adapters import build_peft_config, prepare_peft_config
from sft_recipes.modeling.loading import load_model
from sft_recipes.training.trainer import SupervisedTrainer, select_attention

LLAMA = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
         "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256}  # fmt: skip
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256}  # fmt: skip
QWEN_06B = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}  # fmt: skip
QWEN = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}  # fmt: skip
SMALL = LLAMA | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4,
                 "num_key_value_heads": 1, "vocab_size": 50304}  # fmt: skip
SHAPES = {
    "small": LlamaConfig(tie_word_embeddings=True, **SMALL),  # Llama-3.2-1B's proportions, for a CPU
    "llama3_2_1b": LlamaConfig(tie_word_embeddings=True, **LLAMA),
    "llama3_1_8b": LlamaConfig(tie_word_embeddings=False, **LLAMA_8B),
    "qwen3_0_6b": Qwen3Config(tie_word_embeddings=True, **QWEN_06B),
    "qwen3_8b": Qwen3Config(tie_word_embeddings=False, **QWEN),
}
SIDES = {"ours": "ours", "trl": "TRL, tuned by hand", "defaults": "TRL, its defaults", "bare": "PyTorch alone"}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
WARM_UP, RATE = 2, 2e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the rows and the tokenizer")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--kinds", default="full,lora,qlora")
    parser.add_argument("--steps", type=int, default=6, help=f"steps that are timed, after {WARM_UP} that are not")
    parser.add_argument("--rounds", type=int, default=2, help="the best of so many counts")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a packed row")
    parser.add_argument("--rows", type=int, default=1, help="packed rows a step")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        logging.disable(logging.WARNING)
        print(json.dumps(SIDE[options.side](options)))
        return
    with torch.device("meta"):
        number = AutoModelForCausalLM.from_config(SHAPES[options.shape]).num_parameters()
    peak = matmul_flops()
    print(f"{machine()}\n{options.shape}: {number:,} parameters, packed rows of {options.length}, {options.rows} "
          f"a step; a matrix product reaches {peak / 1e12:.2f} TFLOP/s here\n")  # fmt: skip
    print("|       | side               | of ours | real tokens/s | share of peak by 6N | by 4N | peak memory |")
    print("| ----- | ------------------ | ------- | ------------- | ------------------- | ----- | ----------- |")
    for kind in options.kinds.split(","):
        best: dict[str, dict[str, float]] = {}
        for side in list(SIDES) * options.rounds:  # taking turns
            found = in_process(side, kind, sys.argv[1:])
            if found and found["rate"] > best.get(side, found | {"rate": 0})["rate"]:
                best[side] = found
        for side, name in SIDES.items():
            if side not in best:
                print(f"| {kind:5} | {name:18} | failed  |               |                     |       |             |")
                continue
            rate, ratio = best[side]["rate"], best[side]["rate"] / best["ours"]["rate"]
            six, four = (work * number * rate / peak for work in (6, 4))  # frozen weights need no gradient: LoRA is 4N
            memory = f"{best[side]['memory']:7.2f} GiB"
            print(f"| {kind:5} | {name:18} | {ratio:7.2f} | {rate:13,.0f} | {six:19.1%} | {four:5.1%} | {memory} |",
                  flush=True)  # fmt: skip


def in_process(side: str, kind: str, arguments: list[str]) -> dict[str, float] | None:
    """One side's measurement from a process of its own, so that its peak memory is its own; None where it fails."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments, "--side", side, "--kinds", kind], capture_output=True, text=True
    )
    if done.returncode:
        print(f"{side}, {kind}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def encoded(options: argparse.Namespace) -> tuple[Dataset, Any, str]:
    """As many real rows as the steps need, as ids and labels; the tokenizer, and its stop tokens."""
    tokenizer, template = neox(options.data)
    encoder = Encoder(tokenizer, template)
    talks = [FILES[name](row) for name, rows in real_rows(options.data).items() for row in rows.select(range(300))]
    found = encoder.encode(talks)
    rows = to_dataset({key: found[key] for key in ("input_ids", "labels")})
    short = [place for place, length in enumerate(row_lengths(rows)) if length <= options.length]
    return rows.select(short), tokenizer, encoder.answers.stops


def base(options: argparse.Namespace) -> str:
    """A folder with random weights of the shape, in bf16 as checkpoints are; made once."""
    folder = Path(tempfile.gettempdir()) / f"sft_recipes_{options.shape}"
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(SHAPES[options.shape], dtype=torch.bfloat16).save_pretrained(folder)
    return str(folder)


def ours(options: argparse.Namespace) -> dict[str, float]:
    """Our model, our packing over all rows, our attention on a CPU; TRL's trainer."""
    rows, tokenizer, stops = encoded(options)
    adapter = AdapterOptions() if options.kinds == "full" else AdapterOptions("lora", LORA)
    peft, quantization = build_peft_config(adapter), BitsAndBytesConfig(**NF4) if options.kinds == "qlora" else None
    model = load_model(ModelOptions(base(options)), quantization, peft is not None, tokenizer, stops, [])
    rows = pack_rows(rows, options.length, seed=0)
    trainer = SupervisedTrainer(model, settings(options, packing=True), train_dataset=rows, processing_class=tokenizer,
                                peft_config=prepare_peft_config(peft, model, []))  # fmt: skip
    select_attention(trainer, None)
    return measured(trainer, options)


def trl(options: argparse.Namespace) -> dict[str, float]:
    """TRL with the same settings and its own packing."""
    rows, tokenizer, _ = encoded(options)
    arguments = settings(options, packing=True, dataset_kwargs=None)
    return measured(SFTTrainer(raw_model(options), arguments, train_dataset=rows, processing_class=tokenizer,
                               peft_config=lora(options)), options)  # fmt: skip


def defaults(options: argparse.Namespace) -> dict[str, float]:
    """TRL with the batch size and all else that it comes with, fp32 where the machine wants it."""
    rows, tokenizer, _ = encoded(options)
    arguments = SFTConfig(output_dir=tempfile.mkdtemp(), max_steps=WARM_UP + options.steps, report_to="none",
                          save_strategy="no", disable_tqdm=True, bf16=torch.cuda.is_available())  # fmt: skip
    return measured(SFTTrainer(raw_model(options), arguments, train_dataset=rows, processing_class=tokenizer,
                               peft_config=lora(options)), options)  # fmt: skip


def bare(options: argparse.Namespace) -> dict[str, float]:
    """A loop over packed rows: positions keep documents apart, cross entropy on the logits, AdamW."""
    rows, _, _ = encoded(options)
    rows = pack_rows(rows, options.length, seed=0)
    model = raw_model(options)
    if options.kinds != "full":
        model = get_peft_model(model, lora(options))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).train()
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=RATE)
    marks, tokens = [], []
    for batch in batches(rows, options):
        values = {key: value.to(device) for key, value in batch.items()}
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            model(**values, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
        tokens.append(values["input_ids"].numel())
    return result(marks, tokens)


def batches(rows: Dataset, options: argparse.Namespace) -> Iterator[dict[str, torch.Tensor]]:
    """For every step the packed rows as one: ids, positions that begin anew in every document, labels."""
    for step in range(WARM_UP + options.steps):
        some = [rows[(step * options.rows + place) % len(rows)] for place in range(options.rows)]
        positions = [torch.arange(length) for row in some for length in row["seq_lengths"]]
        ids, labels = ([id for row in some for id in row[key]] for key in ("input_ids", "labels"))
        yield {
            "input_ids": torch.tensor([ids]),
            "labels": torch.tensor([labels]),
            "position_ids": torch.cat(positions)[None],
        }


def settings(options: argparse.Namespace, **more: Any) -> SFTConfig:
    """What ours and TRL tuned by hand share."""
    values = {"dataset_kwargs": {"skip_prepare_dataset": True}} | more
    return SFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=WARM_UP + options.steps, max_length=options.length, learning_rate=RATE,
        per_device_train_batch_size=options.rows, bf16=torch.cuda.is_available(), gradient_checkpointing=False,
        report_to="none", save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant", **values,
    )  # fmt: skip


def raw_model(options: argparse.Namespace) -> PreTrainedModel:
    """The same weights by transformers alone: fp32 where they are trained or the machine has no GPU."""
    half = torch.cuda.is_available() and options.kinds != "full"
    quantization = BitsAndBytesConfig(**NF4) if options.kinds == "qlora" else None
    dtype = torch.bfloat16 if half else torch.float32
    return AutoModelForCausalLM.from_pretrained(base(options), dtype=dtype, quantization_config=quantization)


def lora(options: argparse.Namespace) -> LoraConfig | None:
    """The same adapter for every side."""
    return None if options.kinds == "full" else LoraConfig(task_type="CAUSAL_LM", **LORA)


class Marks(TrainerCallback):
    """The time at the end of every step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def measured(trainer: SFTTrainer, options: argparse.Namespace) -> dict[str, float]:
    """Trains, and counts the tokens of every batch that are no padding."""
    marks, tokens, compute_loss = Marks(), [], trainer.compute_loss

    def counting(model: Any, inputs: dict, *rest: Any, **named: Any) -> Any:
        mask = inputs.get("attention_mask")
        tokens.append(int(inputs["input_ids"].numel() if mask is None else mask.sum()))
        return compute_loss(model, inputs, *rest, **named)

    trainer.compute_loss = counting
    trainer.add_callback(marks)
    trainer.train()
    return result(marks.times, tokens)


def result(marks: list[float], tokens: list[int]) -> dict[str, float]:
    """Real tokens a second after the warm-up, and the peak memory in GiB."""
    rate = sum(tokens[WARM_UP:]) / (marks[-1] - marks[WARM_UP - 1])
    if torch.cuda.is_available():
        return {"rate": rate, "memory": torch.cuda.max_memory_allocated() / 2**30}
    return {"rate": rate, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def matmul_flops(size: int = 2048) -> float:
    """Operations a second of a large matrix product, in the dtype that is trained in: what the hardware gives."""
    gpu = torch.cuda.is_available()
    size = 4 * size if gpu else size
    one = torch.randn(size, size, device="cuda" if gpu else "cpu", dtype=torch.bfloat16 if gpu else torch.float32)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        (one @ one).sum().item()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


SIDE = {"ours": ours, "trl": trl, "defaults": defaults, "bare": bare}

if __name__ == "__main__":
    main()
