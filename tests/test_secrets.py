"""A secret that is typed is refused or hidden: planted in every door, it is in no file that a run, a sweep or a push leaves."""

import base64
import json
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from sft_recipes import compose
from sft_recipes.errors import ConfigError
from sft_recipes.merge import merge
from sft_recipes.modeling import save_load
from support.commands import SHORT_ROWS_RUN

TOKEN = "hf_" + "PLANTEDtokenPLANTEDtoken"  # in two parts, or scanners of repositories would find one
RUN = [
    *SHORT_ROWS_RUN,
    "data.file.path=json",
    "data.held_out=1",
    "evaluate.rows=1",
    "evaluate.raw_text=null",
    "trainer.report_to=none",
]


def files_with(folder: Path, secret: str) -> list[str]:
    """The files below a folder that hold a text, in any form that a search for it would find."""
    forms = (secret.encode(), base64.b64encode(secret.encode()))
    files = (path for path in folder.rglob("*") if path.is_file())
    return [str(path) for path in files if any(form in path.read_bytes() for form in forms)]


@pytest.mark.parametrize(
    "typed",
    [
        [f"trainer.hub_token={TOKEN}"],
        [f"+trainer.model_init_kwargs={{token: {TOKEN}}}"],
        [f"trainer.run_name={TOKEN}"],
        [f"model.revision={TOKEN}"],
        [f"+hydra.job.env_set.HF_TOKEN={TOKEN}"],
        [f"+hydra.job.env_set.WANDB_API_KEY={TOKEN[3:]}"],
        [f"+data.file.password={TOKEN[3:]}"],
        ["-m", f"trainer.hub_token={TOKEN},null"],
        ["mine.yaml"],
        ["-cd", "conf", "+recipe=theirs"],
        ["-m", "-cd", "conf", "+recipe=theirs,smaller"],
    ],
    ids=lambda typed: typed[-1].partition("=")[0],
)  # fmt: skip
def test_a_typed_secret_is_refused_and_written_nowhere(command, tmp_path, typed):
    (tmp_path / "mine.yaml").write_text(f"trainer: {{hub_token: {TOKEN}}}")
    (tmp_path / "conf" / "recipe").mkdir(parents=True)
    recipe = f"# @package _global_\ntrainer: {{model_init_kwargs: {{api_key: {TOKEN[3:]}}}}}\n"
    (tmp_path / "conf" / "recipe" / "theirs.yaml").write_text(recipe)
    (tmp_path / "conf" / "recipe" / "smaller.yaml").write_text("# @package _global_\nseed: 1\n")
    code, out, said = command(*RUN, *typed)
    assert code and "hf auth login" in said and TOKEN[3:] not in out + said
    for folder in ("outputs", "multirun"):
        assert files_with(tmp_path / folder, TOKEN[3:]) == []


def test_python_refuses_a_secret_as_the_command_does():
    with pytest.raises(ConfigError, match="hf auth login") as raised:
        compose("tiny", trainer={"model_init_kwargs": {"token": TOKEN}})
    assert TOKEN not in str(raised.value)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of rows.jsonl on a server, as one writes it with a login and with a signature."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    yield lambda login, signature: f"http://{login}@127.0.0.1:{http.server_port}/rows.jsonl?sig={signature}"
    http.shutdown()


CALLBACK = """import logging
from transformers import TrainerCallback

class Mine(TrainerCallback):
    def on_train_begin(self, *_, **__):
        logging.getLogger("mine").warning("GET https://me:PLANTED-log@host/a with Bearer PLANTED-bearer-0123")
"""


def test_a_run_a_sweep_and_a_push_leave_no_planted_secret(command, tmp_path, server, monkeypatch):
    planted = ["PLANTED-url", "PLANTED-sig", "PLANTED-environment", "PLANTED-name", "PLANTED-log", "PLANTED-bearer",
               "PLANTED-sweep", "PLANTED-best"]  # fmt: skip
    (tmp_path / "mine.py").write_text(CALLBACK)
    hub = tmp_path / "hub"
    repo = SimpleNamespace(repo_id="me/mine", url="hub")
    monkeypatch.setattr(save_load, "create_repo", lambda *_, **__: repo)
    monkeypatch.setattr(save_load, "whoami", lambda: {})
    monkeypatch.setattr(save_load, "upload_folder", lambda folder_path, **_: shutil.copytree(folder_path, hub))
    monkeypatch.setenv("MY_NAME", "PLANTED-environment")
    typed = [f"data.file.data_files='{server('me:PLANTED-url', 'PLANTED-sig')}'", "callbacks=[mine.Mine]",
             "trainer.run_name='https://me:PLANTED-name@host ${oc.env:MY_NAME}'"]  # fmt: skip
    code, out, said = command(*RUN, *typed, "trainer.push_to_hub=true", "trainer.save_strategy=epoch")
    assert (code, [secret for secret in planted if secret in out + said]) == (0, []), said
    (run,) = (tmp_path / "outputs" / "sft").iterdir()
    merge(run, tmp_path / "outputs" / "merged")
    code, out, said = command("resume", str(run), "trainer.max_steps=2", "trainer.push_to_hub=false")
    assert (code, [secret for secret in planted if secret in out + said]) == (0, []), said
    urls = f"data.file.data_files='{server('me:PLANTED-sweep', 1)}','http://x:PLANTED-best@127.0.0.1:9/a.jsonl'"
    code, out, said = command("-m", *RUN, urls)
    assert (code, [secret for secret in planted if secret in out + said]) == (2, []), said
    left = {path.name for folder in ("outputs", "multirun", "hub") for path in (tmp_path / folder).rglob("*.*")}
    assert {"metrics.json", "supervision.json", "report.md", "report.html", "README.md", "sft_recipes.log", "config.yaml",
            "overrides.yaml", "hydra.yaml", "multirun.yaml", "error.txt", "manifest.json", "trainer_state.json"} <= left  # fmt: skip
    for folder in ("outputs", "multirun", "hub"):
        for secret in planted:
            assert files_with(tmp_path / folder, secret) == []
    assert "${oc.env:MY_NAME}" in json.loads((run / "supervision.json").read_text())["config"]["trainer"]["run_name"]
    assert "HIDDEN@127.0.0.1" in (run / ".hydra" / "config.yaml").read_text()


def test_the_card_has_neither_held_out_rows_nor_paths_of_this_machine_unless_asked(command, tmp_path):
    (tmp_path / "private").mkdir()
    rows = [{"instruction": f"Name {place}.", "output": f"PRIVATE-{place}."} for place in range(4)]
    (tmp_path / "private" / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cards = []
    for asked in ("false", "true"):
        code, _, _ = command(*RUN, f"data.file.data_files={tmp_path}/private/mine.jsonl", "hydra.run.dir=outputs/mine",
                             f"evaluate.answers_in_card={asked}", "overwrite=true", "evaluate.samples_every=1")  # fmt: skip
        assert code == 0
        cards.append((tmp_path / "outputs" / "mine" / "model" / "README.md").read_text())
    assert "PRIVATE-" in cards[1] and "PRIVATE-" not in cards[0] and "Name " not in cards[0]
    assert not any(str(tmp_path) in card for card in cards) and "…/private/mine.jsonl" in cards[0]
    assert "PRIVATE-" in (tmp_path / "outputs" / "mine" / "report.md").read_text()
