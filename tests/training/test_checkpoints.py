"""A checkpoint is whole, of this run, and there is room for it, or the line says what is not."""

import contextlib
import json
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl import SFTConfig

from sft_recipes.config.run_folder import own_folder
from sft_recipes.errors import ConfigError
from sft_recipes.training import checkpoints
from sft_recipes.training.checkpoints import check_disk_space, find_resumable, publish_checkpoint, run_differences
from sft_recipes.training.resumable_trainer import EpochSeededSampler, rotate_checkpoints
from support.configs import error_of

RUN = {
    "config": {"seed": 1, "data": {"file": {"data_files": "a.jsonl"}}, "trainer": {"learning_rate": 1e-4, "max_steps": 9}},
    "rows": "abc", "processes": 1, "streamed": False,
}  # fmt: skip
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "progress.json")


@pytest.fixture
def folder(tmp_path):
    """A run's folder with whole checkpoints of the steps 9 and 10."""
    for step in (9, 10):
        staged = tmp_path / "aside" / f"checkpoint-{step}"
        staged.mkdir(parents=True)
        for name in FILES:
            (staged / name).write_bytes(f"{name} of {step}".encode())
        publish_checkpoint(staged, tmp_path, RUN)
    return tmp_path


def changed(**values) -> dict:
    """RUN with other values, those of the config by their dotted keys."""
    run = json.loads(json.dumps(RUN))
    for key, value in values.items():
        group, _, name = key.partition("__")
        run["config"][group] = run["config"][group] | {name: value} if name else value
    return run


def test_the_newest_checkpoint_is_taken_by_its_step(folder):
    assert find_resumable(folder, True, RUN) == folder / "checkpoint-10"
    assert find_resumable(folder, None, RUN) is None


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "short", "zeroed", "one bit turned"])
def test_a_checkpoint_with_a_damaged_file_is_named_and_passed_over(folder, caplog, name, damage):
    file = folder / "checkpoint-10" / name
    content = file.read_bytes()
    turned = content[:-1] + bytes([content[-1] ^ 1])
    damaged = {"short": content[:-2], "zeroed": bytes(len(content)), "one bit turned": turned}
    file.write_bytes(damaged.get(damage, b""))
    if damage == "missing":
        file.unlink()
    assert find_resumable(folder, True, RUN) == folder / "checkpoint-9"
    assert f"{folder / 'checkpoint-10'} is passed over: " in caplog.text and name in caplog.text
    assert "cannot be resumed" in error_of(find_resumable, folder, str(folder / "checkpoint-10"), RUN)


def test_a_checkpoint_of_other_versions_is_resumed_and_those_are_named(folder, caplog, monkeypatch):
    manifest = json.loads((folder / "checkpoint-10" / "manifest.json").read_text())
    monkeypatch.setattr(checkpoints, "stack_versions", lambda: manifest["versions"] | {"torch": "9.9"})
    assert find_resumable(folder, True, RUN) == folder / "checkpoint-10"
    assert caplog.messages[-1].endswith(f"in their last bits: torch 9.9 (was {torch.__version__}).")


def test_an_empty_folder_is_passed_over_and_a_run_without_a_whole_checkpoint_begins_anew(folder, caplog):
    for step in (9, 10):
        shutil.rmtree(folder / f"checkpoint-{step}")
        (folder / f"checkpoint-{step}").mkdir()
    assert find_resumable(folder, True, RUN) is None
    assert caplog.text.count("is passed over") == 2 and "training begins anew" in caplog.text


def test_a_checkpoint_that_is_not_there_is_refused(folder):
    line = error_of(find_resumable, folder, "nowhere", RUN)
    assert line == "trainer.resume_from_checkpoint=nowhere cannot be resumed: there is no such folder."


