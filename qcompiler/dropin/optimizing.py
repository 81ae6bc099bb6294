"""`qcompiler.ort.optimize`: a compiled model as bytes, by way of the cache."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qcompiler.dropin.jobs import registry
from qcompiler.dropin.planning import make_plan
from qcompiler.dropin.settings import DropinOptions, read_options

if TYPE_CHECKING:
    import onnx


def optimize_model(
    model: str | os.PathLike[str] | bytes | onnx.ModelProto, options: DropinOptions | Mapping[str, Any] | None
) -> bytes:
    """Do what `qcompiler.ort.optimize` says."""
    given = read_options(options)
    source = model if isinstance(model, str | os.PathLike | bytes) else model.SerializeToString()
    name = "model" if isinstance(source, bytes) else os.path.basename(os.fspath(source))
    try:
        settings = given.resolved()
        if settings.enabled:
            plan = make_plan(source, settings, 0, self_calibrating=False)
            if (entry := plan.find() or plan.make()) is None:
                registry().warn_of(name, "another process took too long to compile it")
            elif entry.refused:
                registry().warn_of(name, entry.refused)
            else:
                return entry.source if isinstance(entry.source, bytes) else _inlined(str(entry.source))
    except Exception as error:  # nothing of ours may stop a program that runs without us
        registry().warn_of(name, f"{error}")
    return source if isinstance(source, bytes) else _inlined(os.fspath(source))


def _inlined(path: str) -> bytes:
    """Return a model file as bytes, with its weights inside; unchanged where they are."""
    with open(path, "rb") as file:
        data = file.read()
    if b"location" not in data:
        return data
    import onnx

    made: bytes = onnx.load(path).SerializeToString()
    return made
