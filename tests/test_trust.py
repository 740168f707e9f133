"""What others made decides nothing: run folders, judge endpoints, links, and texts that a terminal would obey."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest

from sft_recipes import chat, compose, load_run
from sft_recipes import merge as merging
from sft_recipes.config.config_files import ConfigFile
from sft_recipes.config.endpoint_options import JudgeOptions
from sft_recipes.config.options import ModelOptions
from sft_recipes.config.run_folder import create_dated_folder
from sft_recipes.errors import ConfigError, one_line
from sft_recipes.evaluation.benchmarks import check_tasks
from sft_recipes.evaluation.judge import run_judge
from sft_recipes.merge import merge
from sft_recipes.modeling.loading import build_empty_model, load_own_tokenizer
from sft_recipes.reporting.run_folder import write_json
from support.paths import ALL_TESTS, ROOT

CODE = 'open("it_ran", "w")\nfrom transformers import LlamaConfig\nclass Mine(LlamaConfig):\n    model_type = "mine"\n'


@pytest.fixture
def foreign_run(tmp_path, monkeypatch):
    """A run folder of a stranger's: its model brings code, and its own config says that it may run."""
    monkeypatch.chdir(tmp_path)
    (model := tmp_path / "run" / "model").mkdir(parents=True)
    (model / "mine.py").write_text(CODE)
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["mine.Mine", None]}}))
    (tmp_path / "run" / ".hydra").mkdir()
    (tmp_path / "run" / ".hydra" / "config.yaml").write_text("model: {id: x, trust_remote_code: true}\n")
    return tmp_path / "run"


def test_a_run_folder_does_not_decide_that_its_code_runs(foreign_run, capsys):
    for opened in (lambda: load_run(foreign_run), lambda: merge(foreign_run, "out")):
        with pytest.raises(ConfigError, match="brings code of its own.*--trust-remote-code"):
            opened()
    for command in (chat.main, merging.main):
        with pytest.raises(SystemExit) as left:
            command([str(foreign_run), *(["--out", "out"] if command is merging.main else [])])
        assert "--trust-remote-code" in f"{left.value.code} {capsys.readouterr().err}"
    assert not os.path.exists("it_ran")


@pytest.mark.parametrize(
    ("config", "tokenizer"),
    [({"model_type": "t5", "auto_map": {"AutoModelForCausalLM": "mine.Mine"}}, {}),
     ({"model_type": "llama"}, {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}, "tokenizer_class": "Mine"})],
    ids=["model", "tokenizer"],
)  # fmt: skip
def test_code_that_only_the_model_or_the_tokenizer_brings_is_told_alike(foreign_run, config, tokenizer):
    for name, values in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        (foreign_run / "model" / name).write_text(json.dumps(values))
    options = ModelOptions(str(foreign_run / "model"))
    opened = [lambda: load_own_tokenizer(options)] if tokenizer else [lambda: build_empty_model(options)]
    for open_it in (*opened, lambda: load_run(foreign_run), lambda: merge(foreign_run, "out")):
        with pytest.raises(ConfigError, match="brings code of its own.*--trust-remote-code"):
            open_it()
    assert not os.path.exists("it_ran")


def test_evaluating_a_run_from_its_own_config_takes_no_trust_from_there(foreign_run, command):
    code, _, said = command("mode=evaluate", f"evaluate.run={foreign_run}", "data=tiny")
    assert code == 2 and "brings code of its own" in said and not os.path.exists("it_ran")


def test_a_file_beside_the_data_hides_no_library(tmp_path):
    (tmp_path / "yaml.py").write_text("raise SystemExit('imported from the working folder')")
    command = [sys.executable, "-m", "sft_recipes.recipes", "lima"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr


def test_the_opener_s_own_flag_decides(foreign_run):
    with pytest.raises((ConfigError, ValueError, OSError, ImportError, AttributeError)):
        load_run(foreign_run, trust_remote_code=True)  # the folder has no weights
    assert os.path.exists("it_ran")


def test_a_file_is_written_in_the_place_of_a_link_and_not_through_it(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "metrics.json").symlink_to(tmp_path / "mine.txt")
    write_json(tmp_path / "metrics.json", {"a": 1})
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "mine.txt"]


