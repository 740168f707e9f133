"""What mode=preview writes for tools: preview.jsonl, a line for every row shown."""

import json
import re
from pathlib import Path

from support.rows import question_rows, write_jsonl

TINY = ["mode=preview", "model=tiny", "model.chat_template=chatml", "data=file", "data.held_out=0"]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "preview.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_row_is_written_with_its_text_its_labels_and_what_is_supervised(tiny_run, tmp_path):
    talk = [("user", "Hi"), ("assistant", " One. "), ("user", "And?"), ("assistant", "Zwei 🦊")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in talk], "id": 7}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    code, _, folder = tiny_run(*TINY, f"data.file.data_files={path}", "preview.rows=all")
    (line,) = lines(folder)
    assert code == 0
    assert (line["source"], line["row"], line["raw"], line["checks"], line["left_out"]) == (
        "file",
        0,
        rows[0],
        [],
        False,
    )
    assert line["text"] == "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in talk)
    assert line["supervised"] == [" One. ", "Zwei 🦊"]
    assert [a for a, b in zip(line["input_ids"], line["labels"], strict=True) if b not in (a, -100)] == []
    assert "piece" not in line


def test_the_formatter_is_told_once(command):
    said = command(*TINY, "data.file.data_files=rows.jsonl", "data.cache=false")[2]
    assert said.count("data.file: formatter alpaca") == 1


def test_all_rows_are_shown_in_the_order_of_the_file_and_those_left_out_say_why(tiny_run, tmp_path):
    rows = [*question_rows(40), question_rows(1)[0], {"instruction": "Say <|im_end|>", "input": "", "output": "No."}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    options = [f"data.file.data_files={path}", "preview.rows=all", "data_checks.duplicate=drop"]
    code, printed, folder = tiny_run(*TINY, *options)
    shown = lines(folder)
    assert code == 0 and [line["row"] for line in shown] == list(range(42))
    assert [line["raw"] for line in shown] == rows
    assert [line["row"] for line in shown if line["left_out"]] == [40]
    assert (shown[40]["checks"], shown[40]["supervised"], set(shown[40]["labels"])) == (["duplicate"], [], {-100})
    assert shown[41]["checks"] == ["typed_control_token"] and "left out row: data.file 40" in printed


def test_a_long_text_is_shown_in_pieces_that_join_to_it(tiny_run, tmp_path):
    text = "The river rises in the hills. " * 60
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": text}])
    options = [f"data.file.data_files={path}", "preview.rows=all", "trainer.max_length=50"]
    code, _, folder = tiny_run(*TINY, *options)
    shown = lines(folder)
    assert code == 0 and len(shown) > 5 and [line["piece"] for line in shown] == list(range(len(shown)))
    assert "".join(text for line in shown for text in line["supervised"]) == text
    assert {tuple(line["checks"]) for line in shown} == {("cut_into_pieces",)}
    assert all(line["input_ids"] == line["labels"] for line in shown)


def test_a_stream_is_written_like_other_rows(tiny_run, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", question_rows(30))
    options = [f"data.file.data_files={path}", "preview.rows=all"]
    assert tiny_run(*TINY, *options)[0] == 0
    streamed = ["data.file.streaming=true", "trainer.max_steps=3"]
    code, _, folder = tiny_run(*TINY, *options, *streamed)
    shown = lines(folder)
    assert code == 0 and [line["raw"] for line in shown] == question_rows(30)
    assert {tuple(line["supervised"]) for line in shown} == {("Yes.",)}


def test_a_preview_of_one_row_writes_the_rows_that_it_shows(tiny_run, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", question_rows(30))
    _, printed, folder = tiny_run(*TINY, f"data.file.data_files={path}", "preview.rows=2")
    assert len(lines(folder)) == printed.count(" row: data.file ") == 4


def test_memory_is_estimated_with_activations_kept_where_the_run_would_keep_them(tiny_run, tmp_path):
    path, estimates = write_jsonl(tmp_path / "rows.jsonl", question_rows(30)), {}
    for again in ("auto", "false", "true"):
        typed = [f"data.file.data_files={path}", f"trainer.activation_checkpointing={again}"]
        _, printed, _ = tiny_run(*TINY, *typed)
        (estimates[again],) = re.findall(r"activations .*\.", printed)
    assert estimates["auto"] == estimates["false"] != estimates["true"]


def test_a_preview_refuses_the_adapter_that_a_run_would_and_goes_without_an_estimate_where_there_is_none(
    tiny_run, tmp_path
):
    typed = [*TINY, f"data.file.data_files={write_jsonl(tmp_path / 'rows.jsonl', question_rows(30))}"]
    code, printed, folder = tiny_run(
        *typed, "adapter=lora", "adapter.type=shira"
    )  # whose start needs the base's values
    assert code == 0 and "tokens, with loss" in printed and "Estimated peak memory" not in printed
    assert "Memory cannot be estimated for this run" in (folder / "sft_recipes.log").read_text()
    assert tiny_run(*typed, "adapter=lora", "adapter.lora.target_modules=[q_prj]")[0] == 2
