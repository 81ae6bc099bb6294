"""Make ``docs.generator`` importable; at the end of the path the checkout hides no installed package."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
