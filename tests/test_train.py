"""Whole runs on the embedded tiny model, through the command a user types."""

import json
import re

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sft_recipes import chat, merge
from sft_recipes.__main__ import main
from sft_recipes.data.mask_view import mask_tokens, render_terminal
from sft_recipes.encoding.chat_template import load_template
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.training import trainer as trainer_module
from sft_recipes.training.trainer import SupervisedTrainer
from support.commands import SHORT_TINY_RUN, read_metrics, run_command
from support.paths import ROOT
from support.processes import run_ranks


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """What a run of four steps of the tiny recipe printed, and its folder, which tests only read."""
    folder = tmp_path_factory.mktemp("short") / "run"
    code, printed = run_command(folder, *SHORT_TINY_RUN)
    assert code == 0
    return printed, folder


@pytest.fixture(scope="module")
def previewed(tmp_path_factory):
    """What a preview of the tiny recipe prints in 80 columns, and its folder."""
    where = tmp_path_factory.mktemp("previewed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        patch.chdir(where)
        code, printed = run_command(where / "run", "mode=preview", "preview.rows=3", "name='<b>mine'")
    assert code == 0
    return printed, where / "run"


def test_a_run_leaves_config_log_metrics_report_and_a_model_that_can_be_served(short_run):
    printed, folder = short_run
    assert {path.name for path in folder.iterdir()} >= {".hydra", "metrics.json", "report.md", "answers.jsonl", "model"}
    log = (folder / "sft_recipes.log").read_text()
    assert "Training " in log and "ushed" not in log  # to the hub, which nobody asked for
    assert "| exact match" in printed and "| exact match" in (folder / "report.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    stops = GenerationConfig.from_pretrained(folder / "model").eos_token_id
    assert stops == [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]


@pytest.mark.parametrize("packing", ["false", "true"])
def test_full_fine_tuning_lowers_the_loss_and_saves_weights_that_load(tiny_run, packing):
    code, _, folder = tiny_run("adapter=none", "trainer.learning_rate=1e-3", f"trainer.packing={packing}", *SHORT_TINY_RUN,
                              "trainer.max_steps=12", "trainer.train_sampling_strategy=random")  # fmt: skip
    losses = [entry["loss"] for entry in read_metrics(folder)["history"] if "loss" in entry]
    assert code == 0 and losses[-1] < losses[0]
    assert (read_metrics(folder)["padding"] > 0) is (packing == "false")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.dtype == torch.float32
    assert model.get_input_embeddings().num_embeddings >= len(AutoTokenizer.from_pretrained(folder / "model"))


def test_an_adapter_run_trains_its_matrices_and_the_rows_of_new_tokens_in_fp32(short_run):
    _, folder = short_run
    from safetensors.torch import load_file

    weights = load_file(folder / "model" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert [tuple(weight.shape)[0] for name, weight in weights.items() if "trainable_tokens_delta" in name] == [2]


def test_qlora_trains_on_a_cpu_with_fp32_adapters(tiny_run):
    from safetensors.torch import load_file

    code, _, folder = tiny_run("adapter=qlora", *SHORT_TINY_RUN, "trainer.max_steps=2")
    weights = load_file(folder / "model" / "adapter_model.safetensors")
    assert code == 0 and {weight.dtype for weight in weights.values()} == {torch.float32}


def test_two_runs_with_one_seed_are_the_same_run(short_run, tiny_run):
    first = read_metrics(short_run[1])["train_loss"]
    again = read_metrics(tiny_run(*SHORT_TINY_RUN, "evaluate.rows=0")[2])["train_loss"]
    other = read_metrics(tiny_run(*SHORT_TINY_RUN, "evaluate.rows=0", "seed=1")[2])["train_loss"]
    assert first == again != other


def test_held_out_rows_are_measured_at_the_end(short_run):
    _, folder = short_run
    assert read_metrics(folder)["eval_loss"] > 0
    assert json.loads((folder / "supervision.json").read_text())["sources"]["tiny"]["held_out"] > 0


def test_early_stopping_needs_one_key(tiny_run):
    code, _, folder = tiny_run(
        "trainer.early_stopping_patience=1", "trainer.learning_rate=1e-9", "trainer.num_train_epochs=5",
        "trainer.eval_strategy=steps", "trainer.eval_steps=2", "trainer.save_steps=2", "evaluate.rows=0",
        "evaluate.raw_text=null", "+trainer.early_stopping_threshold=0.1",
    )  # fmt: skip
    assert code == 0
    assert read_metrics(folder)["steps"] == 4  # the first evaluation is the best one, the second ends it
    assert (folder / "checkpoint-2").is_dir()


def test_smoke_says_in_one_line_what_it_saw(tiny_run):
    code, _, folder = tiny_run("+debug=smoke", "trainer.max_steps=20", "evaluate.raw_text=null")
    line = re.search(r"Smoke test.*", (folder / "sft_recipes.log").read_text())[0]
    assert code == 0
    assert re.fullmatch(
        r"Smoke test passed: the loss fell from [\d.]+ to [\d.]+ in 20 steps, peak memory [\d.]+ GiB, it answers '.*'\.",
        line,
    )


def test_a_sweep_gives_every_job_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["-m", "trainer.learning_rate=1e-3,5e-3", "hydra.sweep.dir=sweep", *SHORT_TINY_RUN, "evaluate.rows=0"]
    monkeypatch.setattr("sys.argv", ["sft_recipes", *arguments])
    GlobalHydra.instance().clear()
    main()
    rates = [read_metrics(tmp_path / "sweep" / job)["history"][1]["learning_rate"] for job in "01"]
    assert len(set(rates)) == 2


def test_two_processes_without_a_gpu_are_told_of_the_cpu(tiny_run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # which is all that torchrun tells a process that finds no GPU
    code, _, folder = tiny_run(*SHORT_TINY_RUN)
    said = "torchrun started 2 processes without a GPU. Write trainer.use_cpu=true."
    assert code == 2 and (folder / "sft_recipes.log").read_text().strip().endswith(said)


def test_two_processes_train_as_one_with_the_same_effective_batch(tiny_run, tmp_path):
    """Each takes half of a step's rows, and of the held-out ones."""
    quick = [*SHORT_TINY_RUN, "trainer.max_steps=2", "evaluate.rows=0", "evaluate.weight_change=false"]
    quick += ["trainer.per_device_train_batch_size=8", "trainer.effective_batch_size=16"]
    alone = read_metrics(tiny_run(*quick)[2])
    two = run_ranks(tmp_path, "hydra.run.dir=two", "trainer.use_cpu=true", *quick)
    assert [rank.returncode for rank in two] == [0, 0], two[0].stderr
    together = read_metrics(tmp_path / "two")
    held_out = [run["before"]["held_out"] for run in (alone, together)]
    assert held_out[1]["loss"] == pytest.approx(held_out[0]["loss"], abs=1e-6)
    losses = [[entry["loss"] for entry in run["history"] if "loss" in entry] for run in (alone, together)]
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert together["train_tokens"] == alone["train_tokens"]


def test_a_mixture_of_chat_and_prose_is_trained_in_one_run(short_run):
    _, folder = short_run
    counts = json.loads((folder / "supervision.json").read_text())["sources"]
    assert counts["prose"]["kept"] / (counts["prose"]["kept"] + counts["tiny"]["kept"]) == pytest.approx(0.15, abs=0.01)
    assert counts["prose"]["supervised_tokens"] == counts["prose"]["tokens"]
    assert counts["tiny"]["supervised_tokens"] < counts["tiny"]["tokens"]


def test_the_preview_s_page_is_dark_where_the_system_is_and_has_a_legend(previewed):
    _, folder = previewed
    page = (folder / "preview.html").read_text(encoding="utf-8")
    assert page.count("@media screen and (prefers-color-scheme: dark)") == 2  # the page and the mask
    assert '<meta name="color-scheme" content="light dark">' in page and "<title>&lt;b&gt;mine: preview" in page
    legend = page.partition("<h2>")[0]
    assert '<span class="on">with loss</span>' in legend and '<span class="stop">stop token, with loss</span>' in legend


def test_preview_shows_the_dataset_the_trainer_gets(previewed, tiny_run, monkeypatch):

    trained = {}

    class Spy(SupervisedTrainer):
        def train(self, *given, **options):
            trained["rows"] = sorted(self.train_dataset, key=lambda row: (row["source"], row["row"]))
            trained["encoder"] = Encoder(self.processing_class, load_template("chatml", self.processing_class))
            return super().train(*given, **options)

    monkeypatch.setattr(trainer_module, "SupervisedTrainer", Spy)
    tiny_run(*SHORT_TINY_RUN, "trainer.max_steps=1", "evaluate.rows=0")
    printed, folder = previewed
    assert (folder / "preview.html").is_file()
    assert printed.endswith("\nrun/preview.html shows the same in a browser.\n")  # from where the command was typed
    longest = max(trained["rows"], key=lambda row: len(row["input_ids"]))
    for row in (trained["rows"][0], longest):
        assert (
            render_terminal(mask_tokens(trained["encoder"], row["input_ids"], row["labels"]), 80, colour=False)
            in printed
        )


def test_preview_says_what_the_run_will_hold(previewed, tiny_run):
    for printed, *lines in (
        (tiny_run("mode=preview", "adapter=none")[1], "498,336 parameters. Estimated",
         "weights 1.9 MiB, gradients 1.9 MiB, optimizer 3.8 MiB"),  # × 4 × 4 × 8
        (previewed[0], "542,304 parameters, 43,968 of them trained. Estimated", "weights 2.1 MiB, gradients 0.2 MiB"),
    ):  # fmt: skip
        assert all(line in printed for line in lines)
        assert re.search(r"Estimated peak memory [\d.]+ [MG]iB of [\d.]+ [MG]iB available:", printed)


def test_preview_rows_is_how_many_are_drawn(previewed):
    drawn = re.findall(r"^(\w+) row: data", previewed[0], re.MULTILINE)
    assert drawn == ["first", "longest", "drawn", "drawn", "drawn"]


def test_a_smoke_run_too_short_to_judge_says_so(tiny_run):
    code, _, folder = tiny_run("+debug=smoke", "trainer.max_steps=2", "evaluate.raw_text=null")
    assert code == 2
    assert (
        "Smoke test: too few steps to see the loss fall. Raise trainer.max_steps."
        in (folder / "sft_recipes.log").read_text()
    )


def test_held_out_rows_without_a_question_are_not_asked(tiny_run, tmp_path):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    lines = "".join(json.dumps({"messages": messages}) + "\n" for messages in (talk, talk[1:]))
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(lines)
    files = f"data.file.data_files={{train: {tmp_path}/train.jsonl, test: {tmp_path}/test.jsonl}}"
    code, _, folder = tiny_run(
        "data=file", files, "data.file.held_out_split=test", "data_checks.in_held_out=keep", *SHORT_TINY_RUN
    )
    assert code == 0
    assert [json.loads(line)["prompt"] for line in (folder / "answers.jsonl").read_text().splitlines()] == ["Hi"]


def test_a_prompt_is_trained_where_the_template_adds_no_tokens(tiny_run, capsys):
    code, _, folder = tiny_run("adapter.type=prompt_tuning", "+adapter.prompt_tuning.num_virtual_tokens=4",
                              "model.chat_template=alpaca_short", *SHORT_TINY_RUN)  # fmt: skip
    assert code == 0 and (folder / "model" / "adapter_model.safetensors").is_file()
    chat.main([str(folder), "--prompt", "Hi", "--max-new-tokens", "2"])
    with pytest.raises(SystemExit, match="2"):
        merge.main([str(folder), "--out", str(folder / "out")])
    assert "PROMPT_TUNING adds no weights that could be merged." in capsys.readouterr().err


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_an_adapter_run_goes_on_where_it_ended(short_run, tiny_run, tmp_path, adapter):
    start = short_run[1]
    if adapter == "qlora":
        start = tiny_run(f"adapter={adapter}", *SHORT_TINY_RUN)[2].rename(tmp_path / "first")
    first = read_metrics(start)
    code, _, folder = tiny_run(f"adapter={adapter}", f"model.id={start}", "trainer.packing=true",
                              "model.chat_template=null", *SHORT_TINY_RUN)  # fmt: skip
    assert code == 0 and read_metrics(folder)["history"][0]["loss"] < first["history"][0]["loss"]
    base = json.loads((folder / "model" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(ROOT / "sft_recipes" / "tiny" / "model")
