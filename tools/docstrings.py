"""Docstrings as the site needs them, an extension of griffe: the code itself stays as it is."""

from __future__ import annotations

import re
from typing import Any

import griffe

__all__ = ["ForTheSite"]


class ForTheSite(griffe.Extension):  # type: ignore[misc]
    """``Example:`` is a section of code, as ``Examples:`` is, and names need no role of Sphinx."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the text of a docstring before it is parsed."""
        if obj.docstring is not None:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)
            text = re.sub(r":(?:class|func|meth|mod|attr|data|exc):(?=`)", "", text)
            obj.docstring.value = re.sub(r"``([^`]+)``", r"`\1`", text)
