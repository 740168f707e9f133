"""The command line as a new user types it: one line for every mistake, where it is, what was found, what to write."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from sft_recipes.config.hydra_plugin import config_folder
from sft_recipes.config.offline import hub_is_reachable, needs_hub
from support.commands import SHORT_ROWS_RUN
from support.configs import data_config
from support.paths import ROOT
from support.processes import Command

HEAVY = ("torch", "transformers", "trl", "datasets", "peft")
RECIPE = "# @package _global_\ndefaults:\n  - override /model: tiny\n  - override /data: tiny\n"


@pytest.fixture
def my_conf(tmp_path):
    """`my_conf("recipe/mine.yaml", text)` is a file in the user's own folder my_conf."""

    def write(name: str, text: str) -> None:
        path = tmp_path / "my_conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return write


def group_folders() -> list[Path]:
    """The folders of our choices and additions; what a user keeps beside them in the checkout is none of them."""
    return [path for root in ("conf", "recipes") for path in ROOT.glob(f"{root}/*/") if any(path.glob("*.yaml"))]


def names(group: str) -> str:
    return ", ".join(
        sorted(file.stem for path in group_folders() if path.name == group for file in path.glob("*.yaml"))
    )


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        # groups and their choices
        ("recipe=lima", "recipe is added to a run. Write +recipe=NAME."),
        ("+recipe=lima debug=smoke", "debug is added to a run. Write +debug=NAME."),
        ("+recipe=nosuch", f"There is no recipe=nosuch. Choices: {names('recipe')}."),
        ("+recipe=limaa", "There is no recipe=limaa. Did you mean lima?"),
        ("+recip=lima", "recip is not a field of the config. Did you mean +recipe?"),
        ("recip=lima", "recip is not a field of the config. Did you mean +recipe?"),
        ("+recipe=lima +debug=smok", "There is no debug=smok. Did you mean smoke?"),
        ("+recipe=", f"There is no recipe=. Choices: {names('recipe')}."),
        ("+recipe=lima +recipe=vicuna", "recipe is chosen twice. Choose one, or sweep over both with -m."),
        ("model=tinny data=tiny", "There is no model=tinny. Did you mean tiny?"),
        ("+recipe=lima adapter=loraa", "There is no adapter=loraa. Did you mean lora?"),
        ("+recipe=lima adapter=null", "There is no adapter=null. Choices: lora, none, qlora."),
        ("+recipe=lima trainer=smal", "There is no trainer=smal. Did you mean small?"),
        ("+recipe=lima formatter=alpacca", "There is no formatter=alpacca. Did you mean alpaca?"),
        ("+recipe=lima data=[lima,dollly]", "There is no data=dollly. Did you mean dolly?"),
        ("model=tinny", "There is no model=tinny. Did you mean tiny?"),
        ("modle=tiny", "modle is not a field of the config. Did you mean model?"),
        ("model=Tiny data=tiny", "There is no model=Tiny. Did you mean tiny?"),
        ("model=tiny date.x=1", "date is not a field of the config. Did you mean data or adapter?"),
        ("-m model=tiny,tinny data=tiny", "There is no model=tinny. Did you mean tiny?"),
        ("-m +recipe=tiny data=[tiny,prose],[tiny,prse]", "There is no data=prse. Did you mean prose?"),
        ("model=tiny data=rows.jsonl",
         "There is no data=rows.jsonl. Write data=file data.file.data_files=rows.jsonl."),
        ("model=a/b data=tiny", "There is no model=a/b. Write model=local model.id=a/b."),
        ("+recipe=mine.yaml", "There is no recipe=mine.yaml. Write mine.yaml alone."),
        ("model=tiny", f"data is not chosen. Write data=NAME. Choices: {names('data')}."),
        # keys at the root
        ("+recipe=lima trainr.learning_rate=1", "trainr is not a field of the config. Did you mean trainer?"),
        ("+recipe=lima +trainr.learning_rate=1", "trainr is not a field of the config. Did you mean trainer?"),
        ("+recipe=lima sed=3", "sed is not a field of the config. Did you mean seed?"),
        ("+recipe=lima learning_rate=1e-5", "learning_rate is not a field of the config. Write trainer.learning_rate."),
        ("+recipe=lima lr=1e-5", "lr is not a field of the config. Write trainer.learning_rate."),
        ("+recipe=lima +epochs=1", "epochs is not a field of the config. Write trainer.num_train_epochs."),
        ("+recipe=lima +seed=1", "seed is in the config already. Write it without the +."),
        ("+recipe=lima ~generates", "generates is not in the config. Leave ~generates out."),
        ("+recipe=lima ~trainer.lr", "trainer.lr is not in the config. Leave ~trainer.lr out."),
        ("+recipe=lima seed.x=1", "There is no seed.x."),
        # what is no key=value
        ("lima", "'lima' has no value. Write +recipe=lima."),
        ("recipe/lima.yaml", "'recipe/lima.yaml' has no value. Write +recipe=lima."),
        ("lora", "'lora' has no value. Write adapter=lora."),
        ("model: tiny", "'model:' has no value. Write model=VALUE."),
        ("my.ymal", "There is no file my.ymal. `python -m sft_recipes init my.yaml` writes one."),
        ("--config-name my.ymal",
         "There is no config my.ymal. A recipe needs no -cn: python -m sft_recipes my.yaml"),
        ("-cn lima", "There is no config lima. A recipe needs no -cn: python -m sft_recipes +recipe=lima"),
        ("data=[tiny, prose]", "data=[tiny, has no closing ]. Put all of it into quotes: 'data=[…]'"),
        ("-m seed=range(1,3", "seed=range(1,3 has no closing ). Put all of it into quotes: 'seed=range(…)'"),
        ("-m seed=rang(1,3)", "seed=rang(1,3) cannot be read: there is no rang(…). Did you mean range?"),
        ("-m hydra.sweep.dri=x", "There is no hydra.sweep.dri. Did you mean hydra.sweep.dir?"),
        ("preview", "'preview' has no value. Write mode=preview."),
        ("prevew my.yaml", "'prevew' has no value. Write mode=preview."),
        ("chta run", "'chta' has no value. Write python -m sft_recipes chat."),
        ("trainer", "'trainer' has no value. Write trainer=VALUE."),
        ("+recipe=lima trainer.learning_rate 1e-5",
         "'trainer.learning_rate' has no value. Write trainer.learning_rate=VALUE."),
        ("+recipe=lima --learning_rate 1e-5",
         "--learning_rate is no option. Keys are written without dashes, as key=value."),
        ("+recipe=lima --cfg job -p trainerr", "-p trainerr is not in the config. Did you mean trainer?"),
        ("+recipe=lima --cfg", "argument --cfg/-c: expected one argument. The options are listed by --hydra-help."),
        ("+recipe=lima trainer.run_name=it's",
         "trainer.run_name=it's cannot be read as key=value. Put the value into quotes inside quotes: "
         """trainer.run_name='"…"'"""),
        ("+recipe=lima seed=1,2", "seed=1,2 is a sweep. Write -m in front, or [ ] around a list."),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_line_on_stderr(command, typed, line):
    assert command(*typed.split(" ")) == (2, "", f"{line}\n")


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        # the config itself
        ("seed=abc", "seed should be a whole number, not 'abc'."),
        ("name=null", "name should be text, not null."),
        ("smoke=yes", "smoke should be true or false, not 'yes'."),
        ("mode=trian", "mode cannot be 'trian'. Did you mean train?"),
        ("model=local", "model.id is missing. Write model.id=…"),
        ("data=file", "data.file.data_files is missing. Write data.file.data_files=…"),
        ("++lr=1", "lr is not a field of the config. Write trainer.learning_rate."),
        ("formatter.name=null", "formatter.name should be the name of a formatter. Write formatter=auto."),
        ("adapter.r=8", "adapter.r is not a field of adapter. Write adapter.lora.r."),
        ("adapter.type=dora", "adapter.type cannot be 'dora'. Write adapter.lora.use_dora=true."),
        ("adapter.type=ia4", "adapter.type cannot be 'ia4'. Did you mean ia3?"),
        ("adapter.lora=null", "adapter.type=lora needs adapter.lora. Write adapter=lora."),
        ("~adapter.lora", "adapter.type=lora needs adapter.lora. Write adapter=lora."),
        ("trainer.max_length=0", "trainer.max_length should be at least 1, not 0."),
        ("evaluate.batch_size=-1", "evaluate.batch_size should be at least 1, not -1."),
        ("adapter.lora.r=0", "adapter.lora.r should be at least 1, not 0."),
        ("trainer.seed=1", "trainer.seed is not used here. Write seed."),
        ("trainer.output_dir=x", "trainer.output_dir is not used here. Write hydra.run.dir."),
        ("trainer.assistant_only_loss=true",
         "trainer.assistant_only_loss is not used here. Write data.NAME.train_on=assistant (or last, or all)."),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_run_is_one_line_before_torch_is_loaded(command, monkeypatch, typed, line):
    monkeypatch.setattr("sft_recipes.__main__.import_module", lambda name: pytest.fail(f"{name} was imported"))
    assert command("+recipe=tiny", typed) == (2, "", f"{line}\n")


