"""The model card: the report as the README.md of `model/`, with the metadata that the hub reads."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sft_recipes.config.nested_values import as_mapping, get_path
from sft_recipes.errors import printable
from sft_recipes.reporting.document import Picture, render_markdown
from sft_recipes.reporting.run_folder import RunFiles, replace_file

ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<\\…])(?:/[^\s/`'\"|<>,\[\]{}]+){2,}")
TRAINING_TEMPLATE = "additional_chat_templates/training.jinja"


def write_model_card(run: RunFiles, values: Mapping[str, Any], pictures: Sequence[Picture]) -> None:
    """Writes the card from the report's values, and copies its pictures, into the run's `model/`, if there is one."""
    folder = run.folder / "model"
    if folder.is_symlink() or not folder.is_dir():  # a link leads out of a folder that others may have made
        return
    if get_path(run.config, "evaluate.answers_in_card") is not True:
        run = replace(run, answers=[], samples=[])
    question = str(run.answers[0].get("prompt", "Hi!")) if run.answers else "Hi!"
    values = {**values, "run": run, "title": run.name, "card": True, "adapter": is_adapter(run)}
    values["question"] = json.dumps(question[:200], ensure_ascii=False)
    values["training_template"] = TRAINING_TEMPLATE if (folder / TRAINING_TEMPLATE).is_file() else None
    # The card is what gets published: a command that names a folder here is left out of it
    values["names_a_path"] = re.search(r"(?<![\w.])/", str(run.metrics.get("command")))
    page = shorten_paths(render_markdown("report.jinja", **values))
    replace_file(folder / "README.md", printable(f"---\n{card_metadata(run).to_yaml()}\n---\n\n{page}"))
    for picture in pictures:
        replace_file(folder / picture.file, (run.folder / picture.file).read_bytes())


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
    sources = [source.get("path") for source in as_mapping(run.config.get("data")).values() if isinstance(source, dict)]
    return ModelCardData(
        base_model=base if is_hub_id(base) else None,
        library_name="peft" if is_adapter(run) else "transformers",
        pipeline_tag="text-generation",
        datasets=[path for path in dict.fromkeys(sources) if is_hub_id(path)] or None,
        tags=["sft", "trl", "sft_recipes", *([kind] if is_adapter(run) else [])],
    )


def is_hub_id(name: Any) -> bool:
    """Whether this is a name on the hub, owner/name, and no folder here.

    >>> is_hub_id("Qwen/Qwen3-0.6B-Base"), is_hub_id("json"), is_hub_id("/home/me/model"), is_hub_id("../models/base")
    (True, False, False, False)
    """
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name))) and not Path(str(name)).exists()


def is_adapter(run: RunFiles) -> bool:
    """Whether the run's `model/` is an adapter, which needs its base."""
    return get_path(run.config, "adapter.type") not in (None, "none")
