"""OpenVINO through ONNX Runtime's execution provider: the same Q/DQ, for programs that call ONNX Runtime.

The provider comes with the package ``onnxruntime-openvino``, which takes the place of ``onnxruntime``. It hands the
whole graph to the CPU plugin of OpenVINO, which computes float operators in float32 unless told otherwise.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from qcompiler.backends.backend import AbsentBackend, Backend, OvBackend, Written, save_onnx
from qcompiler.backends.onnxruntime import OrtEngine, OrtRunner
from qcompiler.engine import EngineOptions, ModelLike
from qcompiler.errors import TargetError
from qcompiler.passes.lower_openvino import LowerOpenvino
from qcompiler.passes.store_half_precision import StoreHalfPrecision

NAME = "ort-openvino"
PROVIDER = "OpenVINOExecutionProvider"
INSTALL = (
    f"this build of onnxruntime lacks the {PROVIDER}: pip uninstall onnxruntime && pip install onnxruntime-openvino"
)
_ALONE = "pip install openvino, too: OpenVINO itself tells which layers it fused and what they cost"


class OrtOpenvinoEngine(OrtEngine):
    """ONNX Runtime with OpenVINO's execution provider on the CPU, ONNX Runtime's own kernels for what it leaves."""

    name = NAME

    @property
    def version(self) -> str:
        """Return the version of the installed ONNX Runtime."""
        return str(ort.__version__)

    def load(self, model: ModelLike, options: EngineOptions = EngineOptions()) -> OrtRunner:
        """Load a model on the provider, its graph as it is: ONNX Runtime's rewriting would take Q/DQ apart.

        Raises:
            ModelError: neither engine takes the model.
        """
        threads = {"num_of_threads": str(options.threads)} if options.threads else {}
        providers = [(PROVIDER, {"device_type": "CPU", **threads}), "CPUExecutionProvider"]
        return OrtRunner(self._session(model, _plain(options), providers))


def _plain(options: EngineOptions) -> ort.SessionOptions:
    made = ort.SessionOptions()
    made.intra_op_num_threads = options.threads
    made.log_severity_level = 4
    made.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return made


@dataclass(frozen=True)
class OrtOvBackend(OvBackend):
    """OpenVINO behind ONNX Runtime: forms are chosen on OpenVINO itself, which has figures per layer."""

    files: tuple[str, ...] = ("onnx",)

    @property
    def version(self) -> str:
        """Return the versions of both."""
        return f"{ort.__version__}, openvino {self.engine.version}"

    def save(self, model: ir.Model, path: Path) -> Written:
        """Write an ONNX model."""
        return save_onnx(model, path, NAME)


def open_provider(probe: bool) -> Backend:
    """Return the backend that compiles for the provider.

    Args:
        probe: whether the model is tried in a process of its own before.
    """
    if PROVIDER not in ort.get_available_providers():
        return AbsentBackend(NAME, (LowerOpenvino(), StoreHalfPrecision()), INSTALL)
    if importlib.util.find_spec("openvino") is None:
        return AbsentBackend(NAME, (LowerOpenvino(), StoreHalfPrecision()), _ALONE, engine=OrtOpenvinoEngine())
    from qcompiler.backends.openvino import OvEngine

    return OrtOvBackend(OvEngine(precision="f32", probe=probe))


def load_provider() -> Backend:
    """Return the backend that runs what was compiled for the provider.

    Raises:
        TargetError: this build of ONNX Runtime lacks it.
    """
    if PROVIDER not in ort.get_available_providers():
        raise TargetError(INSTALL)
    return OvBackend(OrtOpenvinoEngine())