def test_a_checkpoint_that_is_published_takes_the_place_of_those_that_an_earlier_attempt_has_left(folder):
    staged = folder / "aside" / "checkpoint-9"
    staged.mkdir()
    (staged / "model.safetensors").write_bytes(b"new")
    publish_checkpoint(staged, folder, RUN)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-9"]
    assert (folder / "checkpoint-9" / "model.safetensors").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("most", "best", "left"),
    [(2, None, [3, 4]), (3, None, [2, 3, 4]), (2, 1, [1, 4]), (1, 2, [2, 4]), (2, 4, [3, 4]), (9, 1, [1, 2, 3, 4])],
)
def test_the_newest_checkpoints_are_kept_the_best_in_one_s_place_and_what_the_user_moved_aside(
    tmp_path, most, best, left
):
    for name in (*range(1, 5), "2.bak"):
        (tmp_path / f"checkpoint-{name}").mkdir()
    rotate_checkpoints(tmp_path, most, best and str(tmp_path / f"checkpoint-{best}"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"checkpoint-{name}" for name in (*left, "2.bak"))


@pytest.mark.parametrize(
    ("run", "line"),
    [
        (changed(seed=2), "seed=2 (was 1)"),
        (changed(trainer__learning_rate=2e-4), "trainer.learning_rate=0.0002 (was 0.0001)"),
        (changed(trainer__packing=True), "trainer.packing=true (was null)"),
        (changed(adapter={"type": "lora"}), 'adapter.type="lora" (was null)'),
        (RUN | {"rows": "abd"}, "other training rows"),
        (RUN | {"processes": 4}, "4 processes (was 1)"),
    ],
)
def test_a_resume_as_another_run_is_refused_with_the_difference(folder, run, line):
    assert f"with {line}. Leave that as it was" in error_of(find_resumable, folder, True, run)


@pytest.mark.parametrize(
    "run",
    [
        changed(trainer__max_steps=20),
        changed(trainer__save_steps=3),
        changed(trainer__eval_strategy="no"),
        changed(trainer__logging_steps=1),
        changed(evaluate={"rows": 3}),
        changed(generate={"prompts": "/another/place/of/the/package/making/prompts"}),
        changed(trainer__activation_checkpointing="auto"),
        changed(data={"file": {"data_files": "a.jsonl"}, "cache": True})
        | {"streamed": True},  # as before there was a cache
        changed(data={"file": {"data_files": "moved/a.jsonl"}}),  # with the same rows in it
    ],
)
def test_steps_saving_logging_evaluation_and_the_place_of_the_rows_may_change(folder, run):
    assert run_differences(RUN, run) == []
    assert find_resumable(folder, True, run) == folder / "checkpoint-10"


def test_other_rows_are_told_by_what_reads_them():
    run = changed(data={"file": {"data_files": "b.jsonl"}}) | {"rows": "abd"}
    assert run_differences(RUN, run) == ['data.file.data_files="b.jsonl" (was "a.jsonl")']


def test_a_refused_resume_leaves_the_run_its_own_config(folder):
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text("seed: 2\n")  # as Hydra writes it before we see it
    with pytest.raises(ConfigError):
        find_resumable(folder, True, changed(seed=2))
    assert "seed: 1" in (folder / ".hydra" / "config.yaml").read_text()


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_each_row_is_seen_once_an_epoch_in_an_order_that_seed_and_epoch_decide(rows):
    lengths = [(place * 37) % 50 + 1 for place in range(rows)]
    orders = {}
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        torch.manual_seed(epoch)
        sampler = EpochSeededSampler(4, lengths, seed)
        sampler.set_epoch(epoch)
        orders[seed, epoch] = list(sampler)
        torch.rand(5)  # what training has drawn from the global state has no part in it
        assert list(sampler) == orders[seed, epoch]
        assert Counter(orders[seed, epoch]) == Counter(range(rows))
    if rows > 7:
        assert orders[0, 0] != orders[0, 1] and orders[0, 0] != orders[1, 0]


def test_the_disk_has_to_have_room_for_the_model_and_one_checkpoint_more_than_are_kept(tmp_path, monkeypatch):
    model = torch.nn.Linear(1024, 1024, bias=False)  # 4 MiB, and AdamW's two moments 8
    arguments = SFTConfig(output_dir=str(tmp_path), save_strategy="epoch", save_total_limit=2, use_cpu=True, bf16=False)
    free = {"free": 40 * 2**20}
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(**free))
    check_disk_space(tmp_path, model, arguments)
    free["free"] -= 1
    line = error_of(check_disk_space, tmp_path, model, arguments)
    assert "this run will write 40 MiB: the model, and 3 checkpoints of 12 MiB at once. Make room" in line
    arguments.save_strategy = "no"
    check_disk_space(tmp_path, model, arguments)


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path):
    with (
        own_folder(tmp_path),
        pytest.raises(ConfigError, match=r"is in use by process \d+ on "),
        own_folder(tmp_path),
    ):
        pass
    with own_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


JSON = st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=2)
                    | st.dictionaries(st.sampled_from(["size", "sha256", "config", "rows", "a\0", ""]), inner, max_size=3))  # fmt: skip


@given(st.dictionaries(st.sampled_from(["files", "run", "versions"]), JSON, max_size=3))
def test_whatever_a_manifest_says_is_a_damage_or_another_run_and_no_traceback(tmp_path_factory, manifest):
    folder = tmp_path_factory.mktemp("fuzzed")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "manifest.json").write_text(json.dumps(manifest))
    with contextlib.suppress(ConfigError):
        assert find_resumable(folder, True, RUN) is None
