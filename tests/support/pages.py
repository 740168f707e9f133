"""Single blocks of a page, as reports have them."""

from sft_recipes.reporting.document import load_environment, render_html, render_markdown

BLOCK = "{{ page[kind](*values) }}\n"
FOLDED = "{% call page.folded(*values) %}\n{{ page.text(inside) }}\n{% endcall %}\n"


def html_block(kind: str, *values, inside: str = "x", title: str = "t") -> str:
    """An HTML page with one block; what is folded has the text `inside`."""
    template = load_environment(True).from_string(FOLDED if kind == "folded" else BLOCK)
    return render_html(template, title, kind=kind, values=values, inside=inside)


def markdown_block(kind: str, *values, inside: str = "x") -> str:
    """A Markdown page with one block."""
    template = load_environment(False).from_string(FOLDED if kind == "folded" else BLOCK)
    return render_markdown(template, kind=kind, values=values, inside=inside)
