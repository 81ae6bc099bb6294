"""``python -m qcompiler.dropin.worker FOLDER KEY SAMPLES``: compile one model for the cache, beside a running service.

The order lies on standard input: a file without a name, or one that only its owner can read, which is gone as soon as
nobody holds it open. The first line on standard output says ``locked``, ``busy`` (another process compiles the same) or
``done`` (the entry is there); nothing follows.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from qcompiler.dropin.store import Cache

LOCKED, BUSY, DONE = "locked", "busy", "done"
_PATIENCE = 1.0
"""Seconds to wait for the lock: those who only look whether it is free hold it for a moment."""
NICE = "QCOMPILER_NICE"
"""Environment variable: how far everything else goes first, 0 (not at all) to 19."""
_NICE = 10
"""A tenth of what a busy service gets; with 19 a compilation beside a saturated one took longer than anyone waits."""


def main(arguments: list[str]) -> int:
    """Take the lock, say so, compile and publish."""
    cache, key, samples = Cache(Path(arguments[0])), arguments[1], int(arguments[2])
    _yield_processor()
    with cache.locked(key, _PATIENCE) as mine:
        if not mine:
            _say(BUSY)
            return 0
        entry = cache.load(key)
        if entry is not None and (entry.refused or entry.samples >= samples):
            _say(DONE)
            return 0
        _say(LOCKED)
        _build(samples)
    return 0


def _build(samples: int) -> None:
    import pickle

    from qcompiler.dropin.building import build

    # Standard input is the file that our own process wrote; nobody else can reach it.
    order, calibration = pickle.load(sys.stdin.buffer)
    build(order, calibration, samples)


def _say(word: str) -> None:
    with suppress(OSError, ValueError):  # who started this may be gone
        print(word, flush=True)
        sys.stdout.close()
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # lives as long as the process


def _yield_processor() -> None:
    """Let everything else go first, and outlive the terminal."""
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if hasattr(os, "nice"):
        with suppress(OSError, ValueError):
            os.nice(int(os.environ.get(NICE) or _NICE))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
