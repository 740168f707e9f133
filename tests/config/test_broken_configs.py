"""Any key of a config with any value of any type: a run can be set up with it, or one line says what is wrong."""

import copy
from dataclasses import replace

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sft_recipes.config.hydra_errors import USER_ERRORS, user_message
from sft_recipes.config.hydra_plugin import config_folder, register_with_hydra
from sft_recipes.config.reference import config_schema
from sft_recipes.config.schema import from_hydra
from sft_recipes.training.setup import set_up_run
from support.commands import SHORT_ROWS_RUN
from support.rows import question_rows, write_jsonl


def schema_keys(schema: dict, path: tuple = ()) -> list[tuple]:
    """The way to every key that the schema of a config names."""
    found = [path] if path else []
    for part in [schema, *schema.get("anyOf", [])]:
        for name, inner in part.get("properties", {}).items():
            found += schema_keys(inner, (*path, name))
    return found


KEYS = sorted({("data", "file", *way[2:]) if way[0] == "source" else way for way in schema_keys(config_schema())})
KEYS = [way for way in KEYS if way[0] not in ("hydra", "defaults")]
SOURCE = [
    ("data", "file", name) for name in config_schema()["properties"]["data"]["additionalProperties"]["properties"]
]
# What a class of options cannot do without, in the place of the key that is tried
NEEDED = {
    ("evaluate", "judge"): {"url": "http://localhost:1/v1", "model": "m"},
    ("generate", "endpoint"): {"url": "http://localhost:1/v1", "model": "m"},
    ("curation", "select"): {"rows": 3},
    ("lr_find",): {"start": 1e-5, "end": 1.0},
    ("adapter", "quantization"): {"load_in_4bit": True},
}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
SCALARS |= st.sampled_from(["", "???", "${nope}", "no/such/file", "x" * 5000, "a.b", "os.path", "1e5", 10**30])
NAMES = st.sampled_from(["name", "action", "path", "x", "boilerplate"])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2), max_leaves=3
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The composed config of a run of four rows, and the folder in which they are."""
    where = tmp_path_factory.mktemp("broken")
    write_jsonl(where / "rows.jsonl", question_rows(12))
    GlobalHydra.instance().clear()
    register_with_hydra()
    with initialize_config_dir(str(config_folder("conf")), version_base="1.3"):
        typed = [
            *SHORT_ROWS_RUN,
            "adapter=lora",
            "model.chat_template=chatml",
            f"data.file.data_files={where}/rows.jsonl",
        ]
        return OmegaConf.to_container(compose("config", typed)), where


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(way=st.sampled_from(KEYS + SOURCE), value=VALUES)
def test_a_config_with_any_value_is_set_up_or_refused(base, way, value):
    values, where = copy.deepcopy(base[0]), base[1]
    holder = values
    for place, key in enumerate(way[:-1], 1):
        holder[key] = holder.get(key) or dict(NEEDED.get(way[:place], {}))
        holder = holder[key]
    holder[way[-1]] = value
    try:
        set_up_run(replace(from_hydra(OmegaConf.create(values)), mode="train"), where / "run")
    except USER_ERRORS as error:
        assert "\n" not in user_message(error)
