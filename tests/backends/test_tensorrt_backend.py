import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompiler.backends.onnxruntime import OrtRunner
from qcompiler.backends.readback import Planned
from qcompiler.backends.tensorrt.api import RTX, Flavour
from qcompiler.backends.tensorrt.backend import PlainOrtEngine, TrtBackend
from qcompiler.backends.tensorrt.probe import Prober
from qcompiler.engine import EngineOptions, ShapeRange
from qcompiler.errors import TargetError
from qcompiler.passes.lower_tensorrt import LowerTensorrt
from tests.backends.tensorrt_models import two_convolutions

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs TensorRT for RTX (extra trt-rtx)"
)
PLANNED = [Planned("conv1", "Conv", ("x",), ("relu:out",)), Planned("conv2", "Conv", ("relu:out",), ("conv2:out",))]


def test_lowering_is_tensorrts_own_and_has_no_operators() -> None:
    passes = TrtBackend(sm=89).lowering("auto")
    assert any(isinstance(step, LowerTensorrt) for step in passes)
    with pytest.raises(TargetError, match="TensorRT reads Q/DQ only"):
        TrtBackend(sm=89).lowering("qoperator")


def test_accuracy_is_computed_without_the_engines_optimizations() -> None:
    model = two_convolutions()
    runner = TrtBackend(sm=89).engine.load(model.SerializeToString(), EngineOptions(optimize=True))
    assert isinstance(runner, OrtRunner)
    assert runner.session.get_session_options().graph_optimization_level.name == "ORT_DISABLE_ALL"
    assert PlainOrtEngine().name == "onnxruntime"
    found = runner.run({"x": np.zeros((1, 8, 16, 16), np.float32)})["conv2:out"]
    assert found.shape == (1, 8, 16, 16)


@needs_rtx
def test_a_lowered_model_is_proven_by_a_build() -> None:
    proof = TrtBackend(sm=89).prove(PLANNED, ir.from_proto(two_convolutions()), EngineOptions())
    assert proof.fused == {"conv1": "Int8 x Int8 correlation", "conv2": "Int8 x Int8 correlation"}
    assert proof.missed == ()


@needs_rtx
def test_hopper_is_proven_on_ada_and_says_so() -> None:
    proof = TrtBackend(sm=90).prove(PLANNED, ir.from_proto(two_convolutions()), EngineOptions())
    assert len(proof.fused) == 2
    assert "tensorrt_rtx has no target sm90; this is from sm89" in proof.note


def test_without_a_flavour_the_proof_says_what_to_install() -> None:
    backend = TrtBackend(sm=89, prober=Prober(flavours=()))
    proof = backend.prove(PLANNED, ir.from_proto(two_convolutions()), EngineOptions())
    assert (proof.planned, proof.fused, proof.missed) == (2, {}, ())
    assert "pip install 'qcompiler[trt-rtx]'" in proof.note


@needs_rtx
def test_an_engine_is_written_for_the_shapes_that_were_given(tmp_path: Path) -> None:
    given = {"x": ShapeRange((1, 8, 16, 16), (2, 8, 16, 16), (4, 8, 16, 16))}
    written = TrtBackend(sm=89, profiles=given).save(ir.from_proto(two_convolutions("n")), tmp_path / "m.plan")
    assert written.files == (tmp_path / "m.plan",)
    assert written.note.startswith("built by tensorrt_rtx 1.")
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.plan"]


def test_where_nothing_builds_the_model_and_the_command_are_handed_out(tmp_path: Path) -> None:
    backend = TrtBackend(sm=90, prober=Prober(flavours=(Flavour(RTX, "1.7", (80, 89)),)))
    written = backend.save(ir.from_proto(two_convolutions("n")), tmp_path / "m.plan")
    assert written.files == (tmp_path / "m.plan.onnx",)
    assert len(onnx.load(tmp_path / "m.plan.onnx").graph.node) == len(two_convolutions().graph.node)
    shapes = [f"--{end}Shapes=x:{n}x8x16x16" for end, n in (("min", 1), ("opt", 1), ("max", 8))]
    line = f"trtexec --onnx={tmp_path}/m.plan.onnx --saveEngine={tmp_path}/m.plan --skipInference {' '.join(shapes)}"
    assert f"on a machine with TensorRT 11 and that GPU: {line}; x was built for" in written.note


def test_onnx_is_written_as_such(tmp_path: Path) -> None:
    written = TrtBackend(sm=89).save(ir.from_proto(two_convolutions()), tmp_path / "m.onnx")
    assert (written.files, written.note) == ((tmp_path / "m.onnx",), "")
    with pytest.raises(TargetError, match=r"openvino's own form, but the model was compiled for tensorrt"):
        TrtBackend(sm=89).save(ir.from_proto(two_convolutions()), tmp_path / "m.xml")


def test_the_package_is_imported_without_tensorrt() -> None:
    names = ["api", "build", "cuda", "layers", "probe", "profiles", "proof", "report", "runtime", "worker", "backend"]
    code = "import sys;" + ";".join(f"import qcompiler.backends.tensorrt.{name}" for name in names)
    code += ";sys.exit(any(n.split('.')[0] in ('tensorrt', 'tensorrt_rtx', 'torch') for n in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
