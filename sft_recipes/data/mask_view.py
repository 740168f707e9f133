"""The loss mask as a person sees it: in the terminal, with or without colour, and as HTML in a notebook."""

from collections.abc import Sequence
from html import escape
from typing import Any

from transformers import PreTrainedTokenizerFast

from sft_recipes.data.collator import CompletionOnlyCollator
from sft_recipes.encoding.encoder import IGNORE_INDEX, Encoder
from sft_recipes.errors import printable

Token = tuple[str, bool, bool]  # what it adds to the text, whether the loss is taken on it, whether it is a stop token
SUPERVISED, IGNORED_COLOUR = ("\033[30;42m", "\033[30;102m"), ("\033[38;5;250m", "\033[38;5;243m")
STOP_COLOUR = "\033[30;43m"
END_COLOUR = "\033[0m"
MASK_STYLE = """<style>
.sft-mask {font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  background: #fff; color: #666; padding: 1em}
.sft-mask span {border-radius: 3px; box-shadow: inset 0 0 0 1px #ddd}
.sft-mask .on {background: #b7ebc0; color: #073b12; box-shadow: inset 0 0 0 1px #7cc98b}
.sft-mask .stop {background: #ffe08a; color: #4a3800; box-shadow: inset 0 0 0 1px #d9b440}
.sft-mask i {opacity: .55; font-style: normal}
@media screen and (prefers-color-scheme: dark) {
  .sft-mask {background: #0d1117; color: #9198a1}
  .sft-mask span {box-shadow: inset 0 0 0 1px #30363d}
  .sft-mask .on {background: #12492a; color: #d3f9dc; box-shadow: inset 0 0 0 1px #2f7d4c}
  .sft-mask .stop {background: #6b5300; color: #ffedb3; box-shadow: inset 0 0 0 1px #a8861c}
}
</style>
"""
MASK_LEGEND = (
    '<div class="sft-mask"><span class="on">with loss</span> <span class="stop">stop token, with loss</span> '
    "<span>without loss</span>   · a space   → a tab   ⏎ a line break</div>"
)


class MaskHTML(str):
    """HTML that a notebook renders by itself."""

    def _repr_html_(self) -> str:
        return str(self)


def show_mask(row: Any, tokenizer: PreTrainedTokenizerFast, chat_template: str | None = None) -> MaskHTML:
    """A row of any format, or a list of messages, with the tokens that are trained on a green ground.

    `chat_template` is the name of one of ours, a path, or None for the tokenizer's own.
    """
    collate = CompletionOnlyCollator(tokenizer, chat_template)
    batch = collate([row])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    return MaskHTML(MASK_STYLE + render_html(mask_tokens(collate.encoder, ids, labels)))


def mask_tokens(encoder: Encoder, ids: Sequence[int], labels: Sequence[int]) -> list[Token]:
    """The text that each token adds; the tokens of one character that is spread over several stand together."""
    found, group, before = [], [], []
    tokenizer = encoder.tokenizer
    stops = {*encoder.stop_ids, tokenizer.eos_token_id}
    for position, (id, label) in enumerate(zip(ids, labels, strict=True)):
        group.append(id)
        text = tokenizer.decode(before + group)[len(tokenizer.decode(before)) :]
        following = position + 1 < len(ids) and (labels[position + 1] == IGNORE_INDEX) == (label == IGNORE_INDEX)
        if text.endswith("\ufffd") and following and len(group) < 6:
            continue
        found.append((text, label != IGNORE_INDEX, label != IGNORE_INDEX and id in stops))
        before, group = group[-1:], []
    return found


def show_whitespace(text: str) -> str:
    """The text with its whitespace and its control characters made visible.

    >>> show_whitespace("a b\\n")
    'a·b⏎'
    """
    return printable(text.replace(" ", "·").replace("\t", "→").replace("\r", "␍").replace("\n", "⏎"))


def render_terminal(row: Sequence[Token], width: int, colour: bool) -> str:
    """The tokens wrapped at `width`, parted by │ or in two shades.

    Supervised ones stand on green and their stop token on yellow, or without colour between ⟦ and ⟧ and before ■.
    """
    lines, line, used = [], "", 0
    for index, (text, supervised, stop) in enumerate(row):
        shown, begin, end = show_whitespace(text), "", ""
        if colour:  # two shades in turn, so that the borders of tokens show
            begin = STOP_COLOUR if stop else (SUPERVISED if supervised else IGNORED_COLOUR)[index % 2]
            end = END_COLOUR
        else:
            before = index > 0 and row[index - 1][1]
            after = index + 1 < len(row) and row[index + 1][1]
            shown = "⟦" * (supervised and not before) + shown + "■" * stop + ("⟧" if supervised and not after else "│")
        for start in range(0, len(shown), width):
            part = shown[start : start + width]
            if used + len(part) > width:
                lines.append(line)
                line, used = "", 0
            line += f"{begin}{part}{end}"
            used += len(part)
        if text.endswith("\n"):
            lines.append(line)
            line, used = "", 0
    return "\n".join([*lines, line] if line else lines)


def render_html(row: Sequence[Token]) -> str:
    """The tokens as one block of HTML, for STYLE."""
    spans = []
    for text, supervised, stop in row:
        kind = ' class="stop"' if stop else ' class="on"' if supervised else ""
        shown = escape(show_whitespace(text)).replace("·", "<i>·</i>")
        spans.append(f"<span{kind}>{shown}</span>" + "\n" * text.count("\n"))
    return f'<div class="sft-mask">{"".join(spans)}</div>'
