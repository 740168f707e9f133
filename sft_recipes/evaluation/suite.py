"""What a model can do, what it remembers and whether it stops: base and tuned, measured alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sft_recipes.config.metrics import METRICS, metrics_on
from sft_recipes.config.nested_values import get_path
from sft_recipes.config.options import EvaluateOptions
from sft_recipes.config.schema import Config
from sft_recipes.config.validation import import_function
from sft_recipes.data.prepare import TrainingData
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.errors import ConfigError, did_you_mean
from sft_recipes.evaluation.benchmarks import check_tasks, run_lm_eval, score_change
from sft_recipes.evaluation.generation import generate_answers, is_answerable
from sft_recipes.evaluation.judge import check_judge
from sft_recipes.evaluation.prompting import prompt_questions
from sft_recipes.evaluation.raw_text import classify_regression, evaluate_raw_text, load_documents
from sft_recipes.evaluation.text_metrics import score_answers, score_by_length
from sft_recipes.evaluation.thinking import MARKERS, score_thoughts
from sft_recipes.evaluation.token_loss import break_down_loss, flatten_loss, token_losses
from sft_recipes.modeling.loading import has_own_template


@dataclass(frozen=True)
class EvalInputs:
    """What base and tuned model are measured on."""

    data: TrainingData
    names: list[str]  # of the sources
    asked: list[Mapping[str, Any]]  # held-out conversations whose last answer the model is to give
    texts: list[str]  # raw text
    options: EvaluateOptions
    seed: int
    prompted: Sequence[Mapping[str, Any]] = ()  # the same questions with a prompt for the base
    may_think: bool = True  # the template has a place for thoughts, or the training rows have some


def build_eval_inputs(config: Config, data: TrainingData, tokenizer: PreTrainedTokenizerFast) -> EvalInputs:
    """The held-out questions that can be asked, and the raw text; where nothing is trained on, all of the questions."""
    options, prompted = config.evaluate, []
    most = (20 if len(data.train) else None) if options.rows is None else options.rows
    asked = [question for question in data.questions if is_answerable(question["messages"])][:most]
    texts = load_documents(options.raw_text) if options.raw_text else []
    if options.system or options.few_shot:
        served = tokenizer if has_own_template(config.model) else None
        prompted = prompt_questions(asked, data.examples or data.questions, options, config.seed, served)
    may_think = any(opening in tokenizer.chat_template for opening, _ in MARKERS)
    may_think = may_think or any(get_path(part, "thoughts.with") for part in data.audit.values())
    return EvalInputs(data, list(config.sources), asked, texts, options, config.seed, prompted, may_think)


def check_evaluation(options: EvaluateOptions, run_code: bool = True) -> None:
    """Raises ConfigError for benchmarks or a judge that are not to be had, before anything is loaded."""
    if options.lm_eval:
        check_tasks(options.lm_eval, run_code)
    if options.judge:
        check_judge(options.judge)


SCORES = tuple(metric.name for metric in metrics_on("answers"))


def measured_metrics(questions: EvalInputs, training: bool = False) -> list[str]:
    """The names that `objective` can have: the metrics that `measure_model` and, with `training`, a training give."""
    available = {
        "answers": questions.asked,
        "thoughts": questions.asked and questions.may_think,
        "held_out": len(questions.data.held_out),
        "stop_tokens": questions.data.questions,  # raw text has no answers that end
        "raw_text": questions.texts,
        "training": training,
        "cost": training,
    }
    return [metric.name for metric in METRICS.values() if available.get(metric.measured_on)]


def measure_model(
    model: PreTrainedModel,
    encoder: Encoder,
    questions: EvalInputs,
    held_out: Mapping[str, Any] | None = None,
    is_base: bool = False,
) -> dict[str, Any]:
    """The scores of greedy answers, of drawn ones (`sampled`), `held_out`, `raw_text`, `lm_eval`, and the `answers`.

    The base is asked with its prompt, too (`prompted`). What was not asked for is not in the result. `held_out` is what
    has been measured of these very weights already.
    """
    options, found = questions.options, {}
    if questions.asked:
        generations = generate_eval_answers(model, encoder, questions)
        found |= score_answers(generations) | score_by_length(generations) | {"thinking": score_thoughts(generations)}
        others = {}  # what else is said to the same questions, and how it came about
        if options.temperature:
            how = {"temperature": options.temperature, "top_p": options.top_p}
            others["sampled"] = generate_eval_answers(model, encoder, questions, **how, seed=questions.seed), how
        if is_base and questions.prompted:
            how = {"system": bool(options.system), "few_shot": options.few_shot}
            how["as_text"] = "prompt_text" in questions.prompted[0]
            helped = replace(questions, asked=questions.prompted)
            others["prompted"] = generate_eval_answers(model, encoder, helped), how
        for name, (answers, how) in others.items():
            found[name] = score_answers(answers) | how
            generations = [one | {name: other["text"]} for one, other in zip(generations, answers, strict=True)]
        found["answers"] = generations
    if len(questions.data.held_out):
        found["held_out"] = held_out or evaluate_held_out(model, encoder, questions)
    if questions.texts:
        found["raw_text"] = evaluate_raw_text(model, encoder, questions.texts, options.batch_size)
    if options.lm_eval:
        found["lm_eval"] = run_lm_eval(
            model, encoder.tokenizer, options.lm_eval, options.lm_eval_rows, options.batch_size
        )
    return found


def generate_eval_answers(
    model: PreTrainedModel, encoder: Encoder, questions: EvalInputs, **sampling: Any
) -> list[dict[str, Any]]:
    """The answers to the held-out questions, greedy unless `sampling` says how they are drawn."""
    size, longest = questions.options.batch_size, questions.options.max_new_tokens
    return generate_answers(model, encoder.tokenizer, questions.asked, size, longest, **sampling)


def evaluate_held_out(
    model: PreTrainedModel, encoder: Encoder, questions: EvalInputs, rows: Dataset | None = None
) -> dict[str, Any]:
    """The loss on the held-out rows, or on other `rows`, and its parts."""
    rows = questions.data.held_out if rows is None else rows
    losses = token_losses(model, encoder.tokenizer, rows, questions.options.batch_size)
    return break_down_loss(rows, losses, encoder.tokenizer.convert_tokens_to_ids(encoder.stop), questions.names)


def load_custom_metric(name: str | None) -> Callable[[list[dict[str, Any]]], float] | None:
    """A user's own `module.function`, which is given the answers to the held-out questions; None for our metrics."""
    return import_function("trainer.metric_for_best_model", name) if name and "." in name else None


