"""Start the workers that build forms, one after another, and watch their memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

WORKER = Path(__file__).resolve().parent / "worker.py"
GIB = 1 << 30


@dataclass(frozen=True)
class BuildRequest:
    """What a worker is to build: a form of a model, with so many calibration feeds (None: all), into a file."""

    group: str
    name: str
    models: str | None
    form: str
    output: str
    feeds: int | None = None


@dataclass
class BuildResult:
    """What a worker says.

    Attributes:
        error: why there is no usable model, in a few words; None if it was built, loaded and ran once.
        seconds: of the compile step.
        peak_bytes: peak resident memory of the process during the compile step, interpreter and feeds included.
        before_bytes: resident memory in front of it.
        feeds: calibration feeds it got.
        size: bytes of the result.
        notes: what a form says of itself.
    """

    error: str | None = None
    seconds: float = 0.0
    peak_bytes: int = 0
    before_bytes: int = 0
    feeds: int = 0
    size: int = 0
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """Bounds of one build: resident bytes, and seconds."""

    memory: int = 6 * GIB
    seconds: float = 3600.0


def build(request: BuildRequest, limits: Limits) -> BuildResult:
    """Build one form in a process of its own.

    A form that needs more memory than allowed is stopped and tried again with half the feeds, down to one.
    """
    feeds = request.feeds
    while True:
        attempt = BuildRequest(request.group, request.name, request.models, request.form, request.output, feeds)
        result, too_large = _attempt(attempt, limits)
        if not too_large or feeds is None or feeds <= 1:
            return result
        feeds //= 2


def built_before(output: Path) -> BuildResult | None:
    """Return what an earlier run said of a form that it built to the end, None if there is no such form."""
    answer = output.parent / "result.json"
    if not answer.exists():
        return None
    result = BuildResult(**json.loads(answer.read_text(encoding="utf-8")))
    return None if result.error == "not tried" else result


def _attempt(request: BuildRequest, limits: Limits) -> tuple[BuildResult, bool]:
    """Return the result, and whether the process was stopped for its memory."""
    folder = Path(request.output).parent
    folder.mkdir(parents=True, exist_ok=True)
    asked, answer, said = (folder / name for name in ("request.json", "result.json", "stderr.log"))
    asked.write_text(json.dumps(asdict(request)), encoding="utf-8")
    answer.unlink(missing_ok=True)
    with said.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, str(WORKER), str(asked), str(answer)],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        try:
            stopped = _watch(process, limits)
        except BaseException:
            process.kill()
            process.wait()
            raise
    result = BuildResult(**json.loads(answer.read_text(encoding="utf-8"))) if answer.exists() else BuildResult()
    if stopped:
        return BuildResult(error=stopped, peak_bytes=limits.memory, feeds=request.feeds or 0), "memory" in stopped
    if process.returncode != 0:
        built = "built, but crashes when run" if answer.exists() else "does not build"
        result.error = f"{built}: {_ending(process.returncode, said)}"
    return result, False


def _watch(process: subprocess.Popen[bytes], limits: Limits) -> str | None:
    """Wait for the end of a process; return why it was stopped, if it was."""
    start = time.monotonic()
    while process.poll() is None:
        reason = None
        if _resident(process.pid) > limits.memory:
            reason = f"stopped: needs more memory than {limits.memory / GIB:.3g} GiB"
        elif time.monotonic() - start > limits.seconds:
            reason = f"stopped: takes longer than {limits.seconds:.0f} s"
        if reason is not None:
            process.kill()
            process.wait()
            return reason
        time.sleep(0.05)
    return None


def _resident(pid: int) -> int:
    """Return the resident bytes of a process, 0 where the system does not say."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _ending(code: int, said: Path) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:160] if lines else f"exit code {code}"
