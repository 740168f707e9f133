"""The model card: the report as the README.md of `model/`, with the metadata that the hub reads."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sft_recipes.config.metrics import metrics_on
from sft_recipes.config.nested_values import as_mapping, finite_number, get_number, get_path, iterate_leaves
from sft_recipes.reporting.document import Picture, render_markdown
from sft_recipes.reporting.run_folder import RunFiles

ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<\\…])(?:/[^\s/`'\"|<>,\[\]{}]+){2,}")
TRAINING_TEMPLATE = "additional_chat_templates/training.jinja"


def write_model_card(run: RunFiles, values: Mapping[str, Any], pictures: Sequence[Picture]) -> None:
    """Writes the card from the report's values, and copies its pictures, into the run's `model/`, if there is one."""
    folder = run.folder / "model"
    if not folder.is_dir():
        return
    from huggingface_hub import ModelCard

    if get_path(run.config, "evaluate.answers_in_card") is not True:
        run = replace(run, answers=[], samples=[])
    values = {**values, "run": run, "card": True, "usage": usage_snippet(run), "advice": client_advice(run)}
    # The card is what gets published: a command that names a folder here is left out of it
    values["names_a_path"] = re.search(r"(?<![\w.])/", str(run.metrics.get("command")))
    page = shorten_paths(render_markdown("report.jinja", **values))
    ModelCard(f"---\n{card_metadata(run).to_yaml()}\n---\n\n{page}").save(folder / "README.md")
    for picture in pictures:
        shutil.copyfile(run.folder / picture.file, folder / picture.file)


def shorten_paths(text: str) -> str:
    """The text with the last two parts of absolute paths, which tell more of a machine than a reader needs.

    >>> shorten_paths("`data_files=/home/me/secret/my.jsonl` of https://hub/a/b"), shorten_paths("base/tuned 1/2")
    ('`data_files=…/secret/my.jsonl` of https://hub/a/b', 'base/tuned 1/2')
    """
    return ABSOLUTE_PATH.sub(lambda found: "/".join(("…", *found[0].rstrip("/").split("/")[-2:])), text)


def card_metadata(run: RunFiles) -> Any:
    """The card's `huggingface_hub.ModelCardData`: names of the hub's only, no path of this machine."""
    from huggingface_hub import ModelCardData

    base = get_path(run.config, "model.id")
    kind = "qlora" if get_path(run.config, "adapter.quantization") else get_path(run.config, "adapter.type")
    found = eval_results(run.metrics)
    sources = [source.get("path") for source in as_mapping(run.config.get("data")).values() if isinstance(source, dict)]
    return ModelCardData(
        base_model=base if is_hub_id(base) else None,
        library_name="peft" if is_adapter(run) else "transformers",
        pipeline_tag="text-generation",
        license=base_licence(base),
        datasets=[path for path in dict.fromkeys(sources) if is_hub_id(path)] or None,
        tags=["sft", "trl", "sft_recipes", *([kind] if is_adapter(run) else [])],
        model_name=(run.config.get("name") or run.folder.resolve().parent.name) if found else None,
        eval_results=found or None,
    )


def is_hub_id(name: Any) -> bool:
    """Whether this is a name on the hub, owner/name, and no folder here.

    >>> is_hub_id("Qwen/Qwen3-0.6B-Base"), is_hub_id("json"), is_hub_id("/home/me/model"), is_hub_id("../models/base")
    (True, False, False, False)
    """
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name))) and not Path(str(name)).exists()


def base_licence(base: Any) -> str | None:
    """The licence that the base model's own card states, where that card is on this machine."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    card = Path(str(base)) / "README.md"
    if is_hub_id(base):
        card = Path(str(try_to_load_from_cache(str(base), "README.md") or card))
    if not card.is_file():
        return None
    found = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.get("license")
    return found if isinstance(found, str) else None


