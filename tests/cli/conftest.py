"""A small model, feeds for it, and a way to call the command line."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from qcompiler.cli import app

WIDTH = 64


def mlp(opset: int = 17, axis: str | int = "rows") -> onnx.ModelProto:
    """Return y = relu(x @ w0 + b0) @ w1 over x float32 [rows, 64], y float32 [rows, 16]."""
    random = np.random.default_rng(7)
    weights = {
        "w0": random.standard_normal((WIDTH, WIDTH)),
        "b0": random.standard_normal(WIDTH),
        "w1": random.standard_normal((WIDTH, 16)),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"], name="/first/MatMul"),
        helper.make_node("Add", ["a", "b0"], ["b"], name="/first/Add"),
        helper.make_node("Relu", ["b"], ["c"], name="/first/Relu"),
        helper.make_node("MatMul", ["c", "w1"], ["y"], name="/second/MatMul"),
    ]
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [axis, WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [axis, 16])],
        [numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@dataclass(frozen=True)
class Place:
    """A folder with ``model.onnx`` and ``feeds.npz``; everything the command line writes goes there, too."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model.onnx"

    @property
    def feeds(self) -> Path:
        return self.folder / "feeds.npz"

    @property
    def output(self) -> Path:
        return self.folder / "out.onnx"

    def save_feeds(self, name: str = "feeds.npz", **arrays: npt.NDArray[Any]) -> Path:
        path = self.folder / name
        np.savez(path, **arrays)
        return path

    def files(self) -> dict[str, bytes]:
        return {str(p.relative_to(self.folder)): p.read_bytes() for p in sorted(self.folder.rglob("*")) if p.is_file()}


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str


Call = Callable[..., Outcome]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    made = Place(tmp_path)
    onnx.save(mlp(), made.model)
    made.save_feeds(x=np.random.default_rng(0).standard_normal((160, WIDTH)).astype(np.float32))
    return made


@pytest.fixture
def call() -> Call:
    def run(*arguments: object) -> Outcome:
        done = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160"})
        return Outcome(done.exit_code, done.stdout, done.stderr)

    return run
