"""Base against tuned answers, judged at any OpenAI-compatible endpoint: `run_judge(answers, options)`."""

import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

from sft_recipes.config.judge_options import JudgeOptions
from sft_recipes.errors import ConfigError, one_line


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Lets a redirect fail: the key goes to the host that the user named, and to no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


OPENER = urllib.request.build_opener(NoRedirects)
RETRY_WAITS = (1, 4, 16)  # seconds before each further try, where the server is busy and does not say how long


@dataclass(frozen=True)
class JudgeReply:
    """What came of one request: the judge's text or why there is none, and tokens where the server counts them."""

    text: str = ""
    input_tokens: int | None = 0
    output_tokens: int | None = 0
    error: str | None = None


def run_judge(answers: Sequence[Mapping[str, Any]], options: JudgeOptions) -> dict[str, Any]:
    """How often the tuned answer is better (`wins`), as good (`ties`) and worse (`losses`) than the base model's.

    `answers` are the lines of answers.jsonl. Each pair is judged in both orders; where the two verdicts differ it is a
    tie, and `inconsistent`. Equal answers are a tie that nobody is asked for. Rows of which a verdict could not be read
    are `unparsed`, rows of which a request failed are `failed`; neither counts in `win_rate`, which is the share of
    wins, ties as half, with its 95 % interval (Wilson). `cost` is in the currency of the prices.
    """
    judged = list(answers[: options.rows])
    template = Path(options.prompt).read_text(encoding="utf-8")
    pairs = [(row, order) for row in judged if row["base"] != row["tuned"] for order in ("base", "tuned")]
    questions = [fill_prompt(template, row, first) for row, first in pairs]
    with ThreadPoolExecutor(options.concurrency) as pool:
        replies = list(pool.map(partial(request_reply, options, tries=len(RETRY_WAITS) + 1), questions))
    heard = iter(replies)
    verdicts = []
    for number, row in enumerate(judged):
        two = [] if row["base"] == row["tuned"] else [next(heard), next(heard)]
        verdicts.append({"row": number} | combine_verdicts(*two) if two else {"row": number, "verdict": "tie"})
    count = Counter(entry["verdict"] for entry in verdicts)
    found = {"rows": len(judged), "wins": count["win"], "ties": count["tie"], "losses": count["loss"]}
    found |= {"inconsistent": sum(entry.get("inconsistent", False) for entry in verdicts)}
    found |= {"unparsed": count["unparsed"], "failed": count["failed"], "model": options.model}
    found |= {"error": next((reply.error for reply in replies if reply.error), None)}
    return (
        found
        | win_rate(found["wins"], found["ties"], found["losses"])
        | total_cost(replies, options)
        | {"verdicts": verdicts}
    )


def check_judge(options: JudgeOptions) -> None:
    """Asks the judge something small; raises ConfigError where it does not answer: url, key, model or temperature."""
    reply = request_reply(options, "Answer with one word: tie.", tries=1)
    if reply.error:
        key = "" if os.environ.get(options.api_key_env) else f" There is no key in {options.api_key_env}."
        raise ConfigError(f"evaluate.judge: {options.model} at {options.url} does not answer: {reply.error}.{key}")


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


def combine_verdicts(base_first: JudgeReply, tuned_first: JudgeReply) -> dict[str, Any]:
    """One row's verdict from the two orders, which are kept with it.

    >>> combine_verdicts(JudgeReply("Verdict: second"), JudgeReply("Verdict: first"))
    {'verdict': 'win', 'base_first': 'tuned', 'tuned_first': 'tuned'}
    """
    words = {"base_first": {"first": "base", "second": "tuned"}, "tuned_first": {"first": "tuned", "second": "base"}}
    said = {}
    for (order, names), reply in zip(words.items(), (base_first, tuned_first), strict=True):
        word = parse_verdict(reply.text)
        said[order] = names.get(word, word)
    if base_first.error or tuned_first.error:
        return {"verdict": "failed"} | said
    if None in said.values():
        return {"verdict": "unparsed"} | said
    if len(set(said.values())) == 2:
        return {"verdict": "tie", "inconsistent": True} | said
    return {"verdict": {"tuned": "win", "base": "loss", "tie": "tie"}[said["base_first"]]} | said


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


def total_cost(replies: Sequence[JudgeReply], options: JudgeOptions) -> dict[str, Any]:
    """Tokens and what they cost; None where the server did not count them, or no price is known."""
    read, written = ([getattr(reply, name) for reply in replies] for name in ("input_tokens", "output_tokens"))
    read, written = (None if None in tokens else sum(tokens) for tokens in (read, written))
    prices = options.price_per_million_input, options.price_per_million_output
    cost = None
    if None not in (read, written, *prices):
        cost = round((read * prices[0] + written * prices[1]) / 1e6, 6)
    return {"input_tokens": read, "output_tokens": written, "cost": cost}


def request_reply(options: JudgeOptions, question: str, tries: int) -> JudgeReply:
    """The judge's reply to one message; a busy server (429, 5xx, no connection) is asked again, up to `tries` times."""
    body = {"model": options.model, "messages": [{"role": "user", "content": question}]}
    if options.temperature is not None:
        body["temperature"] = options.temperature
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(options.api_key_env):
        headers["Authorization"] = f"Bearer {key}"
    address = options.url.rstrip("/") + "/chat/completions"
    for attempt in range(tries):
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        wait = RETRY_WAITS[min(attempt, len(RETRY_WAITS) - 1)]
        try:
            with OPENER.open(request, timeout=options.timeout) as response:
                return parse_reply(response.read())
        except urllib.error.HTTPError as error:
            why = f"HTTP {error.code} {one_line(Exception(error.read(2000).decode(errors='replace')))[:200]}"
            if error.code != 429 and error.code < 500:
                break
            asked = error.headers.get("Retry-After", "")
            wait = min(int(asked), 60) if asked.isdigit() else wait
        except (OSError, HTTPException, ValueError) as error:  # no connection, too slow, cut short, or no JSON
            why = one_line(error) or type(error).__name__
        if attempt + 1 < tries:
            time.sleep(wait)
    return JudgeReply(error=why.replace(key, "…") if key else why)


def parse_reply(body: bytes) -> JudgeReply:
    """A chat completion's text and tokens; raises ValueError for what is none."""
    try:
        values = json.loads(body)
        text = values["choices"][0]["message"]["content"] or ""
        usage = values.get("usage") or {}
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"not a chat completion: {body[:200].decode(errors='replace')}") from error
    return JudgeReply(text, usage.get("prompt_tokens"), usage.get("completion_tokens"))
