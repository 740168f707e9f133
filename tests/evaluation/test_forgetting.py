"""The text that forgetting is measured on."""

from support.paths import ROOT


def test_the_prose_is_a_paragraph_a_line():
    lines = (ROOT / "sft_recipes" / "evaluation" / "prose.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(set(lines)) == 10
    assert all(line == line.strip() and 80 < len(line.split()) < 250 and line.isascii() for line in lines)
