"""networkx, imported so that no other package's broken metadata stops it.

At its import it looks for backends among the entry points of everything that is installed, and fails with the first
distribution whose metadata cannot be read (seen with networkx 3). We use none of its backends.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

__all__ = ["nx"]


@contextmanager
def _no_entry_points() -> Iterator[None]:
    kept = metadata.entry_points
    setattr(metadata, "entry_points", lambda **_: ())  # noqa: B010  # a module's function, which types hold constant
    try:
        yield
    finally:
        setattr(metadata, "entry_points", kept)  # noqa: B010


try:
    import networkx as nx
except ImportError:
    raise
except Exception:  # whatever reading damaged metadata raises
    for name in [n for n in sys.modules if n.partition(".")[0] == "networkx"]:
        del sys.modules[name]  # halves of the failed import
    with _no_entry_points():
        import networkx as nx
