"""The report is made from a run's files alone, and two runs can be compared."""

import json
import subprocess
import sys

import pytest

from sft_recipes.report import compare, main, write


@pytest.fixture
def run(tmp_path):
    """`run("a", lr=1)`: a run's folder with what a training writes."""

    def make(name: str, digest: str = "aa", chunks: tuple = (), **config):
        folder = tmp_path / "tiny" / name
        (folder / ".hydra").mkdir(parents=True)
        (folder / ".hydra" / "config.yaml").write_text("seed: 42\n")
        measured = {"exact_match": 0.0, "stops": 0.25, "raw_text_loss": 2.0}
        metrics = {
            "train_loss": 0.5, "eval_loss": 0.25, "steps": 7, "train_seconds": 3.0, "trainable_parameters": 1000,
            "peak_memory_gib": 0.5, "before": measured, "after": {"exact_match": 1.0, "stops": 1.0, "raw_text_loss": 2.1},
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

    return make


def test_the_table_shows_base_and_tuned_side_by_side(run):
    assert write(run("a")).splitlines() == [
        "|                  | base  | tuned         |",
        "| ---------------- | ----- | ------------- |",
        "| exact match      | 0.0%  | 100.0%        |",
        "| stops by itself  | 25.0% | 100.0%        |",
        "| loss on raw text | 2.000 | 2.100 (+5.0%) |",
        "| held-out loss    |       | 0.250         |",
        "| training loss    |       | 0.500         |",
        "",
        "| question | base | tuned  |",
        "| -------- | ---- | ------ |",
        "| Hi?⏎Hm   | a\\|b | Hello. |",
    ]


def test_report_md_has_supervision_training_and_config(run):
    folder = run("a")
    write(folder)
    page = (folder / "report.md").read_text()
    assert "| tiny   | 10   | 2        | 9    | 90     | 30        | duplicate | 1       | drop   |" in page
    assert "7 steps in 3 s, 1,000 trained parameters" in page
    assert "seed: 42" in page


def test_two_runs_on_the_same_tokens_are_said_to_be(run):
    assert compare(run("a"), run("b")) == "Both trained on the same tokens, labels and packing: 9 rows, aa."


def test_two_runs_on_other_tokens_are_told_apart(run):
    first = run("a", "aa", ("1", "2"), data={"held_out": 0.1})
    second = run("b", "bb", ("1", "3"), data={"held_out": 0.2})
    assert compare(first, second).splitlines() == [
        "They trained on different tokens: 9 and 9 rows, which part between row 1,000 and 2,000 of the training order.",
        "config.data.held_out: 0.1 and 0.2",
    ]


def test_a_folder_that_is_no_run_gets_a_line(tmp_path):
    with pytest.raises(SystemExit, match="is not the folder of a finished run"):
        main([str(tmp_path)])


def test_the_report_is_made_without_torch(run):
    script = "import sys; from sft_recipes.report import main; main([sys.argv[1]]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, str(run("a"))], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
