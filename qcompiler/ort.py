"""ONNX Runtime with compiled models: replace ``import onnxruntime as ort`` by ``import qcompiler.ort as ort``.

`InferenceSession` compiles; every other name is ONNX Runtime's own. See docs/drop-in.md.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import onnxruntime

from qcompiler.dropin.optimizing import optimize_model
from qcompiler.dropin.session import InferenceSession
from qcompiler.dropin.session_options import SessionOptions
from qcompiler.dropin.settings import DropinOptions
from qcompiler.dropin.status import Status

if TYPE_CHECKING:
    import onnx

__all__ = ["DropinOptions", "InferenceSession", "SessionOptions", "Status", "optimize"]


def optimize(
    model: str | os.PathLike[str] | bytes | onnx.ModelProto, options: DropinOptions | Mapping[str, Any] | None = None
) -> bytes:
    """Return a model compiled for this processor, from the cache if it was compiled before.

    Without calibration data only dynamic forms are considered, and accuracy is not measured.

    Args:
        model: a path, serialized bytes or a ``ModelProto``.
        options: a `DropinOptions` or a mapping of its fields.

    Returns:
        The compiled model; the model as given, after one warning in the log, if it cannot be compiled.

    Raises:
        PassError: an unknown name among the options.
        OSError: the model cannot be read.
    """
    return optimize_model(model, options)


def __getattr__(name: str) -> Any:
    """Return any other name of ONNX Runtime."""
    try:
        return getattr(onnxruntime, name)
    except AttributeError:
        raise AttributeError(f"module 'onnxruntime' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    """List the names of ONNX Runtime and ours."""
    return sorted({*dir(onnxruntime), *__all__})
