"""Keep the solver's stray lines off standard output."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_STRAY = b"HighsMipSolverData::"


@contextmanager
def without_stray_lines() -> Iterator[None]:
    """Drop the debugging lines of HiGHS while a block runs; what else is written meanwhile comes out after it.

    HiGHS 1.12 (in SciPy 1.17) prints them from C whatever it is told (ERGO-Code/HiGHS#2783), which would spoil what a
    command writes for other programs. Nothing is done on Windows, or where there is no standard output.
    """
    if os.name == "nt":
        yield
        return
    _flush()
    try:
        kept = os.dup(1)
    except OSError:
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 1)
        try:
            yield
        finally:
            _flush()
            os.dup2(kept, 1)
            os.close(kept)
            held.seek(0)
            lines = [line for line in held.readlines() if not line.startswith(_STRAY)]
            if lines:
                os.write(1, b"".join(lines))


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()
    # C keeps a buffer of its own: it must be emptied while the descriptor points where it is meant to go.
    ctypes.CDLL(None).fflush(None)