@pytest.mark.parametrize("typed", ["data.fil.data_files", "data.file.data_file"])
def test_a_missing_key_is_named_beside_the_mistyped_one(command, typed):
    line = f"data.file.data_files is missing. Write data.file.data_files=…, not {typed}=…\n"
    assert command("data=file", f"{typed}=my.jsonl") == (2, "", line)


def test_a_mistyped_source_is_refused(command):
    code, _, said = command("+recipe=tiny", "data.tny.share=0.3")
    assert (code, said) == (2, "data.tny is no source of this run. Did you mean tiny?\n")


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("trainer.packing=no", "trainer.packing should be true or false, not 'no'."),
        ("trainer.learning_rate=abc", "trainer.learning_rate should be a number, not 'abc'."),
        ("trainer.learning_rate=", "trainer.learning_rate should be a number, not ''."),
        ("trainer.num_train_epochs=[1]", "trainer.num_train_epochs should be a number, not [1]."),
        ("trainer.learning_ratee=1", "trainer.learning_ratee is not a field of SFTConfig. Did you mean learning_rate?"),
        ("trainer.warmup_ratio=0.1", "trainer.warmup_ratio is not a field of SFTConfig. "
         "Write trainer.warmup_steps (a float below 1 is a share of all steps)."),
        ("trainer.max_seq_length=9", "trainer.max_seq_length is not a field of SFTConfig. Write trainer.max_length."),
        ("trainer.evaluation_strategy=no",
         "trainer.evaluation_strategy is not a field of SFTConfig. Write trainer.eval_strategy."),
        ("trainer.group_by_length=true", "trainer.group_by_length is not a field of SFTConfig. "
         "Write trainer.train_sampling_strategy=group_by_length."),
        ("trainer.overwrite_output_dir=true", "trainer.overwrite_output_dir is not a field of SFTConfig. "
         "Write nothing: every run has a folder of its own."),
        ("resume=outputs/x", "resume is not a field of the config. Write python -m sft_recipes resume RUN."),
        ("trainer.torch_dtype=float32", "trainer.torch_dtype is not a field of SFTConfig. Write model.dtype."),
        ("trainer.batch_size=8",
         "trainer.batch_size is not a field of SFTConfig. Write trainer.per_device_train_batch_size."),
        ("trainer.activation_checkpointing=maybe",
         "trainer.activation_checkpointing cannot be 'maybe'. Choices: auto, true or false."),
        ("trainer.per_device_train_batch_size=0.5",
         'trainer.per_device_train_batch_size should be a whole number or "auto", not 0.5.'),
        ("trainer.include_num_input_tokens_seen=al",
         "trainer.include_num_input_tokens_seen cannot be 'al'. Did you mean all?"),
        ("trainer.train_sampling_strategy=grouped",
         "trainer.train_sampling_strategy cannot be 'grouped'. Choices: batch_rebalance, group_by_length, random, sequential."),
        ("trainer.log_level=warn", "trainer.log_level cannot be 'warn'. Did you mean warning?"),
        ("trainer.dataloader_multiprocessing_context=frok",
         "trainer.dataloader_multiprocessing_context cannot be 'frok'. Did you mean fork?"),
        ("trainer.ddp_backend=nccll", "trainer.ddp_backend cannot be 'nccll'. Did you mean nccl?"),
        ("trainer.loss_type=dfft", "trainer.loss_type cannot be 'dfft'. Did you mean dft?"),
        ("trainer.pad_to_multiple_of=atuo", "trainer.pad_to_multiple_of cannot be 'atuo'. Did you mean auto?"),
        ("trainer.eval_strategy=epohc", "trainer.eval_strategy cannot be 'epohc'. Did you mean epoch?"),
        ("trainer.early_stopping_patience=soon", "trainer.early_stopping_patience should be a whole number or null, not 'soon'."),
        ("+trainer.lr_scheduler_kwargs={min_lr_rat: 0.1}", "trainer.lr_scheduler_type=linear: it has no field "
         "min_lr_rat (with a warm-up of 10 of 100 steps). Its fields are none."),
        ("trainer.report_to=nosuch", "trainer.report_to: nosuch is not supported, only "
         f"{', '.join(INTEGRATION_TO_CALLBACK)} are supported."),
        ("adapter.lora.rank=8", "adapter.lora.rank is not a field of LoraConfig. Write adapter.lora.r."),
        ("adapter.lora.r=many", "adapter.lora.r should be a whole number, not 'many'."),
        ("adapter.lora.bias=some", "adapter.lora.bias cannot be 'some'. Choices: all, lora_only, none."),
        ("evaluate.row=3", "evaluate.row is not a field of evaluate. Did you mean rows?"),
        ("evaluate.rows=many", "evaluate.rows should be a whole number or null, not 'many'."),
        ("model.torch_dtype=float32", "model.torch_dtype is not a field of model. Write model.dtype."),
        ("model.idd=x", "model.idd is not a field of model. Did you mean id?"),
        ("model.id=3", "model.id should be text, not 3."),
        ("model.chat_template=chatmll", "model.chat_template=chatmll is no template and no file. Did you mean chatml?"),
        ("data.held_outt=0", "data.held_outt is not a field of data. Did you mean held_out?"),
        ("data.held_out=many", "data.held_out should be a number, not 'many'."),
        ("data.tiny.spilt=train", "data.tiny.spilt is not a field of data.tiny. Did you mean split?"),
        ("data.tiny.share=lots", "data.tiny.share should be a number or null, not 'lots'."),
        ("data_checks.duplicat=drop", "data_checks.duplicat is not a field of data_checks. Did you mean duplicate?"),
        ("data_checks.duplicate=dropp", "data_checks.duplicate cannot be 'dropp'. Did you mean drop?"),
    ],
)  # fmt: skip
def test_a_value_that_a_class_does_not_take_is_one_line_before_data_or_weights_are_loaded(
    command, monkeypatch, typed, line
):
    monkeypatch.setattr("sft_recipes.train.load_model", lambda *_: pytest.fail("the weights were loaded"))
    monkeypatch.setattr("sft_recipes.data.sources.load_dataset", lambda *_, **__: pytest.fail("the data was loaded"))
    code, printed, said = command("+recipe=tiny", typed)
    assert (code, printed, said.splitlines()[-1]) == (2, "", line)
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("typo", f"{RECIPE}trainr:\n  learning_rate: 1\n",
         "trainr is not a field of the config. Did you mean trainer?"),
        ("deep", f"{RECIPE}trainer:\n  learning_ratee: 1\n",
         "trainer.learning_ratee is not a field of SFTConfig. Did you mean learning_rate?"),
        ("switch", f"{RECIPE}trainer:\n  eval_strategy: no\n",
         'trainer.eval_strategy should be "no", "steps", "epoch", not false.'),
        ("dotted", f"{RECIPE}trainer.learning_rate: 1\n",
         "trainer.learning_rate: keys are nested in YAML. Write trainer: {learning_rate: …}."),
        ("indented", f"{RECIPE}trainer:\n  learning_rate: 1\n packing: {{a\n",
         "FOLDER/my_conf/recipe/indented.yaml, line 7: "
         "expected <block end>, but found '<block mapping start>'."),
        ("tab", f"{RECIPE}trainer:\n\tlearning_rate: 1\n",
         "FOLDER/my_conf/recipe/tab.yaml, line 6: found character '\\t' that cannot start any token."),
        ("twice", f"{RECIPE}seed: 1\nseed: 2\n", "FOLDER/my_conf/recipe/twice.yaml, line 6: found duplicate key seed."),
        ("headless", RECIPE.partition("\n")[2],
         "my_conf/recipe/headless.yaml should begin with the line # @package _global_"),
        ("model", RECIPE.replace("/model: tiny", "/model: tinny"), "There is no model=tinny. Did you mean tiny?"),
        ("group", RECIPE.replace("/model", "/modell"), f"model is not chosen. Write model=NAME. Choices: {names('model')}."),
        ("plain", RECIPE.replace("override /", ""),
         "recipe/*.yaml overrides what is chosen. Write - override /data: tiny in its defaults."),
        ("name", f"{RECIPE}name: ${{nam}}\n", "Interpolation key 'nam' not found"),
        ("lima", RECIPE, f"recipe=lima is in two files, {config_folder('recipes')}/recipe/lima.yaml and "
         "my_conf/recipe/lima.yaml. Rename yours."),
    ],
)  # fmt: skip
def test_a_mistake_in_a_recipe_of_ones_own_is_one_line(command, my_conf, tmp_path, name, text, line):
    my_conf(f"recipe/{name}.yaml", text)
    code, printed, said = command("-cd", "my_conf", f"+recipe={name}")
    assert (code, printed, said.splitlines()[-1]) == (2, "", line.replace("FOLDER", str(tmp_path)))
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("recipe/mine.yml", "my_conf/recipe/mine.yml should be my_conf/recipe/mine.yaml."),
        ("mine.yaml", "my_conf/mine.yaml should be my_conf/recipe/mine.yaml."),
        ("recipe/mien.yaml", "There is no recipe=mine. Did you mean mien?"),
    ],
)
def test_a_recipe_that_stands_elsewhere_is_found(command, my_conf, file, line):
    my_conf(file, RECIPE)
    assert command("-cd", "my_conf", "+recipe=mine") == (2, "", f"{line}\n")