def test_a_folder_of_the_user_s_called_partial_survives_a_merge(tmp_path, foreign_run):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError):
        merge(foreign_run, tmp_path / "out")
    assert (tmp_path / "out.partial" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("out", [".", "/", "run"])
def test_merging_into_a_folder_that_is_there_gets_a_line(foreign_run, out):
    with pytest.raises(ConfigError, match="is there already"):
        merge(foreign_run, out)


def test_the_judge_s_key_follows_no_redirect(monkeypatch):
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # urllib would follow a redirected POST with a GET
            seen.append((self.path, self.headers.get("Authorization")))
            self.send_response(302 if self.path.startswith("/v1") else 200)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/elsewhere")
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("JUDGE_API_KEY", "key-1")
    options = JudgeOptions(f"http://127.0.0.1:{server.server_port}/v1", "m", api_key_env="JUDGE_API_KEY")
    found = run_judge([{"prompt": "q", "base": "a", "tuned": "b"}], options)
    server.shutdown()
    assert "302" in found["error"] and {path for path, _ in seen} == {"/v1/chat/completions"}


def test_a_key_in_the_place_of_its_variable_is_not_printed():
    with pytest.raises(ConfigError) as raised:
        JudgeOptions("http://localhost/v1", "m", api_key_env="sk-SECRET-1")
    assert "SECRET" not in str(raised.value) and "OPENAI_API_KEY" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "host", "goes"),
    [("OPENAI_API_KEY", "api.openai.com", True), ("OPENAI_API_KEY", "evil.example", False), ("AWS_SECRET_ACCESS_KEY", "evil.example", False), ("JUDGE_API_KEY", "evil.example", True), ("OPENAI_API_KEY", "localhost:8000", True), ("OPENAI_API_KEY", "openai.com.evil.example", False)],
)  # fmt: skip
def test_a_variable_s_key_goes_to_the_host_of_its_name(name, host, goes, monkeypatch):
    monkeypatch.setenv(name, "k")
    if not goes:
        with pytest.raises(ConfigError, match=f"would send {name} to {host}"):
            JudgeOptions(f"http://{host}/v1", "m", api_key_env=name)
        monkeypatch.setenv("SFT_RECIPES_JUDGE_KEYS", name)
    JudgeOptions(f"http://{host}/v1", "m", api_key_env=name)


def test_an_error_s_line_moves_no_cursor_and_turns_no_text_around():
    assert one_line(ValueError("a\x1b[2Jb\u202ec\x9bd\udc80e\nf")) == "a\N{REPLACEMENT CHARACTER}[2Jb\N{REPLACEMENT CHARACTER}c\N{REPLACEMENT CHARACTER}d\N{REPLACEMENT CHARACTER}e f"  # fmt: skip


WRITES = "hydra: {callbacks: {mine: {_target_: pathlib.Path.touch, self: it_ran}}}"
RECIPES = {
    "a callback": WRITES,
    "a log handler": "hydra: {job_logging: {handlers: {mine: {class: logging.FileHandler, filename: it_ran}}}}",
    "a handler of Hydra's own log": "hydra: {hydra_logging: {handlers: {mine: {class: logging.FileHandler, filename: it_ran}}}}",
    "a search path": "hydra: {searchpath: [file:///tmp]}",
    "the environment": "hydra: {job: {env_set: {HF_ENDPOINT: 'http://evil.example'}}}",
    "a folder elsewhere": "hydra: {run: {dir: ../it_ran}}",
    "a launcher's commands": "hydra: {launcher: {setup: [touch it_ran]}}",
    "a target elsewhere": "data: {tiny: {formatter: {_target_: os.remove}}}",
    "a target made of text": "hydra: {sweeper: {sampler: '${oc.decode:x}'}}",
    "a benchmark's file": "evaluate: {lm_eval: [mmlu, theirs.yaml]}",
    "a benchmark's file named elsewhere": "evaluate: '${model}'",
    "a file for its callbacks": "defaults: [{override /hydra/callbacks: mine}]",
}


DOORS = ["my.yaml", "-cd", "-m", "compose"]
TRIED = [(recipe, door) for recipe in RECIPES for door in (DOORS if ALL_TESTS or recipe == "a callback" else DOORS[:1])]


@pytest.mark.parametrize(("recipe", "door"), TRIED)
def test_a_recipe_sets_values_and_runs_no_code(command, tmp_path, recipe, door):
    start = "# @package _global_\n" if "target" in recipe or "callback" in recipe else ""
    for folder in ("conf/recipe", "conf/hydra/callbacks"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "conf" / "hydra" / "callbacks" / "mine.yaml").write_text(
        "mine: {_target_: pathlib.Path.touch, self: it_ran}"
    )
    (tmp_path / "my.yaml").write_text(start + RECIPES[recipe])
    (tmp_path / "conf" / "recipe" / "theirs.yaml").write_text("# @package _global_\n" + RECIPES[recipe])
    (tmp_path / "conf" / "recipe" / "other.yaml").write_text("# @package _global_\nseed: 1\n")
    rest = ["model=tiny", "data=tiny", "mode=preview"]
    if door == "compose":
        with pytest.raises(ConfigError, match="There is no hydra/callbacks" if "file" in recipe else "--trust-recipe"):
            compose("my.yaml", *rest)  # which looks into no folder of the user's
        return
    given = {"my.yaml": ["-cd", "conf", "my.yaml"], "-cd": ["-cd", "conf", "+recipe=theirs"], "-m": ["-m", "-cd", "conf", "+recipe=other,theirs"]}  # fmt: skip
    code, _, said = command(*given[door], *rest)
    assert code == 2 and "--trust-recipe" in said and len(said.splitlines()) == 1
    assert not (tmp_path / "it_ran").exists() and not (tmp_path / "outputs").exists()


