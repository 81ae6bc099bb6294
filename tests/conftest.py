"""Test the installed package: the checkout's own folder ``qcompiler`` lacks the packages that lie beside it."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# `python -m pytest` puts the working folder in front, where it would hide an installed copy.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
