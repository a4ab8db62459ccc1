"""Every refusal of the package is a sentence: what was found, and what to do about it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "lightning_mi_prune"
REFUSALS = ("PruningError", "MisconfigurationException")


def text_of(node):
    """The words of a message, with * for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return "*"


def refusals():
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Call) and getattr(node.func, "id", "") in REFUSALS
            if named and node.args:
                text = text_of(node.args[0])
                if text.strip("*"):
                    name = f"{path.relative_to(PACKAGE)}:{node.lineno}"
                    yield pytest.param(text, id=name)


REMEDIES = (
    "expected",
    "xpected ",
    "; ",
    ". ",
    "?",
    "measure it here",
    "Delete the file",
)


@pytest.mark.parametrize("text", list(refusals()))
def test_a_refusal_is_a_sentence_with_a_remedy(text):
    assert "\n" not in text
    assert text[-1] in ".)*?'"  # a command to run may end it
    assert any(remedy in text for remedy in REMEDIES), text
    assert ":class:" not in text
    assert "``" not in text
    assert len(text) < 500
