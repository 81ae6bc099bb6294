"""The reference models beside the checkout, where there are any: import changes no output."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from qcompiler.ir.importer import import_model
from qcompiler.ir.phase import Phase
from qcompiler.ir.serialize import to_bytes
from qcompiler.ir.verify import verify

FOLDER = Path(__file__).parents[3] / "shared" / "models"
MODELS = sorted(FOLDER.glob("*/model.onnx"))
TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}

pytestmark = pytest.mark.models


def session(model: str | bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model, options)


def feeds(inputs: list[ort.NodeArg]) -> dict[str, np.ndarray]:
    """Return random data of small open axes; an integer scalar is taken for a sampling rate."""
    rng = np.random.default_rng(0)
    ranks = {len(i.shape) for i in inputs}
    made = {}
    for i in inputs:
        shape = [d if isinstance(d, int) else (1 if 0 in ranks and axis == 0 else 8) for axis, d in enumerate(i.shape)]
        if 0 in ranks:  # a streaming model: batch 1, a window of samples, a state of its own
            shape = [d if isinstance(d, int) else 1 for d in i.shape] if len(i.shape) == 3 else shape
            shape = [1, 576] if len(i.shape) == 2 else shape
        kind = TYPES[i.type]
        if kind is np.float32:
            made[i.name] = rng.standard_normal(shape).astype(kind)
        else:
            made[i.name] = np.asarray(16000, kind) if not shape else rng.integers(0, 2, shape).astype(kind)
    return made


@pytest.mark.skipif(not MODELS, reason="no reference models beside the checkout")
@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.parent.name)
def test_import_keeps_the_outputs(path: Path) -> None:
    model = import_model(path)
    verify(model, Phase.FLOAT)
    data = to_bytes(model)
    onnx.checker.check_model(data)
    before, after = session(str(path)), session(data)
    for given, kept in ((before.get_inputs(), after.get_inputs()), (before.get_outputs(), after.get_outputs())):
        assert [(v.name, v.type) for v in given] == [(v.name, v.type) for v in kept]
    arrays = feeds(before.get_inputs())
    for first, second in zip(before.run(None, arrays), after.run(None, arrays), strict=True):
        # A softmax along the last axis may be summed in another order than the flattened one.
        bound = 16 * np.finfo(np.float32).eps * np.abs(first.astype(np.float64)).max()
        assert np.abs(first.astype(np.float64) - second).max() <= bound