def eval_results(metrics: Mapping[str, Any]) -> list[Any]:
    """The tuned model's metrics as the hub's evaluation results."""
    from huggingface_hub import EvalResult

    def result(dataset: str, name: str, metric: str, label: str, value: float) -> EvalResult:
        return EvalResult("text-generation", dataset, name, metric, round(value, 4), metric_name=label)

    results = []
    for metric in metrics_on("answers", "stop_tokens", "held_out", "raw_text"):
        if (value := get_number(metrics, metric.name)) is not None:
            names = ("raw_text", "raw text") if metric.measured_on == "raw_text" else ("held_out", "held-out rows")
            results.append(result(*names, metric.hub_type or metric.path.rpartition(".")[2], metric.label, value))
    for task, value in iterate_leaves(as_mapping(get_path(metrics, "after.lm_eval"))):
        if finite_number(value) is not None:
            results.append(result(task, task, "score", "score", value))
    return results


def usage_snippet(run: RunFiles) -> str:
    """The lines that load the model as it was trained and ask it a question.

    An adapter's base has neither the template nor, often, the stop token, and its files may say another dtype.
    """
    question = str(run.answers[0].get("prompt", "Hi!")) if run.answers else "Hi!"
    ask = [
        f'messages = [{{"role": "user", "content": {json.dumps(question[:200], ensure_ascii=False)}}}]',
        'print(chat(messages)[0]["generated_text"][-1]["content"])',
    ]
    if not is_adapter(run):
        load = 'chat = pipeline("text-generation", "path/to/this/folder", max_new_tokens=256)'
        return "\n".join(["from transformers import pipeline", "", load, *ask])
    dtype, quantized = get_path(run.metrics, "loading.dtype"), bool(get_path(run.config, "adapter.quantization"))
    options = [f"dtype={json.dumps(dtype)}"] * bool(dtype) + ["quantization_config=quantization"] * quantized
    read = 'quantization = BitsAndBytesConfig.from_dict(json.load(open(f"{folder}/quantization_config.json")))'
    lines = [
        *["import json", ""] * quantized,
        "from peft import AutoPeftModelForCausalLM",
        f"from transformers import {'BitsAndBytesConfig, ' * quantized}GenerationConfig, pipeline",
        "",
        'folder = "path/to/this/folder"',
        *[read] * quantized,
        f"model = AutoPeftModelForCausalLM.from_pretrained({', '.join(['folder', *options])})",
        "model.generation_config = GenerationConfig.from_pretrained(folder, max_new_tokens=256)  # not the base's",
        'chat = pipeline("text-generation", model, tokenizer=folder)',
    ]
    return "\n".join([*lines, *ask])


def is_adapter(run: RunFiles) -> bool:
    """Whether the run's `model/` is an adapter, which needs its base."""
    return get_path(run.config, "adapter.type") not in (None, "none")


def client_advice(run: RunFiles) -> list[str]:
    """What other tools make of the folder, and what to use instead; measured by tests/modeling/test_clients.py."""
    loading, lines = as_mapping(run.metrics.get("loading")), []
    stop = str(loading.get("stop")).replace("`", "")
    if loading.get("base_stops") is False:
        lines.append(
            f"The base's generation config does not stop at `{stop}`, and PEFT and `pipeline(folder)` use "
            "it: they run on past the answer unless they are given the folder's, as above. A template whose answers "
            "end with the base's own end of text (`model.chat_template=tulu`, `zephyr`) stops everywhere."
        )
    if rows := get_number(loading, "rows"):
        lines.append(
            "The tokenizer has more tokens than the base has embedding rows. `AutoPeftModelForCausalLM` adds them, "
            "`pipeline(folder)` fails, and `PeftModel.from_pretrained(base, folder)` needs "
            f"`base.resize_token_embeddings({rows})` first."
        )
    if is_adapter(run):
        fails = " (fails in `tie_weights` where rows of tokens were trained)" if loading.get("trained_rows") else ""
        lines.append(
            f"`DPOTrainer(folder)` takes no adapter. lm-eval takes `peft=folder,tokenizer=folder`{fails}. Both, "
            "and all servers, take what `python -m sft_recipes.merge RUN --out merged` writes."
        )
    if (run.folder / "model" / TRAINING_TEMPLATE).is_file():
        lines.append(
            "TRL's `assistant_only_loss=True` needs the template with markers: "
            f'`SFTConfig(chat_template_path="path/to/this/folder/{TRAINING_TEMPLATE}", …)`.'
        )
    return lines
