"""Pairs that do not belong together are refused with what to do about it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from qcompiler.errors import CalibrationError, ModelError
from qcompiler.evaluating.evaluate import evaluate
from qcompiler.evaluating.layers import trace_layers
from qcompiler.evaluating.pair import Pair, open_pair, read_feeds
from tests.evaluating.pairs import chain, write
from tests.passes.quantize.lab import model_of, normal


def test_swapped_models_are_named(tmp_path: Path) -> None:
    files = write(tmp_path)
    with pytest.raises(ModelError, match=r"look swapped: .*compiled.onnx is quantized and .*model.onnx is not"):
        open_pair(str(files.compiled), files.model)


def test_other_inputs_are_named(tmp_path: Path) -> None:
    files = write(tmp_path)
    other = chain()
    for node in other.graph.node:
        node.input[:] = ["data" if n == "x" else n for n in node.input]
    other.graph.input[0].name = "data"
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(ModelError, match="input 'data' is in one of them only"):
        open_pair(str(files.model), tmp_path / "other.onnx")


def test_other_shapes_are_named(tmp_path: Path) -> None:
    files = write(tmp_path)
    onnx.save(chain(width=16), tmp_path / "other.onnx")
    with pytest.raises(ModelError, match=r"input 'x' is \['n', 32\] in MODEL and \['n', 16\]"):
        open_pair(str(files.model), tmp_path / "other.onnx")


def test_missing_outputs_are_named(tmp_path: Path) -> None:
    files = write(tmp_path)
    other = chain()
    del other.graph.output[:]
    other.graph.output.append(helper.make_tensor_value_info("r0", 1, ["n", 32]))
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(ModelError, match="has no output 'y'; it has r0"):
        open_pair(str(files.model), tmp_path / "other.onnx")


def test_a_record_of_another_model_is_named(tmp_path: Path) -> None:
    from qcompiler.decisions import Decisions

    files = write(tmp_path)
    record = Decisions(forms={"nowhere/Conv": "static"}, context={"target": "ort-x86"})
    files.compiled.with_suffix(".decisions.json").write_text(record.to_json())
    pair = open_pair(str(files.model), files.compiled)
    with pytest.raises(ModelError, match="of another model: it names 'nowhere/Conv'"):
        trace_layers(pair, [{"x": np.zeros((1, 32), np.float32)}])


def test_what_is_no_onnx_model_has_no_layers(tmp_path: Path) -> None:
    files = write(tmp_path)
    pair = open_pair(str(files.model), files.compiled)
    plan = Pair(pair.given, pair.reference, pair.runner, tmp_path / "m.plan", None, None)
    assert "of a .plan cannot be read, only of an .onnx" in trace_layers(plan, []).note


def test_statistics_are_no_feeds(tmp_path: Path) -> None:
    files = write(tmp_path)
    pair = open_pair(str(files.model), files.compiled)
    with pytest.raises(CalibrationError, match="needs feeds, found statistics"):
        read_feeds(pair.reference.inputs, "some.qcal")
    with pytest.raises(CalibrationError, match=r"no feed|empty"):
        read_feeds(pair.reference.inputs, [])
    with pytest.raises(ModelError, match="no such file"):
        open_pair(str(files.model), tmp_path / "gone.onnx")


def test_sections_of_an_output_are_compared_apart(tmp_path: Path) -> None:
    """Boxes are exact and a hundred times larger than the probabilities, of which nothing is left."""
    body = "a = Conv(x, wb) b = Conv(x, wo) p = Sigmoid(b) y = Concat<axis=1>(a, {})"
    weights = {"wb": 100 * normal(1, 4, 3, 1, 1), "wo": normal(2, 2, 3, 1, 1)}
    paths = []
    for number, last in enumerate(("p", "z")):
        text = body.format(last) if last == "p" else body.format("z").replace(" y =", " z = Sub(p, p) y =")
        paths.append(tmp_path / f"{number}.onnx")
        onnx.save(model_of("float[1,3,4,4] x", "float[1,6,4,4] y", text, weights), paths[-1])
    feeds = [{"x": normal(seed, 1, 3, 4, 4)} for seed in range(3)]
    found = evaluate(
        paths[0], paths[1], feeds, metric=lambda outputs, feeds: float(len(outputs[0]["y"])), layer_feeds=0
    )
    assert {f.name: round(f.sqnr_db or 0.0, 6) for f in found.closeness.outputs} == {
        "y[:, 0:4]": 200.0,
        "y[:, 4:6]": 0.0,
    }
    assert found.task is not None  # the metric sees whole outputs
