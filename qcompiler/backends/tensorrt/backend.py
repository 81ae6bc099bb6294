"""TensorRT as the compiler needs it: lower, prove by a build, write."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx_ir as ir

from qcompiler.backends.backend import RunsLowered, Written, save_onnx
from qcompiler.backends.onnxruntime import OrtEngine, OrtRunner
from qcompiler.backends.readback import Planned, Proof
from qcompiler.backends.tensorrt.api import TENSORRT, find_flavours
from qcompiler.backends.tensorrt.build import build_plan, trtexec_line
from qcompiler.backends.tensorrt.probe import Prober
from qcompiler.backends.tensorrt.profiles import settle_profiles
from qcompiler.backends.tensorrt.proof import prove_engine
from qcompiler.engine import Engine, EngineOptions, ModelLike, ShapeRange
from qcompiler.errors import TargetError
from qcompiler.ir.graph import all_nodes, shape_of
from qcompiler.ir.serialize import MAX_INLINE_BYTES, save_model, to_bytes, weight_bytes
from qcompiler.pipeline.base import Pass

PLAN = ".plan"
NO_PROOF = (
    "nothing was built, so nothing is proven: pip install 'qcompiler[trt-rtx]' proves it on this machine, without a GPU"
)


class PlainOrtEngine(OrtEngine):
    """ONNX Runtime without its graph optimizations: Q/DQ computes what it says, and nothing is timed."""

    def load(self, model: ModelLike, options: EngineOptions = EngineOptions()) -> OrtRunner:
        """Load a model on the CPU provider, as it is.

        Raises:
            ModelError: ONNX Runtime refuses the model.
        """
        return super().load(model, replace(options, optimize=False))


@dataclass(frozen=True)
class TrtBackend(RunsLowered):
    """TensorRT for one compute capability; ONNX Runtime computes what accuracy is measured on.

    Attributes:
        sm: compute capability to build for, 89 for 8.9.
        profiles: shapes of inputs with open axes; what is left out is derived, and said.
        samples: shape of one calibration batch per input, to derive from.
        prober: builds, and remembers.
        engine: computes the emitted model.
    """

    sm: int
    profiles: Mapping[str, ShapeRange] = field(default_factory=dict)
    samples: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    prober: Prober = field(default_factory=Prober, compare=False)
    engine: Engine = field(default_factory=PlainOrtEngine)
    emits_operators: bool = False
    measures: bool = False
    files: tuple[str, ...] = ("onnx", "plan")

    @property
    def version(self) -> str:
        """Return flavour and version of what is installed, empty if nothing is."""
        found = find_flavours()
        return f"{found[0].name} {found[0].version}" if found else ""

    def lowering(self, emit: str) -> tuple[Pass, ...]:
        """Return the passes from FUSED to LOWERED: TensorRT reads Q/DQ and nothing else.

        Raises:
            TargetError: integer operators are asked for.
        """
        if emit == "qoperator":
            raise TargetError("emit is 'qoperator', but TensorRT reads Q/DQ only; leave --emit away")
        from qcompiler.passes.assign_float_type import AssignFloatType
        from qcompiler.passes.lower_tensorrt import LowerTensorrt
        from qcompiler.passes.store_half_precision import StoreHalfPrecision

        return LowerTensorrt(), AssignFloatType(), StoreHalfPrecision()

    def twin(self, model: ir.Model) -> tuple[Pass, ...]:
        """Return passes that write block quantization in standard operators, where the model has TensorRT's own."""
        from qcompiler.passes.assign_float_type import AssignFloatType
        from qcompiler.passes.block_operators import TRT_DOMAIN
        from qcompiler.passes.lower_tensorrt import LowerTensorrt

        own = any(node.domain == TRT_DOMAIN for node in all_nodes(model))
        return (LowerTensorrt(standard=True), AssignFloatType()) if own else ()

    def draft(self) -> tuple[Pass, ...]:
        """Return passes that leave what is not quantized in float32."""
        from qcompiler.passes.lower_tensorrt import LowerTensorrt

        return (LowerTensorrt(standard=True),)

    def prove(self, planned: Sequence[Planned], model: ir.Model, options: EngineOptions) -> Proof:
        """Build the lowered model and match the engine's layers with what was planned."""
        if not self.prober.available():
            return Proof(len(planned), note=NO_PROOF)
        with _stored(model) as source:
            report = self.prober.probe(source, [self.sm], self.profiles, self.samples)[self.sm]
        return prove_engine(planned, report, model)

    def save(self, model: ir.Model, path: Path) -> Written:
        """Write ONNX, or an engine for a path that ends in .plan.

        Where no flavour builds for the compute capability, the ONNX model is written beside the path, and the note has
        the command that makes the engine.

        Raises:
            ModelError: the path cannot be written, or TensorRT does not take the model.
            TargetError: the suffix is of another engine, or a range does not fit the model.
        """
        if path.suffix != PLAN:
            return save_onnx(model, path, TENSORRT)
        if self.prober.builds(self.sm):
            with _stored(model) as source:
                report = build_plan(source, self.sm, self.profiles, path, self.prober, self.samples)
            return Written((path,), "; ".join((f"built by {report.flavour} {report.version}", *report.notes)))
        onnx_path = path.with_name(f"{path.name}.onnx")  # not NAME.onnx: that may be the model that was compiled
        written = save_onnx(model, onnx_path, TENSORRT)
        inputs = {str(value.name): shape_of(value) or () for value in model.graph.inputs}
        ranges, notes = settle_profiles(inputs, self.profiles, self.samples)
        line = trtexec_line(onnx_path, path, ranges)
        said = f"nothing installed here builds for sm{self.sm}; on a machine with TensorRT 11 and that GPU: {line}"
        return Written(written.files, "; ".join((said, *notes)))


@contextmanager
def _stored(model: ir.Model) -> Iterator[bytes | Path]:
    """Hand a model out as bytes, or as a file where they would not fit into one protobuf."""
    if weight_bytes(model) <= MAX_INLINE_BYTES:
        yield to_bytes(model)
        return
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
        path = Path(folder) / "model.onnx"
        save_model(model, path)
        yield path