def test_a_folder_that_is_not_there_is_one_line(command, tmp_path):
    for recipe in ("tiny", "mine"):  # ours, and one that would be in it
        line = f"-cd {tmp_path}/nosuch is not a folder.\n"
        assert command("-cd", "nosuch", f"+recipe={recipe}") == (2, "", line)


def test_a_recipe_of_ones_own_is_found_beside_ours(command, my_conf):
    my_conf("recipe/mine.yaml", f"{RECIPE}name: mine\n")
    code, printed, _ = command("-cd", "my_conf", "+recipe=mine", "--cfg", "job")
    assert code == 0 and "\nname: mine\n" in printed
    assert ", mine," in command("-cd", "my_conf", "--help")[1]


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["model.id=/nosuch"], "model.id=/nosuch: there is no such folder."),
        (["data.file.data_files=nosuch.jsonl"], "data.file.data_files=nosuch.jsonl: there is no such file."),
        (["data.file.data_files=some.pdf"], "data.file.data_files=some.pdf should end with .json, .jsonl, .csv, "),
        (["data.file.data_files="], "data.file names neither path nor data_files. Write data.file.data_files=rows.jsonl."),
        (["data.file.data_files=parts"], "data.file.data_files=parts is a folder. Write data.file.data_files='parts/*.parquet'."),
        (["data.file.data_files=broken.jsonl"], "data.file row 1 ("),
        (["data.file.data_files=other.csv"], "data.file: no formatter reads the columns frage, antwort. "),
        (["formatter=sharegpt"], "data.file: 4 of 4 rows cannot be used: row 0 ("),
        (["formatter=nosuch.rows"], "formatter=nosuch.rows could not be imported: No module named 'nosuch'."),
        (["formatter=alpaca", "formatter.outputt=x"],
         "formatter.outputt is not a field of alpaca. Did you mean output?"),
        (["objective=nosuch"], "objective=nosuch is not measured in this run. Choices: "),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used_are_one_line(command, tmp_path, typed, line):
    (tmp_path / "some.pdf").write_bytes(b"%PDF-1.4\x00")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "0.parquet").touch()
    (tmp_path / "broken.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": \n')
    (tmp_path / "other.csv").write_text("frage,antwort\na,b\n")
    code, printed, said = command(*SHORT_ROWS_RUN, *typed)
    last = said.splitlines()[-1]
    assert (code, printed, last[: len(line)]) == (2, "", line)
    assert len(last) < 800 and "Traceback" not in said


def test_without_the_hub_a_recipe_says_the_way_out_at_once(tmp_path):
    found = Command(tmp_path, "+recipe=lima", HF_ENDPOINT="https://hub.invalid", HF_HOME=str(tmp_path)).wait()
    last = found.stderr.splitlines()[-1]
    assert (found.returncode, found.stdout) == (2, "")
    assert last.startswith(
        "model.id=HuggingFaceTB/SmolLM2-1.7B is no folder here and could not be downloaded. Check its name, or give a "
        "folder: model=local model.id=path/to/model. ("
    )
    assert "Retrying" not in found.stderr and "Traceback" not in found.stderr


@pytest.mark.parametrize(
    ("model", "path", "wanted"),
    [
        (str(ROOT), "json", False),
        ("org/name", "json", True),
        ("gpt2", "json", True),
        (str(ROOT), None, False),
        (str(ROOT), str(ROOT), False),
        (str(ROOT), "org/name", True),
    ],
)
def test_the_hub_is_asked_for_only_where_a_name_is_one_of_its(model, path, wanted):
    files = {} if path else {"data_files": "rows.jsonl"}
    assert needs_hub(data_config(groups={"model": {"id": model}}, mine={"path": path} | files)) is wanted


def test_the_hub_is_reached_where_its_name_is_known_or_there_is_a_proxy(monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid/mirror")
    asked = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *address: asked.append(address) or [1])
    assert hub_is_reachable() and asked == [("hub.invalid", 443)]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: (_ for _ in ()).throw(OSError))
    assert not hub_is_reachable()
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert hub_is_reachable()


