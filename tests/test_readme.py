"""README.md stays true: its commands run, its Python runs, its tables are what a run prints."""

import re
import shlex
import subprocess
from importlib import import_module

import pytest
from hydra.core.global_hydra import GlobalHydra
from transformers import AutoTokenizer

from sft_recipes.__main__ import main
from support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
INLINE = re.findall(r"`(python -m sft_recipes[^`\n]*)`", README)
COMMANDS = [line.partition("   #")[0] for block in BLOCKS for line in block.splitlines()] + INLINE
COMMANDS.sort(key=lambda line: bool(re.match(r"python -m sft_recipes\.(chat|merge|report)", line)))  # they need a run
OTHERS = [
    "model=tiny",
    "data.held_out=0",
    "trainer.bf16=false",
    "trainer.max_length=128",
]  # for a recipe whose model is on the hub
SHORT = [
    "trainer.max_steps=2",
    "evaluate.rows=2",
    "evaluate.raw_text=null",
    "trainer.check_memory=false",
]  # what a test adds, to be quick


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of a new user's, with a recipe of his own."""
    mine = tmp_path_factory.mktemp("user")
    (mine / "my_conf" / "recipe").mkdir(parents=True)
    recipe = "# @package _global_\ndefaults:\n  - override /model: tiny\n  - override /data: [tiny]\nname: mine\n"
    (mine / "my_conf" / "recipe" / "mine.yaml").write_text(recipe)
    return mine


def test_the_first_two_commands_are_the_demo_and_the_tests():
    assert [command.strip() for command in COMMANDS[:2]] == ["make demo", "make test"]


def run_here(monkeypatch, arguments: list[str]) -> None:
    """The command in this process; fails where it exits with anything but 0."""
    monkeypatch.setattr("sys.argv", ["sft_recipes", *arguments])
    GlobalHydra.instance().clear()
    try:
        main()
    except SystemExit as stop:
        assert not stop.code


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_every_command_runs(command, folder, monkeypatch):
    monkeypatch.chdir(folder)
    if command.startswith("make"):  # what it would run; running it here would install and test within the test
        done = subprocess.run(["make", "-n", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "python -m" in done.stdout
    elif command.startswith("echo"):
        subprocess.run(command, shell=True, check=True)
    elif command.startswith("python -m sft_recipes resume"):
        finished = next(run for run in sorted((folder / "outputs" / "tiny").iterdir()) if (run / "model").is_dir())
        command = command.replace("outputs/tiny/<date>_<time>", str(finished)) + " trainer.max_steps=3"  # one more
        run_here(monkeypatch, shlex.split(command)[3:])
    elif command.startswith("python -m sft_recipes."):
        runs = sorted((folder / "outputs" / "tiny").glob("*"))
        finished = next((run for run in runs if (run / "metrics.json").is_file()), "none yet")
        sweep = next((folder / "multirun" / "tiny").glob("*"), "none yet")
        for placeholder, found in {"RUN": finished, "multirun/tiny/<date>_<time>": sweep}.items():
            command = command.replace(placeholder, str(found))
        _, _, module, *arguments = shlex.split(command)
        import_module(module).main(arguments)
    else:
        arguments = shlex.split(command)[3:]
        quick = [] if {"--cfg", "--help", "init", "schema"} & set(arguments) else SHORT
        quick = [*quick, *OTHERS] if {"+recipe=single_gpu_24gb", "my.yaml"} & set(arguments) else quick
        quick = [*quick, "trainer.max_steps=10"] if "+sweep=lr_find" in arguments else quick  # its shortest ramp
        run_here(monkeypatch, [*arguments, *quick])


def test_the_notebook_lines_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "rows.jsonl").write_text('{"instruction": "Say hi.", "input": "", "output": "Hi!"}\n')
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    names = {"tokenizer": AutoTokenizer.from_pretrained(ROOT / "sft_recipes" / "tiny" / "model")}
    exec(code, names)
    assert names["rows"][0]["messages"][-1] == {"role": "assistant", "content": "Hi!"}
    assert names["run"].metrics["steps"] == 2
    assert names["collate"]([names["rows"][0]])["labels"].shape[0] == 1


def test_every_choice_that_is_named_is_there():
    listed = dict(re.findall(r"^(?:conf|recipes)/(\w+)/ +(.*?)(?:   .*)?$", README, re.MULTILINE))
    for group, names in listed.items():
        for name in names.replace("…", " ").split():
            assert any((ROOT / root / group / f"{name}.yaml").is_file() for root in ("conf", "recipes")), (group, name)


def test_every_ratio_under_speed_is_one_of_the_results():
    section = re.search(r"^## Speed$(.*?)^## ", README, re.DOTALL | re.MULTILINE)[1]
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    figures = re.findall(r"\d+\.\d+|\d+ %", section)
    assert figures and all(re.search(rf"(?<![\d.]){re.escape(figure)}", results) for figure in figures)


def test_the_mask_shown_is_the_preview_s(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sys.argv", ["sft_recipes", "mode=preview"])
    GlobalHydra.instance().clear()
    main()
    shown = re.search(r"```\n(tokens, with loss.*?)\n```", README, re.DOTALL)[1]
    assert shown in capsys.readouterr().out