def check_best_model_metric(name: str | None, questions: EvalInputs) -> None:
    """Raises ConfigError for a metric that no evaluation gives, and for a user's own that cannot be imported."""
    if name is None or load_custom_metric(name):
        return
    on_the_way = {metric.name for metric in metrics_on("answers", "held_out", "stop_tokens")}
    available = {key.removeprefix("eval_") for key in on_the_way.intersection(measured_metrics(questions))}
    name = name.removeprefix("eval_")
    if name not in available and not (available and name.startswith("loss_")):
        raise ConfigError(
            f"trainer.metric_for_best_model={name} is not measured while training.{did_you_mean(name, available)} "
            "Or write module.function, which is given the answers."
        )


def compare_measurements(
    before: dict[str, Any], after: dict[str, Any], questions: EvalInputs
) -> tuple[dict[str, Any], list[dict]]:
    """The entries of metrics.json for both measurements, and the lines of answers.jsonl, taken out of them."""
    options, found = questions.options, {"before": before, "after": after}
    lines = [pair_answers(*pair) for pair in zip(before.pop("answers", []), after.pop("answers", []), strict=True)]
    values = {name: get_path(after, metric.path) for name, metric in METRICS.items()}
    found |= {name: value for name, value in values.items() if value is not None}  # a loss that is NaN, too
    if "held_out" in after:
        found |= {f"eval_{key}": value for key, value in flatten_loss(after["held_out"]).items()}
    if "raw_text" in after:
        change = after["raw_text"]["loss"] / before["raw_text"]["loss"] - 1
        limits = {"warn_above": options.warn_above, "fail_above": options.fail_above}
        found["forgetting"] = {"change": change, "verdict": classify_regression(change, **limits)} | limits
    if "lm_eval" in after:
        found["benchmarks"] = score_change(before["lm_eval"], after["lm_eval"])
    return found, lines


def pair_answers(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """One line of answers.jsonl."""
    line = {key: old[key] for key in ("prompt", "reference")}
    line |= {"base": old["text"], "tuned": new["text"], "base_stops": old["stops"], "tuned_stops": new["stops"]}
    line |= {"base_sampled": old["sampled"], "tuned_sampled": new["sampled"]} if "sampled" in old else {}
    line |= {"prompted": old["prompted"]} if "prompted" in old else {}
    return line | {f"{who}_thought": one["thought"] for who, one in (("base", old), ("tuned", new)) if "thought" in one}
