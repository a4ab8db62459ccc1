"""What MkDocs does besides its own work, as hooks of ``mkdocs.yml``.

Pages are written for GitHub, so some things are changed on the way to the site: links that leave
``docs/`` lead to the page of an example, to the source, or become plain code; notebooks, examples,
the changelog and CONTRIBUTING become pages. Nothing here asks the network for anything.
"""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).parent.parent
WHOLE = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
EXAMPLES = "examples.md"
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#|mailto:)([^)#\s]*)(#[^)\s]*)?\)")
# A resource, not a link to follow: what a browser would fetch by itself.
FETCHED = re.compile(r"<(?:script|img|source|iframe)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^>]*>")
FETCHED_STYLES = re.compile(r"<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|preload|preconnect))[^>]*//")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Anchors as GitHub makes them, so that one link fits both; versions where mike has some."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    if "MIKE_DOCS_VERSION" not in os.environ:
        config.extra.pop("version", None)
    return config


# ------------------------------------------------------------------------------------------- pages


def notebook_page(text: str) -> str:
    """A notebook as Markdown: its cells, and what they printed."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            printed = "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
            parts.append(f'<div class="output" markdown>\n\n```text\n{printed}\n```\n\n</div>')
    return "\n\n".join(parts) + "\n"


def summary_of(script: Path) -> str:
    """The first line of the docstring of a script."""
    return (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "").split("\n")[0]


def example_page(script: Path) -> str:
    """A script as a page."""
    path = script.relative_to(ROOT).as_posix()
    return f"# {script.name}\n\n`{path}`\n\n```python\n{script.read_text(encoding='utf-8')}```\n"


def examples_page(scripts: list[Path]) -> str:
    """The list of all scripts."""
    lines = [
        "# Examples",
        "",
        "One short script per use. Each runs as it is, in seconds, on made-up data: "
        "`python examples/NAME.py`. All of them run in the tests.",
        "",
    ]
    lines += [f"* [{s.name}](examples/{s.stem}.md): {summary_of(s)}" for s in scripts]
    lines += [
        "",
        "`examples/text_classification` is a whole program for your own data: a LightningCLI with "
        "YAML files and small pretrained encoders. `make demo` runs it.",
    ]
    return "\n".join(lines) + "\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made of files outside of ``docs/``, and of notebooks."""
    scripts = sorted((ROOT / "examples").glob("*.py"))
    pages = {name: (ROOT / source).read_text("utf-8") for name, source in WHOLE.items()}
    pages |= {f"examples/{script.stem}.md": example_page(script) for script in scripts}
    pages[EXAMPLES] = examples_page(scripts)
    for notebook in sorted(Path(config.docs_dir).glob("notebooks/*.ipynb")):
        pages[f"notebooks/{notebook.stem}.md"] = notebook_page(notebook.read_text("utf-8"))
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def folder_of(page: Page) -> str:
    """The folder of the source of a page, from the root of the repository."""
    if page.file.src_uri in WHOLE:
        return ""
    return f"docs/{page.file.src_uri}".rpartition("/")[0]


def place_on_site(target: str, page: Page, files: Files, config: MkDocsConfig) -> str:
    """Where a link that leaves ``docs/`` leads on the site; "" where there is nothing."""
    up: str = "../" * str(page.file.src_uri).count("/")
    if target.startswith("docs/"):
        return up + target.removeprefix("docs/")
    for name, source in WHOLE.items():
        if target == source:
            return up + name
    if target == "README.md":
        return up + "index.md"
    if target in ("examples", "examples/text_classification"):
        return up + EXAMPLES
    if files.get_file_from_path(re.sub(r"\.py$", ".md", target)) and target.endswith(".py"):
        return up + re.sub(r"\.py$", ".md", target)
    kind = "tree" if (ROOT / target).is_dir() else "blob"
    return f"{config.repo_url.rstrip('/')}/{kind}/main/{target}" if config.repo_url else ""


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links that leave ``docs/`` to where they are on the site."""
    folder = folder_of(page)
    if page.file.src_uri == "index.md":
        page.meta["hide"] = ["navigation"]

    def moved(found: re.Match[str]) -> str:
        text, path, anchor = found[1], found[2], found[3] or ""
        if not path:
            return found[0]
        target = _joined(folder, path)
        if target.endswith(".ipynb"):
            return f"[{text}]({path.removesuffix('.ipynb')}.md)"
        if target.startswith("docs/") and folder.startswith("docs"):
            return found[0]
        place = place_on_site(target, page, files, config)
        return f"[{text}]({place}{anchor})" if place else text

    pieces = re.split(r"(^```.*?^```$)", markdown, flags=re.S | re.M)
    return "".join(p if p.startswith("```") else LINK.sub(moved, p) for p in pieces)


def _joined(folder: str, path: str) -> str:
    parts = folder.split("/") if folder else []
    for part in path.rstrip("/").split("/"):
        parts = parts[:-1] if part == ".." else parts if part == "." else [*parts, part]
    return "/".join(parts)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that would fetch something from elsewhere; no stars are asked for either.

    Raises:
        PluginError: If it would.
    """
    found = FETCHED.search(output) or FETCHED_STYLES.search(output)
    if found:
        raise PluginError(f"{page.file.src_uri} fetches {found[0]!r}; expected files of the site.")
    source = Path(config.site_dir) / page.file.src_uri
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(page.markdown or "", encoding="utf-8")  # what llms.txt leads to
    return output.replace(' data-md-component="source"', "")
