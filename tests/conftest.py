"""Fixtures of more than one test module; what is no fixture is in tests/support."""

import gc
import json
import logging
import os
import sys
from collections import Counter
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from absl import logging as absl_logging
from hydra.core.global_hydra import GlobalHydra
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

from sft_recipes.__main__ import main
from sft_recipes.config.options import ModelOptions
from sft_recipes.modeling.loading import load_tokenizer
from support.base_tokenizers import base_tokenizer_folder
from support.benchmark_tasks import write_task
from support.commands import run_command
from support.judge_server import serve_judge

# rouge-score brings absl, whose handler keeps the stderr it was imported with, pytest's, and closes it when Hydra sets up
# logging in a test with another one; the process's own it leaves open
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__
collect_ignore = ["support/preloaded.py"]  # for doctests: it is a fork server's alone
# The models are tiny: a second thread only waits for the first, long if the machine is busy. The variable is for notebooks
# and other processes
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["SFT_RECIPES_CACHE"] = ""  # no test depends on what another one measured
# The suite tries the same few examples of a property on every machine; `pytest --hypothesis-profile=search` tries new ones
settings.register_profile("suite", derandomize=True, max_examples=60, deadline=None)
settings.register_profile("search", max_examples=3000, deadline=None)
settings.load_profile("suite")


class ByFileAndFault(LoadFileScheduling):
    """A worker takes the tests of a file together, for their fixtures; those of tests/faults, which take seconds each and
    have a session's fixtures, are handed out one by one behind all others, so that the workers end together."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid if nodeid.startswith("tests/faults/") else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    # a mark `xdist_group` has no effect in pytest 9.2: xdist 3.8 writes it to `_nodeid`, which is no longer read
    return ByFileAndFault(config, log)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.parent.name == "faults")


def pytest_collection_finish():
    """Leaves what is imported by now out of garbage collections: each job of the command begins with one, of 0.3 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_left(tmp_path_factory):
    """Takes away what a test leaves in the process for the next one: what Hydra logs to, and the file that pytest caught
    the text in; levels of logs, the environment, sys.path, modules of a test's own folder, torch's determinism."""
    loggers = [logging.getLogger(name) for name in (None, "transformers")]
    handlers, levels = loggers[0].handlers[:], [each.level for each in loggers]
    environment, paths, modules = dict(os.environ), sys.path[:], set(sys.modules)
    yield
    loggers[0].handlers = [handler for handler in loggers[0].handlers if handler in handlers]
    for each, level in zip(loggers, levels, strict=True):
        each.setLevel(level)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    sys.path[:] = paths
    for name in sys.modules.keys() - modules:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path_factory.getbasetemp())):
            del sys.modules[name]
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """`tokenizer_folder("neox")`: a folder with that base tokenizer."""
    root = tmp_path_factory.mktemp("tokenizers")
    return lambda kind: base_tokenizer_folder(kind, root)


@pytest.fixture(scope="session")
def chat_tokenizer(tokenizer_folder):
    """`chat_tokenizer("neox", "chatml")`: that tokenizer, the marked template, and the new tokens' ids."""
    return cache(lambda kind, template: load_tokenizer(ModelOptions(str(tokenizer_folder(kind)), template)))


@pytest.fixture(scope="session")
def tuned(tmp_path_factory):
    """`tuned("Llama, tied", "LoRA")`: the run of a small model that has learnt one answer, its trainer and its base."""
    from support.tuned import ADAPTERS, make_base, tune

    root = tmp_path_factory.mktemp("tuned")

    @cache
    def make(base: str, adapter: str) -> SimpleNamespace:
        folder, run = make_base(base, root / base), root / f"{base} {adapter}"
        return SimpleNamespace(trainer=tune(folder, ADAPTERS[adapter], run), run=run, base=folder)

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of one run of the embedded model's recipe, two of its eight epochs long, asked a hundred questions."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    code, _ = run_command(folder, "trainer.num_train_epochs=2", "evaluate.rows=100")
    assert code == 0
    return folder


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """`command("+recipe=lima")` is the exit code, stdout and stderr of it, in an empty folder with four alpaca rows."""
    rows = [{"instruction": f"Name {thing}.", "output": f"It is {thing}."} for thing in ("one", "two", "ten", "six")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("HYDRA_FULL_ERROR", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    root = logging.getLogger()
    before = root.handlers[:], root.level

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sft_recipes", *arguments])
        GlobalHydra.instance().clear()
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capfd.readouterr()

    yield run
    root.handlers[:], root.level = before


@pytest.fixture
def tiny_run(tmp_path, monkeypatch):
    """`tiny_run("adapter=none", …)` runs the tiny recipe in an empty folder: exit code, what it printed, the run's folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: (*run_command(tmp_path / "run", "overwrite=true", *arguments), tmp_path / "run")


@pytest.fixture
def task(tmp_path):
    """`task("name", rows, **fields)`: the path of a benchmark's YAML, its rows in a jsonl beside it."""
    return lambda name, rows, **fields: write_task(tmp_path, name, rows, **fields)


@pytest.fixture
def judge_server(monkeypatch):
    """A judge at its `url`, and its `waits`: the seconds that would have been slept."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serve_judge() as judge:
        judge.waits = []
        monkeypatch.setattr("time.sleep", judge.waits.append)
        yield judge


def pytest_terminal_summary(terminalreporter):
    """One line on how many tests were skipped, and why."""
    reports = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in reports)
    listed = "; ".join(f"{number} {reason}" for reason, number in reasons.most_common())
    terminalreporter.write_line(f"Skipped tests: {listed or 'none'}.")
