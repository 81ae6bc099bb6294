"""Layers: a planted scale is where the error is born, an ill-conditioned layer is where it grows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from qcompiler.evaluating.layers import trace_layers
from qcompiler.evaluating.pair import open_pair, read_feeds
from tests.evaluating.pairs import F, chain, quantized_chain, write


def trace(files):
    pair = open_pair(str(files.model), files.compiled)
    return trace_layers(pair, read_feeds(pair.reference.inputs, str(files.feeds)))


@pytest.mark.parametrize("broken", range(4))
@pytest.mark.parametrize("factor", [20.0, 0.2], ids=["too wide", "clipped"])
def test_a_broken_scale_is_where_the_error_is_born(tmp_path: Path, broken: int, factor: float) -> None:
    found = trace(write(tmp_path, broken=broken, factor=factor))
    first = found.born[0]
    assert first.value == f"r{broken}"
    assert first.own_db < found.born[1].own_db - 10
    assert set(first.origins) & {f"fc{broken}", f"bias{broken}", f"relu{broken}"}
    if factor < 1:
        assert first.clipped > 0.1
        assert max(f.clipped for f in found.layers if f.value != first.value) == 0.0
    # What comes later carries the error, but does not bear it.
    later = [f for f in found.layers if f.value > first.value and f.value.startswith("r")]
    assert all(f.carried_db < f.own_db for f in later)
    assert found.histograms[0].name == f"r{broken}"


def test_own_carried_and_accumulated_are_what_they_say(tmp_path: Path) -> None:
    files = write(tmp_path)
    found = {f.value: f for f in trace(files).layers}
    assert list(found) == ["r0", "r1", "r2", "r3", "y"]
    data = np.load(files.feeds)["x"][:32]
    weights = {i.name: numpy_helper.to_array(i).astype(np.float64) for i in onnx.load(files.model).graph.initializer}
    scales = {i.name: numpy_helper.to_array(i) for i in onnx.load(files.compiled).graph.initializer}

    def layer(i: int, x: np.ndarray) -> np.ndarray:
        return np.maximum(x @ weights[f"w{i}"] + weights[f"b{i}"], 0)

    def stored(i: int, x: np.ndarray) -> np.ndarray:
        scale = float(scales[f"r{i}:scale"])
        return np.clip(np.rint(x / scale), 0, 255) * scale

    def db(wanted: np.ndarray, actual: np.ndarray) -> float:
        return float(10 * np.log10(np.square(wanted).sum() / np.square(wanted - actual).sum()))

    data = np.load(files.feeds)["x"]
    first = layer(0, data)
    here = stored(0, first)
    exact, local = layer(1, first), layer(1, here)
    assert found["r0"].own_db == pytest.approx(db(first, here), abs=0.05)
    assert found["r1"].own_db == pytest.approx(db(local, stored(1, local)), abs=0.05)
    assert found["r1"].carried_db == pytest.approx(db(exact, local), abs=0.05)
    assert found["r1"].accumulated_db == pytest.approx(db(exact, stored(1, local)), abs=0.05)
    assert found["r1"].inputs_db == pytest.approx(found["r0"].accumulated_db)
    assert found["r1"].growth_db == pytest.approx(found["r0"].accumulated_db - found["r1"].carried_db)
    assert found["r0"].inputs_db is None
    assert found["r0"].growth_db == 0.0
    assert found["y"].own_db > 100
    reach = found["r0"].reach
    assert reach == pytest.approx((0.0, 255 * float(scales["r0:scale"])))


def test_a_layer_that_cancels_its_signal_is_where_the_error_grows(tmp_path: Path) -> None:
    model = chain()
    weights = {i.name: i for i in model.graph.initializer}
    # Columns that sum to almost nothing: the common part of the input vanishes, its rounding does not.
    wide = np.random.default_rng(3).standard_normal((32, 32))
    for i in (1,):
        values = numpy_helper.to_array(weights[f"b{i}"]) + 6.0
        weights[f"b{i}"].CopyFrom(numpy_helper.from_array(values.astype(F), f"b{i}"))
    weights["w2"].CopyFrom(numpy_helper.from_array(((wide - wide.mean(0)) * 0.2).astype(F), "w2"))
    data = np.random.default_rng(9).standard_normal((96, 32)).astype(F)
    onnx.save(model, tmp_path / "model.onnx")
    onnx.save(quantized_chain(model, data), tmp_path / "compiled.onnx")
    np.savez(tmp_path / "feeds.npz", x=data)
    pair = open_pair(str(tmp_path / "model.onnx"), tmp_path / "compiled.onnx")
    found = trace_layers(pair, read_feeds(pair.reference.inputs, str(tmp_path / "feeds.npz")))
    assert found.grown[0].value == "r2"
    assert found.grown[0].growth_db > 3


def test_histograms_count_every_element(tmp_path: Path) -> None:
    found = trace(write(tmp_path, broken=1, factor=0.2))
    for h in found.histograms:
        assert h.reference.sum() == h.compiled.sum() == 96 * 32
        assert np.all(np.diff(h.edges) > 0)
    worst = found.histograms[0]
    assert worst.name == "r1"
    assert worst.reach is not None
    beyond = worst.edges[:-1] > worst.reach[1]
    assert worst.reference[beyond].sum() > 0.05 * worst.reference.sum()
    assert worst.compiled[beyond].sum() == 0, "nothing is stored beyond the range"
    assert worst.clipped > 0.1


def test_models_without_a_common_name_have_no_layers(tmp_path: Path) -> None:
    x, y = helper.make_tensor_value_info("x", 1, [1, 4]), helper.make_tensor_value_info("y", 1, [1, 4])
    for name, op in (("model", "Relu"), ("compiled", "Relu")):
        graph = helper.make_graph([helper.make_node(op, ["x"], ["y"], name=f"n-{name}")], "g", [x], [y])
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10),
            tmp_path / f"{name}.onnx",
        )
    pair = open_pair(str(tmp_path / "model.onnx"), tmp_path / "compiled.onnx")
    found = trace_layers(pair, [{"x": np.ones((1, 4), F)}])
    assert found.born == ()
    assert found.grown == ()
