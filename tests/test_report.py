"""The report is made from a run's files alone, and two runs can be compared."""

import html
import json
import re
import subprocess
import sys
from functools import partial

import pytest

from sft_recipes.report import main
from sft_recipes.reporting.provenance import TRAINER_DEFAULTS
from sft_recipes.reporting.run_report import audit_table, compare_runs, write_report
from sft_recipes.reporting.text import display_width


def make(root, name: str, digest: str = "aa", chunks: tuple = (), **config):
    """A run's folder with what a training wrote before there was more to measure."""
    folder = root / "tiny" / name
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text("seed: 42\n")
    measured = {"exact_match": 0.0, "stops": 0.25, "raw_text": {"loss": 2.0}}
    metrics = {
        "train_loss": 0.5, "eval_loss": 0.25, "steps": 7, "train_seconds": 3.0, "trainable_parameters": 1000,
        "peak_memory_gib": 0.5, "exact_match": 1.0, "stops": 1.0, "raw_text_loss": 2.1,
        "before": measured, "after": {"exact_match": 1.0, "stops": 1.0, "raw_text": {"loss": 2.1}},
        "history": [{"loss": 0.5, "learning_rate": 1e-3, "step": 7, "epoch": 1.0}],
    }  # fmt: skip
    part = {"rows": 10, "held_out": 2, "kept": 9, "tokens": 90, "supervised_tokens": 30}
    part["problems"] = {"duplicate": {"rows": 1, "policy": "drop", "first": [3]}}
    supervision = {
        "digest": {"sha256": digest, "rows": 9, "chunk": 1000, "chunks": list(chunks)}, "sources": {"tiny": part},
        "versions": {"trl": "1.16.0"}, "config": config,
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "supervision.json").write_text(json.dumps(supervision))
    answer = {"prompt": "Hi?\nHm", "base": "a|b", "tuned": "Hello.", "reference": "Hello.", "stops": True}
    (folder / "answers.jsonl").write_text(json.dumps(answer) + "\n")
    return folder


@pytest.fixture
def run(tmp_path):
    """`run("a", lr=1)`: a run's folder."""
    return partial(make, tmp_path)


def test_the_table_shows_base_and_tuned_side_by_side(run):
    assert write_report(run("a")).splitlines() == [
        "|                  | base  | tuned         |",
        "| ---------------- | ----- | ------------- |",
        "| exact match      | 0.0%  | 100.0%        |",
        "| stops by itself  | 25.0% | 100.0%        |",
        "| held-out loss    |       | 0.250         |",
        "| loss on raw text | 2.000 | 2.100 (+5.0%) |",
        "| training loss    |       | 0.500         |",
        "",
        "| question | base | tuned  |",
        "| -------- | ---- | ------ |",
        "| Hi?⏎Hm   | a\\|b | Hello. |",
    ]


def test_report_md_has_supervision_training_and_config(run):
    folder = run("a")
    write_report(folder)
    page = (folder / "report.md").read_text()
    assert "| tiny   | 10   | 2        | 9    | 90     | 30        |" in page
    assert "| tiny   | duplicate | 1       | drop   |" in page
    assert (
        "7 steps in 3.0 s, 1,000 trained parameters, 0.500 mean training loss, 0.250 held-out loss at the end." in page
    )
    assert "seed: 42" in page


def test_two_runs_on_the_same_tokens_are_said_to_be(run):
    assert compare_runs(run("a"), run("b")) == "Both trained on the same tokens, labels and packing: 9 rows, aa."


def test_two_runs_on_other_tokens_are_told_apart(run):
    first = run("a", "aa", ("1", "2"), data={"held_out": 0.1})
    second = run("b", "bb", ("1", "3"), data={"held_out": 0.2})
    assert compare_runs(first, second).splitlines() == [
        "They trained on different tokens: 9 and 9 rows, which part between row 1,000 and 2,000 of the training order.",
        "config.data.held_out: 0.1 and 0.2",
    ]


