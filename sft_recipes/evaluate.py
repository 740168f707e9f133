"""A finished run and its base, measured alike: `python -m sft_recipes +recipe=lima mode=evaluate evaluate.run=RUN`."""

import logging
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl.trainer.utils import add_fused_lm_head

from sft_recipes import judge, report, streaming
from sft_recipes.arguments import objective, trainer_arguments
from sft_recipes.binding import ConfigError, call
from sft_recipes.chat_template import prepare
from sft_recipes.comparison import Options, Questions, check, compare, measure, measured, questions_of
from sft_recipes.config import Config
from sft_recipes.data import load, streamed
from sft_recipes.digest import record
from sft_recipes.encoding import Encoder
from sft_recipes.environment import command, environment
from sft_recipes.model import give_head_a_bias, load_model, load_tokenizer
from sft_recipes.run_folder import write_json, write_lines
from sft_recipes.runs import load_run
from sft_recipes.sources import sources

log = logging.getLogger(__name__)


def main(config: Config) -> float:
    """Asks both the config's held-out questions, writes the report, and gives back the objective's value."""
    folder, started = Path(HydraConfig.get().runtime.output_dir), datetime.now(UTC).isoformat(timespec="seconds")
    arguments, _ = trainer_arguments(config, folder)
    options = call(Options, config.evaluate, "evaluate")
    if options.run is None:
        raise ConfigError("evaluate.run is missing. Write evaluate.run=outputs/NAME/DATE, the folder of a run.")
    check(options)
    tuned, tokenizer = load_run(Path(options.run))
    served = tokenizer.chat_template
    encoder = Encoder(tokenizer, prepare(tokenizer, config.model.get("chat_template"), any_stop=True)[0])
    if streamed(config):
        data, _ = streaming.load(config, encoder, arguments.max_length, arguments.packing)
    else:
        data = load(config, encoder, arguments.max_length)
    questions = questions_of(options, data, list(sources(config)), config.seed)
    goal = objective(config.objective, measured(questions))
    parity = sum(part["parity"] for part in data.ledger.values())
    warnings = other_prompt(tokenizer, served, questions)
    compared, lines = compare(*both(tuned, config, encoder, questions), questions)
    metrics = {"name": config.name, "mode": "evaluate", "command": command(), "started": started}
    metrics |= {"environment": environment(), "warnings": warnings} | compared
    if options.judge and lines:
        metrics["judge"] = judge.run(lines, call(judge.Options, options.judge, "evaluate.judge"))
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "supervision.json", record(data.ledger, {}, asdict(config)) | {"parity": parity})
    write_lines(folder / "answers.jsonl", lines)
    print(report.write(folder))
    return metrics.get(goal, 0.0)


def other_prompt(tokenizer: PreTrainedTokenizerFast, served: str, questions: Questions) -> list[str]:
    """A warning where the questions are put in another prompt than the one that the run was trained and saved with."""
    if not questions.asked:
        return []
    ours, theirs = (
        tokenizer.apply_chat_template(
            questions.asked[0]["messages"][:1], chat_template=template, tokenize=False, add_generation_prompt=True
        )
        for template in (tokenizer.chat_template, served)
    )
    if ours == theirs:
        return []
    line = f"Asked as {ours[:80]!r}, trained and saved as {theirs[:80]!r}: another prompt gets worse answers."
    log.warning(line)
    return [line]


def both(
    tuned: PreTrainedModel | PeftModel, config: Config, encoder: Encoder, questions: Questions
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Base and tuned model measured: an adapter is switched off for the base, other weights are loaded in turn."""
    if isinstance(tuned, PeftModel):
        scoring(tuned.get_base_model())
        with tuned.disable_adapter():
            before = measure(tuned, encoder, questions)
        return before, measure(tuned, encoder, questions)
    new = call(load_tokenizer, config.model, "model")[2]
    base = load_model(config.model, None, True, encoder.tokenizer, encoder.stop, new)
    before = measure(scoring(base), encoder, questions)
    del base
    return before, measure(scoring(tuned), encoder, questions)


def scoring(model: PreTrainedModel) -> PreTrainedModel:
    """The model with the head that gives its tokens' losses, as TRL's trainer gives it, on a GPU where there is one."""
    if torch.cuda.is_available() and not getattr(model, "quantization_method", None):
        model.to("cuda")
    give_head_a_bias(model)
    add_fused_lm_head(model)
    return model
