"""Run the notebooks of the site in a kernel and store what they print.

    python -m tools.notebooks            # run all, write their outputs
    python -m tools.notebooks --check    # run all, write nothing
    python -m tools.notebooks encoder    # one

Only text is stored, without times and counts, so that a run that prints the same changes no file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

__all__ = ["FOLDER", "ran"]

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
SECONDS = 900  # of a cell


def ran(path: Path) -> nbformat.NotebookNode:
    """A notebook with the outputs of this run.

    Raises:
        CellExecutionError: If a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3").execute()
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.execution_count = None
            printed = [o for o in cell.outputs if o.get("name") == "stdout"]
            text = "".join(output.text for output in printed)
            cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
            cell.outputs = cell.outputs if text else []
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def main(words: list[str]) -> None:
    """Run all notebooks."""
    names = [word for word in words if word != "--check"] or ["*"]
    for path in sorted(path for name in names for path in FOLDER.glob(f"{name}.ipynb")):
        notebook = ran(path)
        if "--check" not in words:
            nbformat.write(notebook, path)
        print(f"{path.name} runs")


if __name__ == "__main__":
    main(sys.argv[1:])
