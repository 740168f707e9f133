"""How much a run forgot: the verdict on what it lost, and what would have helped."""

from collections.abc import Mapping
from typing import Any, Literal

Verdict = Literal["passed", "warning", "failed"]


def classify_regression(change: float, warn_above: float = 0.10, fail_above: float = 0.15) -> Verdict:
    """What to say of a relative rise of the loss on raw text (0.10 is 10 %); a loss that is not a number has failed.

    >>> [classify_regression(change) for change in (-0.02, 0.10, 0.11, 0.15, 0.16, float("nan"))]
    ['passed', 'passed', 'warning', 'warning', 'failed', 'failed']
    """
    if change <= warn_above:
        return "passed"
    return "warning" if change <= fail_above else "failed"


def forgetting_advice(trainer: Mapping[str, Any], adapter: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    """What keeps a model from forgetting, with the config that switches it on; without what is on already.

    The arguments are the config's groups of these names. Raw text is mixed in where a source's formatter is `text`.

    >>> trainer, prose = {"learning_rate": 1e-4, "num_train_epochs": 1}, {"formatter": "text"}
    >>> forgetting_advice(trainer, {"type": "lora"}, {"prose": prose})
    ['A lower learning rate: trainer.learning_rate=3e-05']
    """
    found = [f"A lower learning rate: trainer.learning_rate={0.3 * trainer.get('learning_rate', 2e-5):.0e}"]
    epochs = trainer.get("num_train_epochs", 3)
    if epochs > 1 and trainer.get("max_steps", -1) < 0:
        found.append(f"Fewer epochs: trainer.num_train_epochs={epochs // 2 or 1:g}")
    if adapter.get("type") == "none":
        found.append("Low-rank updates, from which the base model can always be had back: adapter=lora")
    sources = {name: source for name, source in data.items() if isinstance(source, Mapping)}
    if not any(is_raw_text(source.get("formatter")) for source in sources.values()):
        names = ",".join([*sources, "prose"])
        found.append(f"2 to 10 % of raw text in the mixture: 'data=[{names}]' data.prose.share=0.05")
    return found


def is_raw_text(formatter: Any) -> bool:
    """Whether a source's formatter takes its rows as raw text.

    >>> is_raw_text("text"), is_raw_text({"name": "text", "text": "body"}), is_raw_text("alpaca"), is_raw_text(None)
    (True, True, False, False)
    """
    return (formatter.get("name") if isinstance(formatter, Mapping) else formatter) == "text"
