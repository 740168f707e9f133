"""Benchmarks with lm-eval, on a model in memory: `run_lm_eval(model, tokenizer, ["mmlu", "my_task.yaml"])`."""

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

from sft_recipes.errors import ConfigError, did_you_mean, one_line
from sft_recipes.evaluation.raw_text import classify_regression
from sft_recipes.modeling.inference import eval_mode
from sft_recipes.modeling.workarounds import weights_not_tied_again

if TYPE_CHECKING:  # lm-eval is the extra `eval`
    from lm_eval.tasks import TaskManager

PERCENT = ("bleu", "chrf")  # metrics that lm-eval gives from 0 to 100
LM_EVAL_SEED = 1234


def run_lm_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tasks: Sequence[str],
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, float]:
    """Every task's main metric, from 0 to 1: `acc_norm` where the task has it, else the first metric that it names.

    A task is the name of one of lm-eval's tasks or groups, or a local task's YAML; a group without a metric of its own
    gives its tasks'. `limit` is the number of rows a task. Questions stand in the tokenizer's chat template where an
    answer is written (ifeval, gsm8k), and not where given ones are compared (mmlu).
    Raises ConfigError for a task that cannot be loaded or whose metric is no share.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    found = {}
    with eval_mode(model, use_cache=True), weights_not_tied_again(model), preserved_random_state():
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
        for task in tasks:
            loaded = load_task(task)
            written = all(part.OUTPUT_TYPE == "generate_until" for part in loaded["tasks"].values())
            in_template = bool(tokenizer.chat_template) and written
            try:
                results = evaluate(
                    lm, loaded, limit=limit, bootstrap_iters=0, log_samples=False,
                    apply_chat_template=in_template, fewshot_as_multiturn=in_template,
                )  # fmt: skip
            except ValueError as error:  # such as code that would have to be run
                raise ConfigError(f"evaluate.lm_eval={task}: {one_line(error)[:300]}") from error
            found |= main_metrics(results, loaded)
    return found


def check_tasks(tasks: Sequence[str], run_code: bool = True) -> None:
    """Raises ConfigError where lm-eval is not installed, for a name that it does not know and a file that is no task.

    lm-eval reads its 15,000 names in 10 s, once; local YAMLs alone do without. A file is loaded if its code may run.
    """
    if not find_spec("lm_eval"):
        raise ConfigError("evaluate.lm_eval needs lm-eval. Run: pip install 'sft-recipes[eval]'")
    for task in tasks:
        if is_task_file(task) and run_code:
            with preserved_random_state():
                load_task(task)
        elif is_task_file(task) and not Path(task).is_file():
            raise ConfigError(f"evaluate.lm_eval={task}: there is no such file.")
        elif not is_task_file(task) and task not in (known := task_manager(everything=True).task_index):
            raise ConfigError(f"evaluate.lm_eval={task} is not a task of lm-eval.{did_you_mean(task, known)}")


def is_task_file(task: str) -> bool:
    """Whether a task is a path rather than a name.

    >>> is_task_file("my_task.yaml"), is_task_file("mmlu")
    (True, False)
    """
    return task.endswith((".yaml", ".yml"))


@cache
def task_manager(everything: bool) -> "TaskManager":
    """lm-eval's index of tasks: all of them, or none, which is enough for local YAMLs and saves 10 s."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=everything)


def load_task(task: str) -> dict[str, Any]:
    """The task or group with its rows; raises ConfigError where they are not to be had.

    What a task shuffles or samples is the same for every model that is asked.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are of what every local task leaves open
    set_seed(LM_EVAL_SEED)
    try:
        loaded = task_manager(everything=not is_task_file(task)).load([task])
    except Exception as error:  # the datasets library's, yaml's, jinja's, or a task's own code's
        why = f"{type(error).__name__}: {one_line(error)[:300]}."
        wanted = " A file should hold one task, with its name under the key task." if is_task_file(task) else ""
        raise ConfigError(f"evaluate.lm_eval={task} cannot be loaded. {why}{wanted}") from error
    for part in loaded["tasks"].values():  # what lm-eval's simple_evaluate does; it also asks pip and git for a report
        if part.get_config("num_fewshot") is None:
            part.set_config(key="num_fewshot", value=0)
        part.set_fewshot_seed(seed=LM_EVAL_SEED)
    return loaded


def main_metrics(results: Mapping[str, Any], loaded: Mapping[str, Any]) -> dict[str, float]:
    """The main metric of the asked task, or of the group's tasks where the group has none.

    That is `acc_norm`, else the first one; raises ConfigError where it is no share, or less of it is better.
    """
    values = {name: metric_values(result) for name, result in results["results"].items()}
    group, main = next(iter(loaded["groups"]), None), {}
    for name in [group] if values.get(group) else loaded["tasks"]:
        metric = "acc_norm" if "acc_norm" in values[name] else next(iter(values[name]))
        main[name] = values[name][metric] / (100 if metric in PERCENT else 1)
        if results["higher_is_better"].get(name, {}).get(metric) is False or not 0 <= main[name] <= 1:
            raise ConfigError(
                f"evaluate.lm_eval={name} measures {metric}={main[name]:.3g}, which is no share of right answers. "
                "The loss on raw text is evaluate.raw_text."
            )
    return main


def metric_values(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one of lm-eval's results, by the metric's name without its filter's; the first filter's count.

    >>> metric_values({"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.25})
    {'acc': 0.5, 'acc_norm': 0.25}
    """
    found = {}
    for key, value in result.items():
        metric, comma, _ = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            found.setdefault(metric, float(value))
    return found


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """The random numbers of training are afterwards as they were, whatever a task seeds or draws."""
    random_state, numpy_state = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(random_state)
        numpy.random.set_state(numpy_state)


def score_change(
    before: Mapping[str, float], after: Mapping[str, float], warn_above: float = 2.0, fail_above: float = 5.0
) -> dict[str, Any]:
    """The points (hundredths) each task lost, `worst` of them (negative: all gained), and the verdict on that.

    >>> score_change({"mmlu": 0.5, "hellaswag": 0.4}, {"mmlu": 0.47, "hellaswag": 0.41})
    {'points': {'mmlu': 3.0, 'hellaswag': -1.0}, 'worst': 3.0, 'task': 'mmlu', 'verdict': 'warning'}
    """
    points = {task: round(100 * (before[task] - after[task]), 6) for task in before if task in after}
    task = max(points, key=points.__getitem__)
    verdict = classify_regression(points[task], warn_above, fail_above)
    return {"points": points, "worst": points[task], "task": task, "verdict": verdict}