@pytest.fixture
def refused(capsys):
    """`refused(folder, …)` is the only line that `report` has for these arguments; it exits with 2."""

    def run(*arguments) -> str:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        printed, line = capsys.readouterr()
        assert (stop.value.code, printed, line.count("\n")) == (2, "", 1)
        return line

    return run


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({}, "it has no metrics.json"),
        ({".hydra/config.yaml": "seed: 1"}, "the run has not finished"),
        ({"error.txt": "Out of memory.\n"}, "it failed: Out of memory."),
        ({"metrics.json": '{"steps": 1'}, "cannot be read as JSON"),
        ({"metrics.json": "[1]"}, "should hold an object, not list"),
        ({"metrics.json": "{}", "answers.jsonl": "{}\n3\n"}, "answers.jsonl should hold an object a line."),
        ({"metrics.json": "{}", ".hydra/config.yaml": "a: [1"}, "config.yaml, line 1: expected"),
        ({"metrics.json": '{"history": 3}'}, "do not hold what a run writes"),
    ],
)
def test_a_folder_that_is_no_finished_run_gets_a_line(tmp_path, refused, files, line):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert line in refused(tmp_path)


def test_two_folders_of_which_one_is_no_run_get_a_line(run, refused, tmp_path):
    assert "it has no digest in supervision.json" in refused(run("a"), tmp_path)


def test_three_folders_are_one_too_many(refused, tmp_path):
    assert refused(tmp_path, tmp_path, tmp_path) == "One folder is reported, two are compared; more are not.\n"


def test_a_sweep_s_job_whose_file_is_cut_off_gets_a_line(refused, tmp_path):
    (tmp_path / "0" / ".hydra").mkdir(parents=True)
    (tmp_path / "0" / ".hydra" / "overrides.yaml").write_text("- seed=1")
    (tmp_path / "0" / "metrics.json").write_text('{"train_loss": ')
    assert "0/metrics.json cannot be read as JSON" in refused(tmp_path)


def test_a_run_that_left_metrics_alone_has_a_report(tmp_path):
    (tmp_path / "metrics.json").write_text('{"train_loss": 0.5}')
    assert write_report(tmp_path).splitlines() == [
        "|               | tuned |",
        "| ------------- | ----- |",
        "| training loss | 0.500 |",
    ]
    assert "0.500" in (tmp_path / "report.html").read_text()


