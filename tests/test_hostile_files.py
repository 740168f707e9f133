"""Files that somebody made to do harm get one line each, soon and in little memory, from every command that opens them."""

import gzip
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from markdown_it import MarkdownIt
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sft_recipes import chat, load_run, report
from sft_recipes import merge as merging
from sft_recipes.encoding import template_limits
from sft_recipes.encoding.chat_template import TEMPLATES_FOLDER
from sft_recipes.errors import ConfigError, printable
from sft_recipes.modeling.modelfile import merged_model_card
from support.commands import SHORT_ROWS_RUN
from support.paths import ROOT

# Reads each file in 1 GiB and says what it got in how many seconds
READER = """import resource, sys, time
from sft_recipes.data.reading import Fault, read_file
from sft_recipes.errors import DataError
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
for path in sys.argv[1:]:
    started = time.process_time()
    try:
        found = [str(row) for row, _ in read_file(path, path.split(".")[1]) if isinstance(row, Fault)]
    except DataError as error:
        found = [str(error)]
    assert time.process_time() - started < 20, path
    print(path, "; ".join(found))
"""
NESTED = "[" * 5000 + "]" * 5000
ROWS = {
    "deep.json": (f'{{"a": {NESTED}}}\n', "nested too deeply"),
    "less_deep.json": (f'{{"a": {"[" * 400 + "]" * 400}}}\n', "nested deeper than 100 levels"),
    "deep_document.json": (f'[\n{{"a": {NESTED}}}\n]', "nested too deeply"),
    "bomb.json": (b"0" * (1 << 28), "longer than 16,777,216 characters"),
    "bomb_in_quotes.json": (b'[{"a": "' + b"0" * (1 << 28), "longer than 16,777,216 characters"),
    "bomb.csv": (b"0" * (1 << 28), "longer than 16,777,216 characters"),
    "bomb.text": (b"0" * (1 << 28), "longer than 16,777,216 characters"),
    "open_quote.csv": ("a,b\n\"" + "x\n" * (1 << 24), "is a quote opened and not closed?"),
    "row_of_50_megabytes.json": (json.dumps({"instruction": "x" * 50_000_000, "output": "y"}), "longer than 16,777,216"),
    "columns.csv": (",".join(f"c{place}" for place in range(100_000)) + "\n", "100,000 columns are more than the 10,000"),
    "columns.json": (json.dumps(dict.fromkeys(map(str, range(100_000)), 1)), "100,000 fields are more than the 10,000"),
    "deep_half.json": (f'{{"a": {"[" * 400}"\\ud83d"{"]" * 400}}}\n', "nested deeper than 100 levels"),
    "digits.json": (f'{{"a": {"9" * 5000}}}\n{{"a": 1e400}}\n', "is too large"),
}  # fmt: skip


def test_hostile_rows_get_a_line_in_one_gibibyte(tmp_path):
    for name, (content, _) in ROWS.items():
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(gzip.compress(content, 1) if "bomb" in name else content)
    done = subprocess.run(
        [sys.executable, "-c", READER, *ROWS], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert [name for name, (_, line) in ROWS.items() if line not in lines[name] or len(lines[name]) > 600] == []


@pytest.mark.parametrize("streamed", ["true", "false"])
@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"instruction": "a", "output": "x" * 17_000_000}, "17,000,001 characters are more than the 16,777,216 of a row"),
        (dict.fromkeys(map(str, range(10_001)), "x"), "10,001 fields are more than the 10,000 of a row"),
    ],
    ids=["long", "wide"],
)  # fmt: skip
def test_a_row_of_parquet_is_no_larger_than_that_of_a_file(command, tmp_path, row, line, streamed):
    Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    more = [f"data.file.streaming={streamed}", "data.file.data_files=rows.parquet", "mode=preview", "formatter=alpaca"]
    code, _, said = command(*SHORT_ROWS_RUN, *more)
    assert code == 2 and line in said.splitlines()[-1] and len(said.splitlines()[-1]) < 600


