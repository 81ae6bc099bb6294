"""Make the checkout importable where it is not installed: a bare machine has Python and torch, and no registry."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

FOLDERS = ("passes", "patterns", "kernels")
"""Folders of the checkout that are packages under ``qcompiler`` once installed."""


def use_checkout() -> None:
    """Import ``qcompiler`` from this checkout, unless it is installed."""
    if importlib.util.find_spec("qcompiler") is None or importlib.util.find_spec("qcompiler.kernels") is None:
        if str(ROOT) not in sys.path:
            sys.path.insert(0, str(ROOT))
        for folder in FOLDERS:
            _register(f"qcompiler.{folder}", ROOT / folder)


def _register(name: str, folder: Path) -> None:
    places = [str(folder)]
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=places)
    assert spec is not None, folder
    assert spec.loader is not None, folder
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
