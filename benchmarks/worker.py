"""Build one form of one model in a process of its own, so that memory and crashes are its own: see `building`."""

from __future__ import annotations

import gc
import json
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path

from baselines import copy_model, form_named, open_runner
from building import BuildRequest, BuildResult
from subjects import load_subject


def main() -> None:
    """Read a request (first argument) and write the result (second argument), once built and once tried."""
    request = BuildRequest(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    result_path = Path(sys.argv[2])
    subject = load_subject(request.group, request.name, Path(request.models) if request.models else None)
    form = form_named(request.form)
    feeds = list(subject.calibration[: request.feeds])
    work = Path(request.output).parent / "source" / "model.onnx"
    copy_model(subject.path, work)
    feed = dict(subject.feed)
    del subject
    gc.collect()
    _forget_peak()
    before = _peak()
    start = time.perf_counter()
    try:
        notes = form.build(work, feeds, Path(request.output))
    except Exception as error:  # a quantizer may raise anything
        _write(result_path, BuildResult(error=f"does not build: {_short(error)}", peak_bytes=_peak(), feeds=len(feeds)))
        return
    seconds = time.perf_counter() - start
    peak = _peak()
    built = BuildResult("not tried", seconds, peak, before, len(feeds), _size(Path(request.output)), notes)
    _write(result_path, built)  # what follows may crash
    try:
        open_runner(form, Path(request.output)).run(feed)
    except Exception as error:
        built.error = f"does not run: {_short(error)}"
    else:
        built.error = None
    _write(result_path, built)


def _size(model: Path) -> int:
    """Return the bytes of a model and the files beside it (each form has a folder of its own)."""
    return sum(
        file.stat().st_size
        for file in model.parent.iterdir()
        if file.is_file() and file.suffix not in (".json", ".log")
    )


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:160]


def _forget_peak() -> None:
    """Let the kernel forget the peak of loading data, where it can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _peak() -> int:
    """Return the peak resident memory of this process in bytes.

    ``ru_maxrss`` counts what the parent held before this program was loaded, so the kernel's own figure comes first.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _write(path: Path, result: BuildResult) -> None:
    path.write_text(json.dumps(asdict(result)), encoding="utf-8")


if __name__ == "__main__":
    main()