def test_a_long_array_on_one_line_is_no_bomb(tmp_path):
    from sft_recipes.data.reading import read_file

    (tmp_path / "a.json").write_text(json.dumps([{"a": "x" * 1000}] * 20_000))
    assert sum(row == {"a": "x" * 1000} for row, _ in read_file(str(tmp_path / "a.json"), "json")) == 20_000


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("text", [BOMB, f"a: {NESTED}", f"a: {'x' * (1 << 21)}", "- 1", "model: 3"])
def test_a_yaml_that_expands_is_no_config(command, tmp_path, text):
    (tmp_path / "my.yaml").write_text(text)
    for folder in ("conf/recipe", "run/.hydra"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "conf" / "recipe" / "theirs.yaml").write_text("# @package _global_\n" + text)
    (tmp_path / "run" / ".hydra" / "config.yaml").write_text(text)
    doors = [["my.yaml", "model=tiny", "data=tiny"], ["-cd", "conf", "+recipe=theirs", "model=tiny", "data=tiny"],
             ["resume", "run"], ["data=tiny", "mode=evaluate", "evaluate.run=run"]]  # fmt: skip
    for door in doors:
        code, _, said = command(*door, "mode=preview") if "run" not in door[-1] else command(*door)
        assert code == 2 and "Traceback" not in said and len(said.splitlines()[-1]) < 600


METRICS = {
    "numbers of 400 digits": {"train_loss": 10**400, "steps": 10**400, "train_seconds": 10**400, "history": [{"step": 10**400, "loss": 10**400}]},
    "infinite numbers": {"train_loss": 1e308, "history": [{"step": 1, "loss": 1e308}, {"step": 2, "loss": -1e308}]},
    "other types": {"history": {"a": 1}, "before": [1], "after": "x", "warnings": 3, "environment": 7},
    "types within": {"history": [{"step": "x", "loss": "y"}, [1]], "after": {"held_out": 3, "lm_eval": [1]}, "weight_change": {"a": "b"}},
    "a list": [1, 2],
}  # fmt: skip
ANSWERS = ['{"prompt": 1, "reference": {"a": []}, "base": null, "tuned": 10}\n', f'{{"prompt": {NESTED}}}\n', "[1]\n", "{}\n",
           '{"prompt": ' + "9" * 5000 + "}\n"]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "answers"), [*((kind, "{}\n") for kind in METRICS), *(("types within", each) for each in ANSWERS)]
)
def test_crafted_metrics_and_answers_get_a_report_or_a_line(tmp_path, kind, answers, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS[kind]))
    (tmp_path / "answers.jsonl").write_text(answers)
    try:
        report.main([str(tmp_path)])
    except SystemExit as left:
        assert left.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    else:
        assert (tmp_path / "report.html").is_file()


class Harm:
    def __reduce__(self):
        return (os.mkdir, ("it_ran",))


@pytest.fixture
def hostile_model(tmp_path, monkeypatch, tokenizer_folder):
    """A run's folder with a tiny Llama's config, a tokenizer and, in the place of weights, a pickle that makes a folder."""
    monkeypatch.chdir(tmp_path)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 300, "hidden_size": 16,
              "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
    (tmp_path / "run").mkdir()
    shutil.copytree(tokenizer_folder("neox"), tmp_path / "run" / "model")
    (tmp_path / "run" / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "run" / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Harm()))
    return tmp_path / "run"


def test_pickled_weights_get_a_line_and_run_nothing(hostile_model, command, capfd):
    for opened in (lambda: load_run(hostile_model), lambda: merging.merge(hostile_model, "out")):
        with pytest.raises(ConfigError, match="it cannot be used|do not hold what a run writes|model:"):
            opened()
    for main, rest in ((chat.main, ["--prompt", "x"]), (merging.main, ["--out", "out"])):
        with pytest.raises(SystemExit) as left:
            main([str(hostile_model), *rest])
        assert left.value.code == 2 and "Traceback" not in capfd.readouterr().err
    code, _, said = command(*SHORT_ROWS_RUN, f"model.id={hostile_model}/model", "model.chat_template=chatml", "trainer.check_memory=false")  # fmt: skip
    assert code == 2 and "Traceback" not in said and not os.path.exists("it_ran")


@pytest.mark.parametrize(
    ("file", "content"),
    [("config.json", f'{{"a": {NESTED}}}'), ("tokenizer.json", f'{{"a": {NESTED}}}'),
     ("config.json", '{"model_type": "llama", "num_hidden_layers": "x"}'),
     ("config.json", f'{{"model_type": "llama", "vocab_size": {"9" * 400}}}')],
    ids=["nested config", "nested tokenizer", "a number that is none", "400 digits"],
)  # fmt: skip
def test_a_model_s_files_that_are_none_get_a_line(hostile_model, command, capfd, file, content):
    (hostile_model / "model" / file).write_text(content)
    for main, rest in ((chat.main, ["--prompt", "x"]), (merging.main, ["--out", "out"])):
        with pytest.raises(SystemExit) as left:
            main([str(hostile_model), *rest])
        assert left.value.code == 2 and "Traceback" not in capfd.readouterr().err
    for mode, codes in (("train", [2]), ("preview", [0, 2])):  # which need not build the model
        code, _, said = command(*SHORT_ROWS_RUN, f"model.id={hostile_model}/model", "model.chat_template=chatml", f"mode={mode}")  # fmt: skip
        assert code in codes and "Traceback" not in said and len(said.splitlines()[-1]) < 600


