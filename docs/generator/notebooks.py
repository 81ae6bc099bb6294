"""Run the notebooks of ``examples/`` and keep what they print: ``python -m docs.generator.notebooks``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOKS = ("01_compile_and_prove.ipynb", "02_why_is_it_not_faster.ipynb")


def execute(name: str, seconds: int = 300) -> Any:
    """Run a notebook in its folder, each cell within some seconds, and return it with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / name, as_version=4)  # type: ignore[no-untyped-call]  # nbformat has no types
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    NotebookClient(
        notebook, timeout=seconds, record_timing=False, resources={"metadata": {"path": str(EXAMPLES)}}
    ).execute()
    return notebook


def figures(notebook: Any) -> dict[str, Any]:
    """Return the key figures: the JSON that the cell tagged ``figures`` prints."""
    (cell,) = [c for c in notebook.cells if "figures" in c.metadata.get("tags", ())]
    made: dict[str, Any] = json.loads("".join(output["text"] for output in cell.outputs))
    return made


def main() -> None:
    """Run all and write them."""
    import nbformat

    for name in NOTEBOOKS:
        notebook = execute(name)
        notebook.metadata.language_info = {"name": "python"}
        nbformat.write(notebook, EXAMPLES / name)  # type: ignore[no-untyped-call]  # nbformat has no types
        print(name, figures(notebook))


if __name__ == "__main__":
    main()
