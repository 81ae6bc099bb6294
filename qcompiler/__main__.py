"""Run the command line as ``python -m qcompiler``."""

from __future__ import annotations

from qcompiler.cli import main

if __name__ == "__main__":
    main()
