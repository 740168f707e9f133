"""The memory estimate against the measured peak of whole runs on a CPU: `python benchmarks/memory.py`.

Every case is a run of the command in a process of its own, on a model of random weights. What is measured is the peak
of the process's resident memory, less what it held when everything was imported. glibc is told to give back what is
freed: the holes in its heap are not the run's (11M, 16 × 512, LoRA: 2519 MiB, with holes 4177).

`python benchmarks/memory.py 60M` or `… 3` measures a part, `… needs` prints what each recipe needs, from the models'
shapes in benchmarks/shapes.json.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TINY = ROOT / "sft_recipes" / "tiny" / "model"
LLAMA = {"model_type": "llama", "vocab_size": 32000, "tie_word_embeddings": False, "max_position_embeddings": 4096}
SHAPES = {
    "11M": LLAMA | {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8,
                    "num_attention_heads": 8, "num_key_value_heads": 8},
    "60M": LLAMA | {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
                    "num_key_value_heads": 8},
    "135M": "HuggingFaceTB/SmolLM2-135M",
    "253M": LLAMA | {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 15, "num_attention_heads": 16,
                     "num_key_value_heads": 4},
    "405M": "EleutherAI/pythia-410m",
    "596M": "Qwen/Qwen3-0.6B-Base",
}  # fmt: skip
FULL, LORA = ["adapter=none"], ["adapter=lora"]
BATCH = "trainer.per_device_train_batch_size="
CASES = [  # model, rows × length, what else
    ("11M", 8, 256, FULL), ("11M", 16, 512, FULL), ("11M", 16, 512, LORA),
    ("60M", 4, 512, FULL), ("60M", 8, 512, [*FULL, "trainer.activation_checkpointing=true"]), ("60M", 4, 512, LORA),
    ("60M", 4, 512, [*FULL, "trainer.packing=true"]), ("60M", 4, 512, [*FULL, "trainer.gradient_accumulation_steps=2"]),
    ("60M", 4, 512, [*FULL, "trainer.optim=adafactor"]),
    ("135M", 2, 512, FULL), ("135M", 2, 512, [*FULL, "trainer.activation_checkpointing=true"]), ("135M", 2, 512, LORA),
    ("253M", 2, 256, FULL), ("405M", 2, 128, FULL), ("405M", 2, 256, LORA), ("596M", 2, 128, LORA),
]  # fmt: skip


def main() -> None:
    """Runs every case and prints a table of estimated and measured peaks."""
    chosen = [case for case in CASES if not sys.argv[1:] or case[0] in sys.argv[1:]] or CASES[: int(sys.argv[1])]
    print(f"| {'model':5} | rows × length | {'what':45} | estimated | measured | off by |")
    print(f"| ----- | ------------- | {'-' * 45} | --------- | -------- | ------ |")
    with tempfile.TemporaryDirectory() as place:
        for model, rows, length, choices in chosen:
            made = made_model(model, Path(place))
            arguments = run_arguments(made, rows, length, choices, Path(place))
            child = [sys.executable, __file__, "child", *arguments]
            home = os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
            done = subprocess.run(child, cwd=place, env=home, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-2000:])
            estimated, measured = map(int, done.stdout.splitlines()[-1].split())
            what = " ".join(choice.removeprefix("trainer.") for choice in choices)
            print(
                f"| {model:5} | {f'{rows} × {length}':13} | {what:45} | {estimated / 2**20:5.0f} MiB | "
                f"{measured / 2**20:4.0f} MiB | {estimated / measured - 1:+6.1%} |", flush=True
            )  # fmt: skip


def shape_of(model: str):
    """The transformers config of one of SHAPES, or of a model of shapes.json."""
    from transformers import AutoConfig

    values = SHAPES.get(model, model)
    values = (
        json.loads((Path(__file__).parent / "shapes.json").read_text())[values] if isinstance(values, str) else values
    )
    return AutoConfig.for_model(**values)


def made_model(model: str, place: Path) -> Path:
    """A folder with random weights in bf16, which a run loads as fp32, and the tiny tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = place / model
    if not folder.exists():
        AutoModelForCausalLM.from_config(shape_of(model), dtype=torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


def run_arguments(model: Path, rows: int, length: int, choices: list[str], place: Path) -> list[str]:
    """The command line of a run of three steps on rows that are all `length` tokens long."""
    text = "The capital of Zanune is Pinemoor, and the mossfox eats clover. " * length
    (place / "rows.jsonl").write_text("".join(json.dumps({"text": f"{i} {text}"}) + "\n" for i in range(8 * rows)))
    fixed = [
        "data=file",
        f"data.file.data_files={place}/rows.jsonl",
        "data.held_out=0",
        "evaluate.rows=0",
        "evaluate.raw_text=null",
    ]
    fixed += ["data.max_length_policy=keep", "trainer.max_steps=3", "trainer.gradient_accumulation_steps=1"]
    fixed += ["trainer.activation_checkpointing=false", f"trainer.max_length={length}", f"{BATCH}{rows}"]
    return ["model=local", f"model.id={model}", *fixed, *choices, f"hydra.run.dir={place}/run"]


def child(arguments: list[str]) -> None:
    """One run in this process; prints the estimate and the growth of resident memory in bytes."""
    import torch
    from hydra import compose, initialize_config_dir

    import sft_recipes.train  # what a run imports is in memory before it is measured
    from sft_recipes.__main__ import main
    from sft_recipes.config.hydra_plugin import config_folder, register_with_hydra
    from sft_recipes.config.schema import from_hydra
    from sft_recipes.modeling.loading import load_tokenizer
    from sft_recipes.training.arguments import build_arguments
    from sft_recipes.training.memory import describe_step, estimate_memory

    torch.set_num_threads(1)
    assert sft_recipes.train
    register_with_hydra()
    with initialize_config_dir(str(config_folder("conf")), version_base="1.3"):
        config = from_hydra(compose("config", [part for part in arguments if not part.startswith("hydra.")]))
    arguments_of_trl, _ = build_arguments(config, Path(tempfile.mkdtemp()))
    new = load_tokenizer(config.model)[2]
    estimated = estimate_memory(describe_step(config, arguments_of_trl, arguments_of_trl.max_length, new)).total
    with open("/proc/self/statm", encoding="utf-8") as file:
        before = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")  # the high-water mark starts anew
    sys.argv = ["sft_recipes", *arguments]
    main()
    with open("/proc/self/status", encoding="utf-8") as lines:
        peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    print(estimated, peak - before)


def needs() -> None:
    """What every recipe needs on one device with bf16, by its own numbers."""
    import contextlib
    from dataclasses import replace

    from sft_recipes.recipes import compose_recipe, recipe_names
    from sft_recipes.training.arguments import build_arguments
    from sft_recipes.training.memory import describe_step, estimate_memory, format_bytes

    for name in recipe_names():
        config = compose_recipe(name)
        shape = None if name == "tiny" else shape_of(config.model.id)
        arguments, _ = build_arguments(config, Path(tempfile.mkdtemp()))
        with contextlib.redirect_stderr(None):
            step = describe_step(config, arguments, arguments.max_length, model_config=shape)
            found = estimate_memory(replace(step, gpu=True))
        print(f"{name}: {format_bytes(found.total)}, estimated")


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2:])
    elif sys.argv[1:2] == ["needs"]:
        needs()
    else:
        main()
