"""What other tools need besides the weights: a model card, and Ollama's Modelfile with the chat template."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import GenerationConfig, PreTrainedTokenizerFast

from sft_recipes.errors import escape_markdown, printable
from sft_recipes.modeling.inference import stop_token_ids
from sft_recipes.modeling.loading import load_adapter_config
from sft_recipes.modeling.save_load import saved_config
from sft_recipes.modeling.sentencepiece_model import is_sentencepiece

CONTENT_MARK = "\u00a7"
NO_SPACE_FLAG = "--override-kv tokenizer.ggml.add_space_prefix=bool:false"


def build_modelfile(tokenizer: PreTrainedTokenizerFast, generation: GenerationConfig) -> str:
    """Ollama's Modelfile for a model in the same folder, with its chat template and stop tokens."""
    stops = tokenizer.convert_ids_to_tokens(stop_token_ids(generation))
    template = ollama_template(tokenizer)
    if template is None:
        lines = ["# The chat template does not render every message by itself: convert to GGUF, which includes it."]
    else:
        lines = [f'TEMPLATE """{template}"""']
    # such a tokenizer adds a space before a text, and some of them after a special token, too
    if is_sentencepiece(tokenizer) and tokenizer.tokenize(f"{tokenizer.eos_token}a")[1] != "▁a":
        lines = [f"# No space stands behind a special token; for llama.cpp, too, with {NO_SPACE_FLAG}", *lines]
    return "\n".join(["FROM .", *lines, *(f'PARAMETER stop "{stop}"' for stop in stops)]) + "\n"


def ollama_template(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The chat template in Ollama's language, without the BOS, which Ollama adds; None where a message's text depends
    on the others.

    The text around a message of each role is found by rendering; a longer conversation has to equal their sum.
    """
    texts = {role: role_pieces(tokenizer, role) for role in ("system", "user", "assistant")}
    if None in texts.values() or any("{{" in part or '"""' in part for pair in texts.values() for part in pair):
        return None
    question = [{"role": "user", "content": CONTENT_MARK}]
    opening = render_served(tokenizer, question, add_generation_prompt=True).removeprefix(
        render_served(tokenizer, question)
    )
    conversation = [
        {"role": role, "content": f"{role} {CONTENT_MARK}"}
        for role in ("system", "user", "assistant", "user", "assistant")
    ]
    for messages in (conversation, conversation[1:]):
        joined = "".join(message["content"].join(texts[message["role"]]) for message in messages)
        if joined != render_served(tokenizer, messages):
            return None
    cases = "{{ else }}".join(
        f'{{{{ if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}' for role, (before, after) in texts.items()
    )
    return f"{{{{- range .Messages }}}}{cases}{'{{ end }}' * (len(texts) + 1)}{opening}"


def role_pieces(tokenizer: PreTrainedTokenizerFast, role: str) -> tuple[str, str] | None:
    """The template's text before and after a message of this role; None where the message is left out or changed."""
    order = ["system", "user", "assistant"]
    conversation = [{"role": name, "content": name} for name in order[: order.index(role) + 1]]
    try:
        shorter = render_served(tokenizer, conversation[:-1]) if len(conversation) > 1 else ""
        own = render_served(tokenizer, [*conversation[:-1], {"role": role, "content": CONTENT_MARK}])
    except Exception:  # templates refuse conversations with exceptions of any kind
        return None
    before, mark, after = own.removeprefix(shorter).partition(CONTENT_MARK)
    return (before, after) if mark and own.startswith(shorter) else None


def render_served(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], **options: Any) -> str:
    """The saved template's text, without the BOS at its beginning."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return text.removeprefix(tokenizer.bos_token or "")


def merged_model_card(run: Path) -> str:
    """The card of a merged model: its base, its training data, and code that asks it a question."""
    adapter, config = load_adapter_config(str(run)), saved_config(run)
    base = adapter.base_model_name_or_path if adapter else config["model"].get("id")
    named = base if base and not Path(base).exists() and "$" not in base else None  # the hub knows no local folder
    data = ModelCardData(
        base_model=named, library_name="transformers", pipeline_tag="text-generation", tags=["sft", "trl"]
    )
    sources = ", ".join(name for name, value in config.get("data", {}).items() if isinstance(value, dict))
    body = [
        f"# {escape_markdown(str(config.get('name', run.name)))}",
        escape_markdown(f"Fine-tuned from {named or 'a local model'}{f' on {sources}' if sources else ''}")
        + " with sft_recipes.",
        '```python\nfrom transformers import pipeline\n\nchat = pipeline("text-generation", "THIS FOLDER")\n'
        'print(chat([{"role": "user", "content": "Hello!"}])[0]["generated_text"][-1]["content"])\n```',
    ]
    return printable(str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n")))
