"""Write ``docs/llms.txt``, the list of all pages for programs that read: ``python -m tools.llms``.

It is made of the navigation of the site and of the first sentence of every page; a test compares.
The format is that of https://llmstxt.org; links lead to Markdown.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

__all__ = ["navigation", "text"]

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
WHOLE = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads ``mkdocs.yml``; what comes from the environment is left out."""


_Loader.add_constructor("!ENV", lambda loader, node: "")


def navigation() -> Iterator[tuple[str, str, str]]:
    """Section, title and file of every page, in the order of the site."""
    with (ROOT / "mkdocs.yml").open(encoding="utf-8") as file:
        read = yaml.load(file, _Loader)  # noqa: S506
    for entry in read["nav"]:
        (section, below), *_ = entry.items()
        pages = below if isinstance(below, list) else [entry]
        for page in pages:
            title, name = next(iter(page.items())) if isinstance(page, dict) else ("", page)
            yield section if isinstance(below, list) else "", title or section, name


def _source(name: str) -> str:
    """The text of a page."""
    notebook = DOCS / name.replace(".md", ".ipynb")
    if notebook.is_file():
        cells: list[dict[str, Any]] = json.loads(notebook.read_text("utf-8"))["cells"]
        return "".join(cells[0]["source"])
    if name == "examples.md":
        scripts = sorted((ROOT / "examples").glob("*.py"))
        first = [ast.get_docstring(ast.parse(s.read_text("utf-8"))) or "" for s in scripts]
        return f"# Examples\n\nOne short script per use, {len(first)} in all; each runs as it is."
    return (ROOT / WHOLE[name] if name in WHOLE else DOCS / name).read_text("utf-8")


def summary(name: str) -> str:
    """The first sentence of a page, without its links."""
    without_code = re.sub(r"^```.*?^```$", "", _source(name), flags=re.M | re.S)
    body = re.sub(r"^(?:#|!\[|<!--|:::).*$", "", without_code, flags=re.M)
    parts = (part.strip("\n") for part in body.split("\n\n"))
    found = next((part for part in parts if re.match(r"\w|`", part)), "")
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)|\*\*", r"\1", " ".join(found.split()))
    sentence = re.match(r".+?[.?](?= |$)", plain)
    return (sentence[0] if sentence else plain).rstrip(".:") + "."


def text() -> str:
    """The whole file."""
    lines = ["# lightning-mi-prune", "", f"> {summary('index.md')}", ""]
    lines += ["Every page is Markdown. Errors and warnings of the package: messages.md.", ""]
    section = ""
    for here, title, name in navigation():
        if here != section:
            section = here
            lines += ["", f"## {section}", ""]
        lines.append(f"- [{title}]({name}): {summary(name)}")
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


if __name__ == "__main__":
    (DOCS / "llms.txt").write_text(text(), encoding="utf-8")