@pytest.mark.parametrize(
    ("kind", "name", "size"),
    [("llama", "num_hidden_layers", 10**8), ("llama", "hidden_size", 10**9), ("qwen3", "num_hidden_layers", 10**12), ("gpt2", "n_layer", 10**8),
     ("llama", "vocab_size", 10**12)],
)  # fmt: skip
def test_a_config_of_more_layers_or_tokens_than_any_model_has_gets_a_line_soon(
    hostile_model, command, capfd, kind, name, size
):
    file, started = hostile_model / "model" / "config.json", time.process_time()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": kind, name: size}))
    most = {"vocab_size": "10,000,000", "hidden_size": "1,000,000"}.get(name, "1,000")
    line = f"{name} in its config.json is more than {most}, which no model"
    for main, rest in ((chat.main, ["--prompt", "x"]), (merging.main, ["--out", "out"])):
        with pytest.raises(SystemExit) as left:
            main([str(hostile_model), *rest])
        assert left.value.code == 2 and line in capfd.readouterr().err.splitlines()[-1]
    for mode in ("train", "preview", "curate"):
        code, _, said = command(*SHORT_ROWS_RUN, f"model.id={hostile_model}/model", "model.chat_template=chatml", f"mode={mode}")  # fmt: skip
        assert code == 2 and "Traceback" not in said and line in said.splitlines()[-1]
    assert time.process_time() - started < 20


LOOP = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
FULL = "writes more than memory holds|does not end"  # by how busy the machine is
BOMBS = {
    LOOP: "does not end",
    "{{ 9 ** (9 ** (7 + messages | length)) }}": "does not end",
    "{{ 'a' * 10 ** 10 }}": FULL,
    "{{ 'a'.center(10 ** 10) }}": FULL,
    "{% set x = namespace(y='ab') %}{% for a in range(99) %}{% set x.y = x.y ~ x.y %}{% endfor %}": FULL,
    "{% for a in range(99999) %}{{ 'a' * 99999 }}{% endfor %}": FULL,
    "{{ 'a' * 2 ** 25 }}": "writes 33,[0-9,]+ characters for a short conversation|does not end",  # which fits, but not for all rows
}  # fmt: skip


