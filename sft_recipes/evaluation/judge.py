"""Base against tuned answers, judged at any OpenAI-compatible endpoint: `run_judge(answers, options)`."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sft_recipes.config.endpoint_options import JudgeOptions
from sft_recipes.errors import ConfigError
from sft_recipes.evaluation.endpoint import Endpoint, Reply, total_cost


def run_judge(answers: Sequence[Mapping[str, Any]], options: JudgeOptions) -> dict[str, Any]:
    """How often the tuned answer is better (`wins`), as good (`ties`) and worse (`losses`) than the base model's.

    `answers` are the lines of answers.jsonl. Each pair is judged in both orders; where the two verdicts differ it is a
    tie, and `inconsistent`. Equal answers are a tie that nobody is asked for. Rows of which a verdict could not be read
    are `unparsed`, rows of which a request failed are `failed`; neither counts in `win_rate`, which is the share of
    wins, ties as half, with its 95 % interval (Wilson). `cost` is in the currency of the prices.
    """
    judged = list(answers[: options.rows])
    template = Path(options.prompt).read_text(encoding="utf-8")
    prompts = [
        [{"role": "user", "content": fill_prompt(template, row, first)}]
        for row in judged for first in ("base", "tuned") if row["base"] != row["tuned"]
    ]  # fmt: skip
    judge = Endpoint(options, temperature=options.temperature)
    with ThreadPoolExecutor(options.concurrency) as pool:
        replies = list(pool.map(judge.ask, prompts))
    pairs, verdicts = zip(replies[::2], replies[1::2], strict=True), []
    for number, row in enumerate(judged):
        same = row["base"] == row["tuned"]
        verdicts.append({"row": number} | ({"verdict": "tie"} if same else combine_verdicts(*next(pairs))))
    count = Counter(entry["verdict"] for entry in verdicts)
    found = {"rows": len(judged), "wins": count["win"], "ties": count["tie"], "losses": count["loss"]}
    found |= {"inconsistent": sum(entry.get("inconsistent", False) for entry in verdicts)}
    found |= {"unparsed": count["unparsed"], "failed": count["failed"], "model": options.model}
    found |= {"error": next((reply.error for reply in replies if reply.error), None)}
    found |= win_rate(found["wins"], found["ties"], found["losses"])
    return found | total_cost(replies, options) | {"verdicts": verdicts}


def check_judge(options: JudgeOptions) -> None:
    """Asks the judge something small; raises ConfigError where it does not answer: url, key, model or temperature."""
    judge = Endpoint(options, temperature=options.temperature)
    judge.client.max_retries = 0
    reply = judge.ask([{"role": "user", "content": "Answer with one word: tie."}])
    if reply.error:
        raise ConfigError(judge.describe_failure(reply.error))


def fill_prompt(template: str, row: Mapping[str, Any], first: str) -> str:
    """The prompt for one order of a row's two answers; braces in the texts stay as they are.

    >>> fill_prompt("{prompt} A: {first} B: {second}", {"prompt": "{first}?", "base": "x", "tuned": "y"}, first="tuned")
    '{first}? A: y B: x'
    """
    texts = {"prompt": row["prompt"], "reference": row.get("reference", "")}
    texts |= {"first": row[first], "second": row["tuned" if first == "base" else "base"]}
    return re.sub(r"\{(prompt|reference|first|second)\}", lambda match: texts[match[1]], template)


def parse_verdict(text: str) -> str | None:
    """The last verdict in a judge's answer, `first`, `second` or `tie`; None where there is none.

    >>> parse_verdict("One could say Verdict: first, but no.\\n**Verdict:** Second"), parse_verdict("Both are fine.")
    ('second', None)
    """
    found = re.findall(r"\bverdict\W+(first|second|tie)\b", text, re.IGNORECASE)
    return found[-1].lower() if found else None


def combine_verdicts(base_first: Reply, tuned_first: Reply) -> dict[str, Any]:
    """One row's verdict from the two orders, which are kept with it.

    >>> combine_verdicts(Reply("Verdict: second"), Reply("Verdict: first"))
    {'verdict': 'win', 'base_first': 'tuned', 'tuned_first': 'tuned'}
    """
    words = {"base_first": {"first": "base", "second": "tuned"}, "tuned_first": {"first": "tuned", "second": "base"}}
    winners = {}
    for (order, names), reply in zip(words.items(), (base_first, tuned_first), strict=True):
        word = parse_verdict(reply.text)
        winners[order] = names.get(word, word)
    if base_first.error or tuned_first.error:
        return {"verdict": "failed"} | winners
    if None in winners.values():
        return {"verdict": "unparsed"} | winners
    if len(set(winners.values())) == 2:
        return {"verdict": "tie", "inconsistent": True} | winners
    return {"verdict": {"tuned": "win", "base": "loss", "tie": "tie"}[winners["base_first"]]} | winners


def win_rate(wins: int, ties: int, losses: int) -> dict[str, Any]:
    """The share of wins, a tie being half of one, and Wilson's 95 % interval (10.1080/01621459.1927.10502953).

    >>> win_rate(5, 0, 5)
    {'win_rate': 0.5, 'interval': [0.2366, 0.7634]}
    """
    number = wins + ties + losses
    if not number:
        return {"win_rate": None, "interval": None}
    share, z = (wins + ties / 2) / number, 1.959964
    middle = share + z * z / (2 * number)
    spread = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    ends = [(middle - spread) / (1 + z * z / number), (middle + spread) / (1 + z * z / number)]
    return {"win_rate": share, "interval": [round(end, 4) for end in ends]}
