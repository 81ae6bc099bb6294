"""Which backend a target, an engine's name or a file asks for."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import onnx

from qcompiler.backends.backend import AbsentBackend, Backend, OrtBackend, OvBackend
from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.engine import ShapeRange
from qcompiler.errors import TargetError
from qcompiler.passes.lower_openvino import LowerOpenvino
from qcompiler.passes.store_half_precision import StoreHalfPrecision
from qcompiler.quant.formats import FORMATS
from qcompiler.targets.target import Target

ENGINE = "qcompiler.engine"
"""Metadata of a model that another engine than ONNX Runtime is to run."""


def engine_of(path: Path) -> str:
    """Return the name of the engine that a model file was compiled for; ONNX Runtime where it does not say.

    A file that is no model is left to the engine to refuse.
    """
    if path.suffix == ".xml":
        return "openvino"
    if path.suffix == ".qc":
        return "triton"
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # protobuf and the file system raise their own types
        return "onnxruntime"
    return next((p.value for p in model.metadata_props if p.key == ENGINE), "onnxruntime")


def open_backend(
    target: Target,
    profiles: Mapping[str, ShapeRange] | None = None,
    samples: Mapping[str, tuple[int, ...]] | None = None,
) -> Backend:
    """Return the backend of a target.

    Args:
        target: its table names the engine.
        profiles: ranges of input shapes, for engines that are built for such.
        samples: shape of a feed's arrays by input name, where no range was given.

    Raises:
        TargetError: no such engine.
    """
    if target.engine == "tensorrt":
        from qcompiler.backends.tensorrt.backend import TrtBackend

        return TrtBackend(sm=target.sm, profiles=profiles or {}, samples=samples or {})
    if target.engine == "triton":
        from qcompiler.backends.triton.backend import TritonBackend

        return TritonBackend(sm=target.sm, profiles=profiles or {}, samples=samples or {})
    if target.engine == "openvino" and importlib.util.find_spec("openvino") is None:
        from qcompiler.backends.openvino import INSTALL

        return AbsentBackend("openvino", (LowerOpenvino(), StoreHalfPrecision()), INSTALL)
    if target.engine == "openvino":
        from qcompiler.backends.openvino import OvEngine

        # Without samples the model has not been looked at: the first graph may crash the engine's compiler.
        return OvBackend(OvEngine(probe=samples is None))
    if target.engine == "ort-openvino":
        from qcompiler.backends.ort_openvino import open_provider

        return open_provider(probe=samples is None)
    if target.engine == "onnxruntime":
        return OrtBackend(reader=OrtEngine(signed=FORMATS[target.activation].signed))
    return engine_backend(target.engine)


def engine_backend(name: str) -> Backend:
    """Return the backend of an engine that runs on this machine, by its name.

    Raises:
        TargetError: no such engine, or it is not installed.
    """
    if name == "onnxruntime":
        return OrtBackend()
    if name == "openvino":
        from qcompiler.backends.openvino import OvEngine

        engine = OvEngine()
        _ = engine.version  # raises where OpenVINO is not installed
        return OvBackend(engine)
    if name == "triton":
        from qcompiler.backends.triton.backend import TritonBackend
        from qcompiler.backends.triton.engine import TritonEngine

        return TritonBackend(engine=TritonEngine())
    if name == "ort-openvino":
        from qcompiler.backends.ort_openvino import load_provider

        return load_provider()
    raise TargetError(
        f"there is no backend for the engine {name!r}; there are onnxruntime, openvino, ort-openvino, tensorrt and "
        "triton"
    )