@pytest.fixture
def quick_limits(monkeypatch):
    """A template is given up after half a second."""
    monkeypatch.setattr("sft_recipes.encoding.template_limits.SECONDS", 0.5)


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_template_that_harms_with_some_rows_alone_gets_a_line_that_names_one(command, tmp_path, quick_limits, bomb):
    chatml = (TEMPLATES_FOLDER / "chatml.jinja").read_text()
    (tmp_path / "theirs.jinja").write_text(f"{chatml}{{% if 'xyzzy' in messages | tojson %}}{bomb}{{% endif %}}")
    rows = [{"instruction": f"Say {word}.", "output": "No."} for word in ("a", "b", "xyzzy", "c")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, said = command(*SHORT_ROWS_RUN, "mode=preview", "model.chat_template=theirs.jinja")
    assert (code, len(said.splitlines()[-1]) < 300, "Traceback" in said) == (2, True, False)
    assert re.search(f"model.chat_template ({BOMBS[bomb]})", said) and "line 3" in said


STREAM_BOMBS = {
    LOOP: "does not end",
    "{{ 9 ** (9 ** (7 + messages | length)) }}": "does not end",
    "{{ 'a' * 10 ** 11 }}": "writes more than memory holds",
    "{% for a in range(99999) %}{{ 'a' * 99999 }}{% endfor %}": FULL,
}


@pytest.mark.parametrize("bomb", STREAM_BOMBS)
def test_a_template_that_harms_one_row_of_a_stream_ends_training_with_a_line(
    command, tmp_path, quick_limits, monkeypatch, bomb
):
    for name in ("BUFFER_ROWS", "ENCODE_BATCH_ROWS"):
        monkeypatch.setattr(f"sft_recipes.data.streaming.{name}", 10)
    chatml = (TEMPLATES_FOLDER / "chatml.jinja").read_text()
    (tmp_path / "theirs.jinja").write_text(f"{chatml}{{% if 'xyzzy' in messages | tojson %}}{bomb}{{% endif %}}")
    rows = [{"instruction": f"Say {word}.", "output": "No."} for word in [*range(35), "xyzzy", *range(35, 99)]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, said = command(*SHORT_ROWS_RUN, "data.file.streaming=true", "trainer.max_steps=99",
                            "trainer.per_device_train_batch_size=2", "model.chat_template=theirs.jinja")  # fmt: skip
    last = said.splitlines()[-1]
    assert code == 2 and "Traceback" not in said and len(last) < 300
    assert re.search(f"model.chat_template ({STREAM_BOMBS[bomb]})", last) and "line 36" in last


def test_a_template_that_harms_every_row_is_given_up_by_every_command(hostile_model, command, quick_limits, capfd):
    (hostile_model / "model" / "chat_template.jinja").write_text("{{ 'a' * 10 ** 10 }}")
    own = f"model.id={hostile_model}/model", "model.chat_template=null"
    for mode in ("train", "preview"):
        code, _, said = command(*SHORT_ROWS_RUN, *own, f"mode={mode}")
        assert code == 2 and "model.chat_template writes more than memory holds" in said.splitlines()[-1]
    weights = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(hostile_model / "model"))
    weights.save_pretrained(hostile_model / "model")
    for main, rest in ((chat.main, ["--prompt", "x"]), (merging.main, ["--out", "out"])):
        with pytest.raises(SystemExit) as left:
            main([str(hostile_model), *rest])
        assert left.value.code == 2
        assert "model.chat_template writes more than memory holds" in capfd.readouterr().err.splitlines()[-1]
    code, _, said = command("model=tiny", "data=tiny", "mode=evaluate", f"evaluate.run={hostile_model}", *own)
    assert code == 2 and "model.chat_template writes more than memory holds" in said.splitlines()[-1]


def test_the_limits_hold_for_what_libraries_render_and_leave_the_process_as_it_was(tokenizer_folder, quick_limits):
    before = resource.getrlimit(resource.RLIMIT_DATA), signal.getitimer(signal.ITIMER_VIRTUAL)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder("neox"))
    for template in (LOOP, "{{ 'a' * 10 ** 10 }}"):
        with pytest.raises(ConfigError, match="^model.chat_template "):
            tokenizer.apply_chat_template([{"role": "user", "content": "x"}], chat_template=template)
    assert (resource.getrlimit(resource.RLIMIT_DATA), signal.getitimer(signal.ITIMER_VIRTUAL)) == before
    assert len("a" * 2**31) == 2**31  # more than a template may have


def say(tokenizer, template: str, **settings) -> str:
    asked = [{"role": "user", "content": "x"}]
    return tokenizer.apply_chat_template(asked, chat_template=template, tokenize=False, **settings)


@pytest.fixture
def neox(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder("neox"))


def test_a_process_that_has_grown_is_not_taken_for_its_template(neox, monkeypatch):
    stopped = SimpleNamespace(**vars(time) | {"monotonic": lambda: 0.0})
    monkeypatch.setattr("sft_recipes.encoding.template_limits.time", stopped)  # as if within one moment
    assert say(neox, "{{ 'a' }}") == "a"
    model = np.empty(2**31, dtype=np.uint8)
    assert say(neox, "{{ ('a' * 2 ** 25) | length }}") == f"{2**25}" and len(model)


def test_time_alone_is_limited_where_the_system_does_not_tell_a_process_s_memory(neox, quick_limits, monkeypatch):
    monkeypatch.setattr("sft_recipes.encoding.template_limits.Path", lambda _: Path("/nowhere"))
    template_limits.data_bytes.cache_clear()
    assert say(neox, "{{ 'a' }}") == "a"
    with pytest.raises(ConfigError, match="does not end"):
        say(neox, LOOP)
    template_limits.data_bytes.cache_clear()