def test_the_report_is_made_without_torch(run):
    script = """
import sys
from sft_recipes.report import main
main([sys.argv[1]])
print([name for name in ("torch", "transformers", "trl", "datasets") if name in sys.modules])
"""
    folder = full(run("a"))
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def full(folder):
    """The run's folder with everything that a training and its evaluation can leave."""

    def measured(share, loss):  # no two measures alike, so that none can stand in another's place
        answered = {"exact_match": share, "rouge_l": share + 0.01, "chrf": share + 0.02, "stops": share + 0.03}
        return answered | {
            "rows": 8, "short": answered | {"rows": 4}, "long": answered | {"rows": 4},
            "sampled": answered | {"temperature": 0.7, "top_p": 0.9},
            "held_out": {
                "loss": loss, "p_stop": share + 0.04, "rows": 8, "tokens": 99, "source": {"my.rows": loss + 1},
                "turn": {"first": loss + 2, "later": loss + 3}, "position": {"stop": loss + 4, "other": loss + 5},
                "length": {"8 to 24 tokens": loss + 6},
            },
            "raw_text": {"loss": loss, "bits_per_byte": loss / 2, "tokens": 10, "bytes": 20, "source": "prose.jsonl"},
            "lm_eval": {"mmlu": share + 0.05},
        }  # fmt: skip

    metrics = json.loads((folder / "metrics.json").read_text()) | {
        "name": "mine", "command": "python -m sft_recipes +recipe=tiny seed=1", "started": "2026-11-21T10:00:00+00:00",
        "environment": {"python": "3.11.9", "gpu": None, "processes": 2, "commit": "53f5a44"}, "parameters": 4000,
        "train_tokens": 51234, "tokens_per_second": 4000.0, "mfu": 0.41, "train_seconds": 7200.0,
        "before": measured(0.25, 2.0), "after": measured(0.75, 2.25),
        "exact_match": 0.75, "rouge_l": 0.76, "chrf": 0.77, "stops": 0.78, "p_stop": 0.79, "eval_loss": 2.25,
        "raw_text_loss": 2.25, "bits_per_byte": 1.125,
        "forgetting": {"change": 0.125, "verdict": "warning", "warn_above": 0.1, "fail_above": 0.15},
        "benchmarks": {"worst": -3.5, "verdict": "warning"},
        "weight_change": {"embeddings": 0.0, "layer 0 attention": 0.01, "layer 0 mlp": 0.02},
        "judge": {"rows": 20, "wins": 12, "ties": 3, "losses": 5, "model": "some-judge"},
        "warnings": ["Held-out loss is above its best in step 40."],
    }  # fmt: skip
    metrics["history"].append({"step": 7, "epoch": 1.0, "eval_loss": 0.25, "eval_p_stop": 0.9})
    config = {
        "name": "mine", "model": {"id": "Qwen/Qwen3-0.6B-Base", "chat_template": "chatml"}, "adapter": {"type": "none"},
        "data": {"lima": {"path": "GAIR/lima", "formatter": "sharegpt"}, "held_out": 0.02},
        "trainer": {"learning_rate": 2e-5, "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "num_train_epochs": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 8, "max_length": 2048},
        "provenance": {
            "source": "arXiv 2305.11206",
            "values": {"trainer.learning_rate": "2e-5", "effective_batch_size": 64, "trainer.num_train_epochs": 15, "trainer.weight_decay": 0.1, "model.id": "LLaMA-65B"},
            "departures": {"model.id": "not on the hub", "mask": "the paper does not state it"},
            "unknown": ["the batch size"],
        },
    }  # fmt: skip
    supervision = json.loads((folder / "supervision.json").read_text()) | {"config": config, "parity": 96}
    supervision["sources"]["lima"] = supervision["sources"].pop("tiny") | {"fingerprint": "f" * 64}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "supervision.json").write_text(json.dumps(supervision | {"padding": 0.16}))
    (folder / ".hydra" / "overrides.yaml").write_text("- +recipe=lima\n- seed=1\n")
    steps = [{"step": step, "prompt": "Hi?", "text": f"said in {step}", "stops": step > 0} for step in (0, 7)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (folder / "model").mkdir()
    return folder


@pytest.fixture(params=["report.md", "report.html"], scope="module")
def page(tmp_path_factory, request):
    """A full run's report, as Markdown and as HTML, without tags and cells' padding."""
    folder = full(make(tmp_path_factory.mktemp("run"), "a"))
    write_report(folder)
    text = re.sub("</?code>", "", (folder / request.param).read_text())
    text = re.sub(r"\s*\|\s*|<[^>]*>", " ", text).replace("`", "").replace("\u00a0", " ")
    return re.sub(r" +", " ", html.unescape(text))


@pytest.mark.parametrize(
    "said",
    [
        "Model: Qwen/Qwen3-0.6B-Base, full fine-tuning, 25.00% of 4,000 parameters; chat template chatml.",
        "Training: learning rate 2e-05, cosine schedule, warmup over 3% of the steps; 3 epochs; "
        "effective batch of 64 rows; rows of at most 2,048 tokens, not packed.",  # 4 × 8 in 2 processes
        "Recipe: +recipe=lima; overrides: seed=1.",
        "Training and inference prompts match, by the saved tokenizer's own template (96 rows checked).",
        "lima GAIR/lima sharegpt ffffffffffffffff",
        "Source: arXiv 2305.11206",
        "effective_batch_size 64 64 ",  # 4 × 8 in 2 processes
        "tokens per step, at most 131,072 ",  # 64 × 2048
        "trainer.num_train_epochs 15 3 departs, without a reason given",
        "trainer.weight_decay 0.1 not in the config",
        "model.id LLaMA-65B Qwen/Qwen3-0.6B-Base departs: not on the hub",
        "mask departs: the paper does not state it",
        "lima duplicate 1 drop",
        "16.0% of the tokens that the model reads are padding.",
        "exact_match 0.2500 0.7500",
        "short.rouge_l 0.2600 0.7600",
        "long.rows 4 4",
        "sampled.chrf 0.2700 0.7700",
        "sampled.top_p 0.9000 0.9000",
        "held_out.loss 2.0000 2.2500",
        "held_out.source.my.rows 3.0000 3.2500",
        "held_out.turn.later 5.0000 5.2500",
        "held_out.position.stop 6.0000 6.2500",
        "held_out.length.8 to 24 tokens 8.0000 8.2500",
        "Verdict: warning. The loss on raw text changed by +12.5%. Above +10% is a warning, above +15% a failure.",
        "A lower learning rate than 2e-05: trainer.learning_rate=6e-06",
        "Raw text beside the rows, 1 % of all tokens or more: 'data=[lima,prose]' mix.raw_text=0.01",
        "Not said by the source:",
        "the batch size",
        "mmlu 30.0% 80.0% +50.0",
        "wins 12",
        "most in layer 0 mlp, 2.00%",
        "7 said in 7",
        "training time 2.0 h",
        "tokens per second 4,000",
        "model FLOPs utilization (MFU) 41.0%",
        "commit 53f5a44",
        "trl 1.16.0",
        "python -m sft_recipes +recipe=tiny seed=1",
        "seed: 42",
        "Held-out loss is above its best in step 40.",
    ],
)
def test_the_report_says(page, said):
    assert said in page


NASTY = "<script>alert(1)</script> & `x` <img src=x onerror=y>"


def test_whatever_stands_in_a_run_s_files_is_text_on_its_pages(run):
    folder = full(run("a"))
    for path in ("model.id", "model.chat_template", "adapter.type", "data.lima.path", "data.lima.formatter",
                 "provenance.source", "evaluate.raw_text", "trainer.lr_scheduler_type"):  # fmt: skip
        change(folder, "supervision.json", f"config.{path}", NASTY)
    change(folder, "supervision.json", "config.provenance.unknown", [NASTY])
    change(folder, "supervision.json", "versions", {NASTY: NASTY})
    change(folder, "supervision.json", "digest.sha256", NASTY)
    change(folder, "metrics.json", "warnings", [NASTY])
    for path in (
        "command",
        "forgetting.verdict",
        "benchmarks.verdict",
        "judge.model",
        "environment.gpu",
        "after.mine.x",
    ):
        change(folder, "metrics.json", path, NASTY)
    change(folder, "metrics.json", "weight_change", {NASTY: 0.5})
    (folder / "answers.jsonl").write_text(json.dumps({"prompt": NASTY, "base": NASTY, "tuned": NASTY}) + "\n")
    (folder / "samples.jsonl").write_text(json.dumps({"prompt": NASTY, "text": NASTY, "step": 1}) + "\n")
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps([f"+{NASTY}", NASTY]))
    (folder / ".hydra" / "config.yaml").write_text(json.dumps(NASTY) + ": 1")
    markdown(folder)
    page = (folder / "report.html").read_text()
    assert "<script" not in page and "<img" not in page and "&lt;script&gt;alert(1)" in page
    assert "&amp;lt;" not in page and "&amp;amp;" not in page  # nor is anything escaped twice


