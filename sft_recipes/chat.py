"""Talk to a finished run: `python -m sft_recipes.chat outputs/lima/<date>`."""

import argparse
import contextlib
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, TextStreamer

from sft_recipes.config.nested_values import get_number
from sft_recipes.errors import exit_on_user_error, explained_files_of, one_line, plural, printable
from sft_recipes.modeling.inference import stop_token_ids
from sft_recipes.modeling.save_load import load_run
from sft_recipes.reporting.run_folder import read_json

HELP = """/base      the last question again, to the base model: the adapter is switched off; not kept in the history
/system …  the system message from here on; without a text there is none
/reset     forget the history
/tokens    the ids of the last question and answer
/quit      or Ctrl-D"""
SAMPLING = {"temperature": 0.7, "top_p": 0.9}  # what a report's sampled answers are drawn with


class PrintableStreamer(TextStreamer):
    """Prints a model's text without what a terminal would obey."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(printable(text), stream_end)


@dataclass
class Chat:
    """A model, what was said so far, and the ids of the last prompt and answer."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerFast
    options: dict[str, Any]  # of transformers.GenerationConfig
    messages: list[dict[str, str]] = field(default_factory=list)
    last_ids: dict[str, list[int]] = field(default_factory=dict)

    def ask(self, question: str) -> str:
        """Streams the answer to a question and says how it ended; both join the history once the answer is whole."""
        asked = [*self.messages, {"role": "user", "content": question}]
        text, ending = self.answer(asked)
        self.messages = [*asked, {"role": "assistant", "content": text}]
        return ending

    @torch.no_grad()
    def answer(self, messages: list[dict[str, str]]) -> tuple[str, str]:
        """Streams what the model says to these messages: its text, and how it ended."""
        inputs = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        saved = self.model.generation_config
        config = GenerationConfig(eos_token_id=saved.eos_token_id, pad_token_id=saved.pad_token_id, **self.options)
        streamer = PrintableStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        output = self.model.generate(**inputs, generation_config=config, streamer=streamer)[0].tolist()
        asked = inputs.input_ids.shape[1]
        ids = output[asked:]
        self.last_ids = {"prompt": output[:asked], "answer": ids}
        if ids and ids[-1] in stop_token_ids(saved):
            stop = self.tokenizer.convert_ids_to_tokens(ids[-1])
            return self.tokenizer.decode(ids[:-1]), f"■ stopped by itself with {stop} after {plural(len(ids), 'token')}"
        return self.tokenizer.decode(ids), f"… cut after {plural(len(ids), 'token')}, --max-new-tokens takes more"

    def base(self) -> str:
        """Streams the base model's answer to the last question; it leaves the history as it is."""
        if not isinstance(self.model, PeftModel):
            return "There is no adapter here to switch off: the weights are whole."
        if not any(message["role"] == "user" for message in self.messages):
            return "Ask something first."
        with self.model.disable_adapter():
            return f"base model: {self.answer(self.messages[:-1])[1]}"  # the last message is the tuned model's answer

    def system(self, text: str) -> str:
        """Sets the system message, in front of the history; says so where the template has no place for it."""
        rest = [message for message in self.messages if message["role"] != "system"]
        self.messages = [{"role": "system", "content": text}, *rest] if text else rest
        if not text:
            return "There is no system message now."
        shown = self.tokenizer.apply_chat_template(self.messages, tokenize=False)
        return "System message set." if text in shown else "The run's template leaves out system messages."

    def tokens(self) -> str:
        """The last prompt and answer token by token, with their ids."""
        words = self.tokenizer.convert_ids_to_tokens
        return "\n".join(
            " ".join([f"{name}:", *map("{}:{}".format, ids, words(ids))]) for name, ids in self.last_ids.items()
        )

    def command(self, line: str) -> str:
        """What a line beginning with / does, in words."""
        name, _, rest = line.partition(" ")
        if name == "/reset":
            self.messages = [message for message in self.messages if message["role"] == "system"]
            return "History forgotten."
        if name == "/system":
            return self.system(rest.strip())
        calls = {"/base": self.base, "/tokens": self.tokens, "/help": lambda: HELP}
        return calls[name]() if name in calls else f"There is no {name}; /help lists the commands."


def chat_loop(chat: Chat) -> None:
    """Reads questions and commands from the terminal until Ctrl-D or /quit."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() edits its line and remembers earlier ones
    print("Ask something; /help lists the commands.")
    while True:
        try:
            line = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt, RuntimeError):  # the last where stdin is closed
            return print()
        if line == "/quit":
            return None
        try:
            if line:
                print(dim_text(chat.command(line) if line.startswith("/") else chat.ask(line)))
        except KeyboardInterrupt:
            print(dim_text("… interrupted"))
        except Exception as error:  # a template may refuse the conversation, in words of its own
            print(dim_text(f"{type(error).__name__}: {one_line(error)}"))


def dim_text(text: str) -> str:
    """The text in grey, in a terminal."""
    return f"\033[2m{text}\033[0m" if sys.stdout.isatty() else text


def sampling_options(run: Path) -> dict[str, float]:
    """Temperature and top_p of the run's sampled answers."""
    measured = {key: get_number(read_json(run / "metrics.json"), f"after.sampled.{key}") for key in SAMPLING}
    return {key: measured[key] or default for key, default in SAMPLING.items()}


def main(arguments: list[str] | None = None) -> None:
    """Talks to a finished run's model, with the chat template it was saved with."""
    parser = argparse.ArgumentParser(prog="python -m sft_recipes.chat", description=main.__doc__)
    parser.add_argument("run", type=Path, help="outputs/NAME/DATE, or a merged folder")
    parser.add_argument("--prompt", help="one question; its answer is printed, and that is all")
    parser.add_argument("--system", default="", help="a system message")
    parser.add_argument("--sample", action="store_true", help="draw answers as the report's sampled ones; else greedy")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="where an answer is cut (512)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the base model")
    given = parser.parse_args(arguments)
    if given.max_new_tokens < 1:
        parser.error(f"--max-new-tokens should be at least 1, not {given.max_new_tokens}")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with exit_on_user_error(), explained_files_of(given.run):  # a template may be gone, or refuse what is said
        options = {"do_sample": given.sample, "max_new_tokens": given.max_new_tokens}
        options |= sampling_options(given.run) if given.sample else {}
        model, tokenizer = load_run(given.run, trust_remote_code=given.trust_remote_code)
        if torch.cuda.is_available() and not getattr(model, "is_loaded_in_4bit", False):
            model.to("cuda")
        chat = Chat(model, tokenizer, options)
        if given.system:
            chat.system(given.system)
        if given.prompt is None:
            chat_loop(chat)
        else:
            print(chat.ask(given.prompt), file=sys.stderr)


if __name__ == "__main__":
    main()