def test_a_profiler_s_timer_goes_on_after_a_rendering(neox):
    before = signal.signal(signal.SIGVTALRM, mine := lambda *_: None)
    signal.setitimer(signal.ITIMER_VIRTUAL, 1000, 500)
    try:
        assert say(neox, "{{ 'a' }}") == "a"
        assert signal.getsignal(signal.SIGVTALRM) is mine and signal.getitimer(signal.ITIMER_VIRTUAL)[1] == 500
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def test_a_process_that_was_forked_has_the_limits(neox, quick_limits):
    assert say(neox, "{{ 'a' }}") == "a"  # from here on there is a watchdog, which the new process lacks
    if not (child := os.fork()):
        try:
            say(neox, LOOP)
        except ConfigError:
            os._exit(3)
        finally:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


@pytest.mark.parametrize("large", ["[0] * 2 ** 28", "2 ** 28 * (0, 0)", "'a'.encode() * 2 ** 31", "'a' * 2 ** 31"])
def test_a_product_of_two_gibibytes_is_refused_where_the_system_does_not(large):
    with pytest.raises(MemoryError):  # as a stream's thread renders
        template_limits.LimitedEnvironment().from_string(f"{{{{ ({large}) | length }}}}").render()
    assert template_limits.LimitedEnvironment().from_string("{{ [0] * 3 }}{{ 2 * 'ab' }}").render() == "[0, 0, 0]abab"


def test_a_template_that_grows_outside_the_main_thread_is_stopped_also_where_jinja_passes_over_exceptions(
    quick_limits, monkeypatch
):
    monkeypatch.setattr("sft_recipes.encoding.template_limits.MEMORY_BYTES", 2**24)

    def grow() -> None:
        held = []
        with suppress(Exception):  # as Jinja's optimizer does
            for _ in range(1000):
                held.append(bytes(2**20) + bytes(sum(range(10_000)) % 2))

    with ThreadPoolExecutor(1) as pool, pytest.raises(ConfigError, match="writes more than memory holds"):
        pool.submit(template_limits.TemplateLimits(), grow).result()


def test_a_watchdog_that_ended_is_followed_by_another(quick_limits):
    limits = template_limits.TemplateLimits()
    limits.watchdog = threading.Thread(target=str)  # as one that found no memory to look
    limits.watchdog.start()
    limits.watchdog.join()

    def compute(end: float) -> None:
        while time.thread_time() < end:
            pass

    with pytest.raises(ConfigError, match="does not end"):
        limits(compute, time.thread_time() + 5)


def test_a_long_text_that_the_row_s_settings_or_the_template_hold_is_no_growth(neox):
    assert len(say(neox, "{{ documents[0].text }}", documents=[{"text": "x" * 70_000}])) == 70_000
    assert len(say(neox, "y" * 70_000)) == 70_000


def test_a_preview_shows_no_control_characters(command, tmp_path):
    row = {"instruction": "Say \x1b[31mred\x1b[0m \u202e \x9b.", "output": "No\x07 \x1b[2J \u2066."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    code, printed, _ = command(*SHORT_ROWS_RUN, "mode=preview")
    page = next(tmp_path.rglob("preview.html")).read_text()
    assert code == 0 and "Say �[31mred�[0m � �." in printed and "Say �[31mred�[0m � �." in page
    assert printable(printed) == printed and printable(page) == page


def test_cards_show_no_control_characters_of_a_run_s_config(tmp_path):
    said = "\u202eno\x9b"
    config = {"name": said, "model": {"id": said}, "data": {said: {"path": "json"}}, "adapter": {"type": "none"}}
    for name in ("model", ".hydra"):
        (tmp_path / name).mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text(json.dumps(config))
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "metrics.json").write_text(json.dumps({"after": {"lm_eval": {said: 0.5}}}))
    report.main([str(tmp_path)])
    for page in ((tmp_path / "model" / "README.md").read_text(), merged_model_card(tmp_path)):
        assert "\ufffdno\ufffd" in page and printable(page) == page


def test_the_card_of_a_merged_model_shows_a_run_s_name_as_it_is(tmp_path):
    name = "*mine* <b>_x_</b> [y](https://z) `a`"
    (tmp_path / ".hydra").mkdir()
    config = {"name": name, "model": {"id": None}, "data": {name: {"path": "json"}}}
    (tmp_path / ".hydra" / "config.yaml").write_text(json.dumps(config))
    page = MarkdownIt("commonmark").parse(merged_model_card(tmp_path).partition("\n---\n")[2])
    heading, sentence = [token.children for token in page if token.type == "inline"]
    assert "".join(part.content for part in heading) == name
    assert "".join(part.content for part in sentence) == f"Fine-tuned from a local model on {name} with sft_recipes."
    assert {part.type for part in [*heading, *sentence]} <= {"text", "text_special"}
