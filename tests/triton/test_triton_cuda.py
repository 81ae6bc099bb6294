"""The executor for GPUs on a stand-in for torch.cuda: what is captured, when, and that replays compute."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import parser

torch = pytest.importorskip("torch", reason="the executor needs torch")

from qcompiler.backends.triton.cuda import CudaExecutor  # noqa: E402
from qcompiler.backends.triton.executor import MOST_PLANS, Executor  # noqa: E402
from qcompiler.backends.triton.program import Program, build_program  # noqa: E402
from tests.triton import models  # noqa: E402
from tests.triton.fake_cuda import FakeCuda, cuda  # noqa: E402, F401


def _program(text: str, **constants: np.ndarray) -> Program:
    model = parser.parse_model(text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in constants.items())
    return build_program(ir.from_proto(model))


def _x(*shape: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


RESIZED = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[1, 2, n, 6] x) => (float[p, q] y) {
  r = Resize <mode = "linear"> (x, , scales)
  c = CumSum (r, axis)
  y = Reshape (c, shape)
}
"""


def _resized() -> Program:
    return _program(
        RESIZED, scales=np.asarray([1, 1, 2, 1.5], np.float32), axis=np.asarray(3, np.int64),
        shape=np.asarray([2, -1], np.int64),
    )  # fmt: skip


def test_a_plan_is_warmed_up_on_a_side_stream_and_captured_once(cuda: FakeCuda) -> None:  # noqa: F811
    executor, plain = CudaExecutor(_resized()), Executor(_resized())
    for seed in range(3):
        x = _x(1, 2, 4, 6, seed=seed)
        torch.testing.assert_close(executor.run({"x": x}), plain.run({"x": x}), rtol=0, atol=0)
    assert cuda.events == [
        "side waits for main",
        "on side",
        "off side",
        "main waits for side",
        "pool",
        "capture in pool",
    ]
    assert [g.replays for g in cuda.graphs] == [3]


def test_graphs_share_memory_and_go_with_their_plans(cuda: FakeCuda) -> None:  # noqa: F811
    executor, plain = CudaExecutor(_resized()), Executor(_resized())
    for length in (*range(1, MOST_PLANS + 3), 1):
        x = _x(1, 2, length, 6)
        torch.testing.assert_close(executor.run({"x": x}), plain.run({"x": x}), rtol=0, atol=0)
    assert cuda.events.count("pool") == 1
    assert len(cuda.graphs) == MOST_PLANS + 3  # the first shape was captured again
    assert sum(p.graph is not None for p in executor.plans.values()) == MOST_PLANS


def test_results_survive_the_next_replay(cuda: FakeCuda) -> None:  # noqa: F811
    executor = CudaExecutor(_resized())
    first = executor.run({"x": _x(1, 2, 4, 6, seed=1)})["y"]
    kept = first.clone()
    executor.run({"x": _x(1, 2, 4, 6, seed=2)})
    torch.testing.assert_close(first, kept, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_compiled_models_are_captured(name: str, cuda: FakeCuda) -> None:  # noqa: F811
    data = models.feeds(3, 2, 3, 16, 16) if name == "cnn" else models.feeds(3, 2, 5, 32)
    made = models.compiled(models.residual_cnn() if name == "cnn" else models.mlp_block(), data)
    program = build_program(made.model)
    executor, plain = CudaExecutor(program), Executor(program)
    for feed in data:
        torch.testing.assert_close(executor.run(feed), plain.run(feed), rtol=0, atol=0)
    assert [g.replays for g in cuda.graphs] == [3]


BY_DATA = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[4] x, int64 axis) => (float[4] y) {
  y = CumSum (x, axis)
}
"""
CHOSEN = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[4] x) => (int64[1, k] y) {
  y = NonZero (x)
}
"""


def test_what_the_host_reads_of_data_is_not_captured(cuda: FakeCuda) -> None:  # noqa: F811
    executor = CudaExecutor(_program(BY_DATA))
    for _ in range(2):
        found = executor.run({"x": np.ones(4, np.float32), "axis": np.asarray(0, np.int64)})
        assert found["y"].tolist() == [1, 2, 3, 4]
    assert cuda.graphs == []
    assert cuda.events.count("on side") == 1


def test_shapes_that_depend_on_data_are_not_captured(cuda: FakeCuda) -> None:  # noqa: F811
    found = CudaExecutor(_program(CHOSEN)).run({"x": np.asarray([0, 3, 0, 1], np.float32)})
    assert found["y"].tolist() == [[1, 3]]
    assert cuda.events == []


def test_a_capture_that_fails_leaves_a_plan_that_runs(cuda: FakeCuda) -> None:  # noqa: F811
    cuda.refuse = True
    executor, x = CudaExecutor(_resized()), _x(1, 2, 4, 6)
    wanted = Executor(_resized()).run({"x": x})
    for _ in range(2):
        torch.testing.assert_close(executor.run({"x": x}), wanted, rtol=0, atol=0)
    assert cuda.events.count("capture in pool") == 1