def test_a_folder_whose_name_begins_as_ours_is_the_user_s():
    file = ConfigFile("recipe/mine", "", {}, f"file://{ROOT}/recipes", "")
    assert [file._replace(origin=file.origin + more).is_users_own() for more in ("", "_of_mine")] == [False, True]


def test_whoever_trusts_a_recipe_gets_its_log_handler(command, tmp_path, monkeypatch):
    monkeypatch.setattr("sft_recipes.preview.main", lambda *_: 0.0)
    (tmp_path / "my.yaml").write_text(
        "hydra: {job_logging: {handlers: {mine: {class: logging.FileHandler, filename: it_ran}}}}"
    )
    code, _, _ = command("my.yaml", "model=tiny", "data=tiny", "mode=preview", "--trust-recipe")
    assert code == 0 and (tmp_path / "it_ran").exists()


def test_a_run_s_folder_brings_no_callback(command, tmp_path):
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    (tmp_path / "run" / ".hydra" / "config.yaml").write_text(f"name: x\ntrainer: {{}}\n{WRITES}")
    for given in (["resume", "run"], ["mode=evaluate", "evaluate.run=run"]):
        code, _, _ = command(*given)
        assert code and not (tmp_path / "it_ran").exists()


TASK = """task: theirs
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: !function harm.question
doc_to_choice: [a, b]
doc_to_target: 0
"""


def test_a_benchmark_s_file_runs_code_where_its_user_types_it_and_never_in_a_preview(command, tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "harm.py").write_text("open('it_ran', 'w')\ndef question(row):\n    return 'x'\n")
    (tmp_path / "theirs.yaml").write_text(TASK)
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    (tmp_path / "my.yaml").write_text("evaluate: {lm_eval: [theirs.yaml]}\n")
    (tmp_path / "run" / ".hydra" / "config.yaml").write_text(
        "model: {id: x}\ntrainer: {}\nadapter: {}\ndata: {}\nevaluate: {lm_eval: [theirs.yaml]}\n"
    )
    for given in (["resume", "run"], ["mode=evaluate", "evaluate.run=run"], ["my.yaml", "model=tiny", "data=tiny"]):
        code, _, said = command(*given)
        assert code == 2 and "evaluate.lm_eval" in said.splitlines()[-1] and not (tmp_path / "it_ran").exists()
    typed = "model=tiny", "data=tiny", "evaluate.lm_eval=[theirs.yaml]"
    assert command(*typed, "mode=preview")[0] == 0 and not (tmp_path / "it_ran").exists()
    code, _, said = command(*typed[:2], "evaluate.lm_eval=[their.yaml]", "mode=preview")
    assert code == 2 and said.splitlines()[-1] == "evaluate.lm_eval=their.yaml: there is no such file."
    check_tasks(["theirs.yaml"])
    assert (tmp_path / "it_ran").exists()


def test_python_s_own_functions_are_no_formatters(command, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"touch it_ran": 1}\n')  # which a shell would be given
    code, _, said = command("model=tiny", "data=file", "data.file.data_files=rows.jsonl", "mode=preview",
                            "formatter=subprocess.getoutput")  # fmt: skip
    assert code == 2 and "subprocess.getoutput is of Python itself" in said and not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".", "a\nb", "/tmp/x"])
def test_a_run_s_name_leads_nowhere_else(command, tmp_path, name):
    (tmp_path / "my.yaml").write_text(json.dumps({"name": name}))
    code, _, said = command("my.yaml", "model=tiny", "data=tiny", "mode=preview")
    assert code == 2 and "the name of one folder" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my.yaml", "rows.jsonl"]
    with pytest.raises(ConfigError, match="the name of one folder"):
        compose("tiny", name=name)


def test_two_runs_of_one_second_have_two_folders(tmp_path):
    dated = tmp_path / "outputs" / "sft" / "2026-01-01_00-00-00"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(create_dated_folder, [dated] * 8))
    assert len(set(made)) == 8 and dated in made and dated.with_name(f"{dated.name}_8") in made


def test_commands_of_one_second_have_two_folders(command, tmp_path, monkeypatch):
    monkeypatch.setattr("hydra.core.utils.datetime", SimpleNamespace(now=lambda: datetime(1970, 1, 1)))
    monkeypatch.setattr("sft_recipes.preview.main", lambda _, folder: (folder / "preview.html").touch() or 0.0)
    for _ in range(2):
        assert command("model=tiny", "data=tiny", "mode=preview")[0] == 0
        assert command("-m", "model=tiny", "data=tiny", "mode=preview", "seed=1,2")[0] == 0
    for kind, file in (("outputs", "preview.html"), ("multirun", "1/preview.html")):
        for folder in ("1970-01-01_00-00-00", "1970-01-01_00-00-00_2"):
            assert (tmp_path / kind / "sft" / folder / file).is_file()
