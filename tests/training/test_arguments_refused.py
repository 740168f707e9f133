"""What an optimizer, a schedule or an option needs is asked before the model loads: each works, or is one line."""

import pytest
from transformers import SchedulerType
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from sft_recipes.errors import ConfigError
from sft_recipes.training.arguments import build_arguments, check_libraries
from support.configs import composed, error_of

SCHEDULES = {"cosine_with_min_lr": "{min_lr: 1e-6}", "warmup_stable_decay": "{num_decay_steps: 1}"}


def build(folder, *overrides: str) -> None:
    """The arguments of a run on the embedded model, on the CPU."""
    build_arguments(composed("+recipe=tiny", "trainer.use_cpu=true", *overrides), folder)


@pytest.mark.parametrize("name", [name.value for name in OptimizerNames])
def test_every_optimizer_of_transformers_works_or_is_one_line(tmp_path, name):
    try:
        build(tmp_path, f"trainer.optim={name}")
    except ConfigError as error:
        assert str(error).startswith(f"trainer.optim={name}: ") and "\n" not in str(error)


@pytest.mark.parametrize("name", ["adamw_torch", "adafactor", "sgd", "adamw_bnb_8bit", "lion_32bit"])
def test_optimizers_that_are_here_are_not_refused(tmp_path, name):
    build(tmp_path, f"trainer.optim={name}")


def test_an_optimizer_without_its_package_names_it(tmp_path):
    line = error_of(build, tmp_path, "trainer.optim=lomo")
    assert line == (
        "trainer.optim=lomo: You need to install `lomo_optim` in order to use LOMO optimizers. Install it with `pip "
        "install lomo-optim`"
    )


@pytest.mark.parametrize("name", [name.value for name in SchedulerType])
def test_every_schedule_works_or_names_the_fields_that_it_needs(tmp_path, name):
    try:
        build(tmp_path, f"trainer.lr_scheduler_type={name}")
    except ConfigError as error:
        assert name in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_that_needs_a_field_is_refused_without_it_and_works_with_it(tmp_path, name):
    line = error_of(build, tmp_path, f"trainer.lr_scheduler_type={name}")
    assert f"trainer.lr_scheduler_type={name}: " in line and "Its fields are trainer.lr_scheduler_kwargs." in line
    build(tmp_path, f"trainer.lr_scheduler_type={name}", f"trainer.lr_scheduler_kwargs={SCHEDULES[name]}")


def test_what_needs_a_gpu_or_a_package_is_refused(tmp_path):
    assert "moves activations from a GPU" in error_of(build, tmp_path, "trainer.activation_offloading=true")
    assert "pip install liger-kernel" in error_of(build, tmp_path, "trainer.use_liger_kernel=true")
    assert "trainer.log_level_replica cannot be 'nope'" in error_of(build, tmp_path, "trainer.log_level_replica=nope")
    line = "trainer.resume_from_checkpoint should be true or false or text or null, not 3."
    assert line in error_of(build, tmp_path, "trainer.resume_from_checkpoint=3")


def test_a_search_for_the_batch_size_is_refused_since_it_starts_again_with_trained_weights(tmp_path):
    assert "trainer.auto_find_batch_size is not used here." in error_of(
        build, tmp_path, "trainer.auto_find_batch_size=true"
    )


@pytest.mark.parametrize("way", ["FSDP", "DEEPSPEED"])
def test_no_trial_step_is_taken_where_accelerate_launch_shards_the_model(tmp_path, monkeypatch, caplog, way):
    """Its environment alone says so. A sharded model is on its GPU only when training starts, and the rows are there."""
    tried = []
    monkeypatch.setattr("sft_recipes.training.arguments.rehearse_step", tried.append)
    monkeypatch.setattr(SFTConfig, "world_size", 2)
    build(tmp_path)
    assert len(tried) == 1
    monkeypatch.setenv(f"ACCELERATE_USE_{way}", "true")
    with caplog.at_level("INFO"):
        check_libraries(tried[0])
    assert len(tried) == 1
    assert "The model is sharded over 2 processes: no trial step is taken, " in caplog.text