def test_in_a_sweep_a_mistake_stops_one_job_and_its_log_says_why(command, tmp_path):
    code, _, _ = command("-m", *SHORT_ROWS_RUN, "trainer.packing=no,false", "hydra.sweep.dir=sweep")
    assert code == 2
    assert "trainer.packing should be true or false, not 'no'.\n" in (tmp_path / "sweep/0/sft_recipes.log").read_text()
    assert json.loads((tmp_path / "sweep/1/metrics.json").read_text())["steps"] == 1


def test_a_mistake_is_in_the_log_of_its_run(command, tmp_path):
    command("+recipe=tiny", "seed=abc", "hydra.run.dir=run")
    assert (tmp_path / "run/sft_recipes.log").read_text() == "seed should be a whole number, not 'abc'.\n"


def test_an_error_of_our_own_exits_with_1_and_leaves_its_traceback(command, monkeypatch):
    monkeypatch.setattr("sft_recipes.train.main", lambda *_: 1 / 0)
    code, _, said = command("+recipe=tiny")
    assert code == 1 and said.startswith("The run failed.\nTraceback") and said.endswith("division by zero\n")
    assert command("-m", "+recipe=tiny")[0] == 1


def test_control_c_leaves_without_a_traceback(command, tmp_path):
    (tmp_path / "pressed.py").write_text(
        "import os, signal\n\ndef control_c(row):\n    os.kill(os.getpid(), signal.SIGINT)\n    return row\n"
    )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    code, printed, said = command(*SHORT_ROWS_RUN, "formatter=pressed.control_c")
    assert (code, printed, said.splitlines()[-1]) == (130, "", "Interrupted.")
    assert "Traceback" not in said


