"""What a compilation leaves on disk: the model, its decisions record and the report, all of them or none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from qcompiler.backends.backend import Written
from qcompiler.compiled import CompiledModel, staged_text


def report_json(compiled: CompiledModel) -> str:
    """Return the report as JSON text; figures that JSON has no number for (an infinite error) become null."""
    return plain_json(compiled.report.to_dict())


def write_results(compiled: CompiledModel, output: Path, report: Path | None = None) -> Written:
    """Write the model, its decisions record and the report: all of them or, on an error, none.

    Raises:
        QCompilerError: a file cannot be written.
    """
    if report is None:
        return compiled.save(output)
    with staged_text(report, report_json(compiled)):
        written = compiled.save(output)
    return Written((*written.files, report), written.note)


def plain_json(data: Any) -> str:
    """Return data as JSON text; figures that JSON has no number for (an infinite error) become null."""
    return json.dumps(_plain(data), indent=1, sort_keys=True, allow_nan=False) + "\n"


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