def test_a_benchmark_stands_in_one_table(page):
    assert page.count("mmlu") == 1


def test_an_equal_value_is_no_departure(page):
    assert re.search(r"trainer.learning_rate 2e-5 2e-05\s+[^d]", page)


def test_the_price_of_an_hour_gives_the_price_of_the_run(run, capsys):
    folder = full(run("a"))
    main([str(folder), "--price-per-hour", "2.5"])  # two hours
    assert re.search(r"\| price of the training, at 2.5 an hour \| 5.00 +\|", (folder / "report.md").read_text())


@pytest.mark.parametrize("price", ["-1", "nan", "inf"])
def test_a_price_that_is_none_is_refused(run, capsys, price):
    with pytest.raises(SystemExit):
        main([str(full(run("a"))), "--price-per-hour", price])
    assert f"--price-per-hour should be a number of at least 0, not {float(price)}" in capsys.readouterr().err


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_s_table_fits_and_uses_the_width(run, monkeypatch, width):
    folder = full(run("a"))
    answers = [{"prompt": "日本語 " * 40, "base": "word " * 40, "tuned": "a|b " * 40}] * 5
    (folder / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    monkeypatch.setenv("COLUMNS", str(width))
    widths = [display_width(line) for line in write_report(folder).splitlines()]
    assert width - 3 < max(widths) <= width


def test_the_terminal_names_warnings_verdicts_and_advice_below_the_table(run):
    below = write_report(full(run("a"))).split("\n\n")[1:-1]
    assert [" ".join(part.split()) for part in below] == [
        "Held-out loss is above its best in step 40.",
        "Forgetting: warning. The loss on raw text changed by +12.5%. Above +10% is a warning, above +15% a failure.",
        "Benchmarks: warning. The worst changed by -3.5 points.",
        "What reduces forgetting: "
        "- A lower learning rate than 2e-05: trainer.learning_rate=6e-06 "
        "- Fewer epochs than 3: trainer.num_train_epochs=1 "
        "- LoRA, which keeps the weights of the base model as they are: adapter=lora "
        "- Raw text beside the rows, 1 % of all tokens or more: 'data=[lima,prose]' mix.raw_text=0.01",
    ]


def test_the_terminal_s_table_has_every_measure_with_its_change(run):
    assert write_report(full(run("a"))).split("\n\n")[0].splitlines() == [
        "|                  | base  | tuned                   |",
        "| ---------------- | ----- | ----------------------- |",
        "| exact match      | 25.0% | 75.0%                   |",
        "| ROUGE-L          | 26.0% | 76.0%                   |",
        "| chrF             | 27.0% | 77.0%                   |",
        "| stops by itself  | 28.0% | 78.0%                   |",
        "| p(stop)          | 29.0% | 79.0%                   |",
        "| held-out loss    | 2.000 | 2.250                   |",
        "| loss on raw text | 2.000 | 2.250 (+12.5%, warning) |",
        "| bits per byte    | 1.000 | 1.125 (+12.5%)          |",
        "| training loss    |       | 0.500                   |",
    ]


def test_the_ledger_fits_80_columns_with_a_million_rows():
    part = {
        "rows": 1_001_551,
        "held_out": 20_031,
        "kept": 981_520,
        "tokens": 412_345_678,
        "supervised_tokens": 301_234_567,
    }
    part["problems"] = {"stop_not_supervised": {"rows": 1_001_551, "policy": "keep"}}
    assert max(map(len, audit_table({"a_source_with_a_long_name": part, "other": part | {"problems": {}}}))) <= 80


def change(folder, file: str, path: str, value) -> None:
    """Sets one value, at a dotted path, in one of the run's files."""
    values = json.loads((folder / file).read_text())
    *parents, last = path.split(".")
    place = values
    for key in parents:
        place = place.setdefault(key, {})
    place[last] = value
    (folder / file).write_text(json.dumps(values))


def markdown(folder) -> str:
    """The run's report as Markdown."""
    write_report(folder)
    return (folder / "report.md").read_text()


def test_a_passed_run_has_no_advice(run):
    folder = full(run("a"))
    change(folder, "metrics.json", "forgetting.verdict", "passed")
    assert "reduces forgetting" not in write_report(folder) + markdown(folder)


def test_a_run_with_raw_text_in_it_is_not_told_to_mix_some_in(run):
    folder = full(run("a"))
    part = {"rows": 9, "kept": 9, "tokens": 90, "supervised_tokens": 90}
    change(folder, "supervision.json", "sources.books", part)
    change(folder, "supervision.json", "config.data.books", {"path": "books", "share": 0.15})
    for text in (write_report(folder), markdown(folder)):
        assert "A lower learning rate than 2e-05" in text and "Raw text beside the rows" not in text


def test_answers_that_are_trained_on_whole_are_no_raw_text(run):
    folder = full(run("a"))
    change(folder, "supervision.json", "sources.lima.supervised_tokens", 90)
    change(folder, "supervision.json", "config.data.lima.train_on", "all")
    assert "Raw text beside the rows" in write_report(folder)


def test_a_run_that_does_what_is_advised_is_told_to_lower_its_rate_alone(run):
    folder = full(run("a"))
    change(folder, "supervision.json", "sources.lima.supervised_tokens", 90)
    change(folder, "supervision.json", "config.adapter.type", "lora")
    change(folder, "supervision.json", "config.trainer.max_steps", 100)
    advice = write_report(folder).partition("What reduces forgetting:\n")[2].partition("\n\n")[0]
    assert advice == "- A lower learning rate than 2e-05: trainer.learning_rate=6e-06"


def test_a_packed_run_of_a_number_of_steps_is_said_to_be(run):
    folder = full(run("a"))
    for key, value in {
        "packing": True,
        "max_steps": 1000,
        "warmup_steps": 50,
        "lr_scheduler_type": "constant_with_warmup",
    }.items():
        change(folder, "supervision.json", f"config.trainer.{key}", value)
    assert (
        "constant with warmup schedule, warmup over 50 steps; 1,000 steps; effective batch of 64 rows; packed into rows "
        "of 2,048 tokens."
    ) in markdown(folder)


def test_trainer_defaults_are_trl_s():
    from trl import SFTConfig

    fields = SFTConfig.__dataclass_fields__
    assert {name: fields[name].default for name in TRAINER_DEFAULTS} == TRAINER_DEFAULTS


def test_paper_and_run_are_not_compared_where_the_recipe_is_ours(run):
    folder = full(run("a"))
    assert "## Paper and this run" in markdown(folder)
    change(folder, "supervision.json", "config.provenance.source", "ours")
    assert "Paper and this run" not in markdown(folder)


@pytest.mark.parametrize("name", ["report.md", "report.html", "loss.png", "model/README.md", "model/loss.png"])
def test_a_report_is_written_through_no_link_in_the_folder(run, tmp_path, name):
    folder = full(run("a"))
    (tmp_path / "mine.txt").write_text("mine")
    (folder / name).symlink_to(tmp_path / "mine.txt")
    write_report(folder)
    assert (tmp_path / "mine.txt").read_text() == "mine" and not (folder / name).is_symlink()


def test_a_model_s_folder_that_is_a_link_gets_no_card(run, tmp_path):
    folder = full(run("a"))
    (folder / "model").rmdir()
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("mine")
    (folder / "model").symlink_to(tmp_path / "project")
    write_report(folder)
    assert (tmp_path / "project" / "README.md").read_text() == "mine"


def test_a_run_shorter_than_logging_steps_has_no_chart(run):
    folder = run("a")
    change(folder, "metrics.json", "history", [{"step": 7, "eval_loss": 0.25}, {"step": 7, "train_runtime": 3.0}])
    assert "loss.png" not in markdown(folder) and "<svg" not in (folder / "report.html").read_text()
    assert "0.250 held-out loss at the end" in markdown(folder)


@pytest.mark.parametrize(
    "key", ["before", "after", "history", "forgetting", "weight_change", "judge", "environment", "warnings"]
)
@pytest.mark.parametrize("value", [None, {}])
def test_a_key_of_the_metrics_that_is_empty_or_not_there_is_left_out(run, key, value):
    folder = full(run("a"))
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(metrics | {key: value}))
    with_nothing = markdown(folder)
    (folder / "metrics.json").write_text(json.dumps({name: metrics[name] for name in metrics if name != key}))
    assert with_nothing == markdown(folder)


def test_a_departure_that_an_override_took_back_is_none(run):
    folder = full(run("a"))
    supervision = json.loads((folder / "supervision.json").read_text())
    supervision["config"]["provenance"]["departures"]["trainer.learning_rate"] = "ours is smaller"
    (folder / "supervision.json").write_text(json.dumps(supervision))
    assert "ours is smaller" not in markdown(folder)