def test_several_processes_need_one_folder(command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = "torchrun starts several processes: name their folder with hydra.run.dir=outputs/NAME.\n"
    assert command("+recipe=tiny") == (2, "", line)
    swept = line.replace("run.dir=outputs", "sweep.dir=multirun")
    assert command("-m", "+recipe=tiny", "seed=1,2", "hydra.run.dir=run") == (2, "", swept)
    assert command("+recipe=tiny", "hydra.run.dir=run", "seed=abc")[2] == "seed should be a whole number, not 'abc'.\n"


def test_a_mistake_leaves_no_process_group_whose_threads_might_abort_the_process(command, tmp_path):
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    code, _, said = command(*SHORT_ROWS_RUN, "formatter=nothing.like_it")
    assert code == 2 and "nothing" in said and not torch.distributed.is_initialized()


def test_lora_fields_without_lora_are_said_to_be_unused(command, monkeypatch):
    monkeypatch.setattr("sft_recipes.train.main", lambda *_: 0.0)
    line = "adapter=none trains every weight, the fields of adapter.lora are not used. Or write adapter=lora.\n"
    assert command("+recipe=tiny", "adapter=none", "adapter.lora.r=4") == (0, "", line)
    assert command("+recipe=tiny", "adapter.lora.r=4") == (0, "", "")


def test_options_may_stand_between_the_overrides(command):
    code, printed, said = command("+recipe=lima", "--cfg", "job", "seed=7")
    assert (code, said) == (0, "") and "\nseed: 7\n" in printed


def test_a_config_is_shown_with_what_its_values_stand_for(command):
    shown = ("+recipe=lima", "--cfg", "job", "--resolve", "trainer.per_device_eval_batch_size=3")
    code, printed, said = command(*shown)
    config = yaml.safe_load(printed)
    assert (code, said) == (0, "") and config["evaluate"]["batch_size"] == 3  # rows and questions at once
    assert config["provenance"]["values"]["trainer.num_train_epochs"] == 15  # as the paper says
    assert "\n  batch_size: 5\n" in command(*shown, "evaluate.batch_size=5")[1]


def test_without_a_choice_the_tiny_recipe_runs(command):
    assert "\nname: tiny\n" in command("--cfg", "job")[1]
    assert "\nname: tiny\n" in command("--cfg", "job", "seed=7", "+debug=smoke")[1]


def test_help_is_a_screen_that_names_every_group_and_option(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # a narrower terminal has more lines
    code, printed, said = command("--help")
    lines = printed.splitlines()
    assert (code, said) == (0, "")
    listed = sum(names(path.name).count(",") for path in group_folders())
    assert len(lines) <= 32 + listed // 8 and max(map(len, lines)) <= 100
    words = set(printed.replace(",", " ").split())
    assert {file.stem for path in group_folders() for file in path.glob("*.yaml")} <= words
    assert {f"{'' if path.parent.name == 'conf' else '+'}{path.name}=" for path in group_folders()} <= words


@pytest.mark.parametrize("arguments", [["--help"], ["+recipe=lima", "--cfg", "job"], ["+recipe=nosuch"]])
def test_help_and_config_and_typos_do_without_torch(tmp_path, arguments):
    code = "import sys, runpy, atexit; atexit.register(lambda: print('loaded:', *({!r} & sys.modules.keys()))); "
    code += "sys.argv[1:] = {!r}; runpy.run_module('sft_recipes', run_name='__main__', alter_sys=True)"
    found = subprocess.run(
        [sys.executable, "-c", code.format(set(HEAVY), arguments)], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.stdout.splitlines()[-1] == "loaded:"


def test_completion_lists_the_choices(tmp_path):
    found = Command(tmp_path, "-sc", "query=bash", COMP_LINE="sft-recipes model=t").wait()
    assert (found.returncode, found.stdout) == (0, "model=tiny\n")
