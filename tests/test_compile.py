"""The whole way on small models of every family: interfaces kept, bytes repeated, reports complete, files that run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qcompiler
from qcompiler.errors import QCompilerError
from tests import synthetic
from tests.families import COVERED, ENGINE, EVERY, FAMILIES, F, masked, plain, run, source
from tests.synthetic import feeds_of

# ---- every family --------------------------------------------------------------------------------------------------


@EVERY
def test_names_types_and_shapes_of_the_interface_are_kept(name: str) -> None:
    given, made = ENGINE.load(source(name)), ENGINE.load(plain(name).model)
    assert made.inputs == given.inputs
    assert made.outputs == given.outputs


@COVERED
@EVERY
def test_every_planned_fusion_is_made_and_close_to_float(name: str) -> None:
    report = plain(name).report.to_dict()
    family = FAMILIES[name]
    assert report["proof"]["missed"] == []
    assert report["proof"]["planned"] == report["proof"]["fused"] == family.planned
    assert sum(g["form"] != "float" for g in report["groups"]) == family.planned
    assert set(report["sqnr_db"]) == {o.name for o in ENGINE.load(source(name)).outputs}
    assert min(report["sqnr_db"].values()) >= family.least_db
    assert (report["integer_share"] > 0.99) is (family.planned > 0)


@EVERY
def test_two_builds_and_a_replay_are_the_same_bytes(name: str) -> None:
    made, feeds = plain(name), FAMILIES[name].feeds()
    again = qcompiler.compile(source(name), calibration=feeds, guard=False)
    assert again.to_bytes() == made.to_bytes()
    assert again.decisions.to_json() == made.decisions.to_json()
    replayed = qcompiler.compile(source(name), calibration=feeds, decisions=made.decisions)
    assert replayed.to_bytes() == made.to_bytes()
    assert replayed.decisions.forms == made.decisions.forms


@EVERY
def test_the_report_is_json_and_has_all_that_it_promises(name: str) -> None:
    report = json.loads(json.dumps(plain(name).report.to_dict(), allow_nan=False))
    promised = {"proof", "sqnr_db", "bytes_before", "bytes_after", "speedup", "integer_share", "passes"}
    assert promised <= set(report)
    assert set(report["proof"]) == {"planned", "fused", "missed", "kernels", "note"}
    assert report["bytes_before"] == len(source(name))
    assert report["bytes_after"] == len(plain(name).to_bytes())
    assert report["speedup"] is None  # without the guard nothing is timed
    steps = [p["pass"].partition("{")[0] for p in report["passes"]]
    assert steps[0] == "widen-half-precision"
    assert [s for s in steps if s in ("plan-quantization", "insert-qdq", "fuse-qdq", "lower-onnxruntime")] == [
        "plan-quantization", "insert-qdq", "fuse-qdq", "lower-onnxruntime",
    ]  # fmt: skip
    assert all(group["why"] for group in report["groups"])
    assert {"engine", "target", "processor", "recipe", "threads"} <= set(report["context"])


@EVERY
def test_the_model_given_is_not_changed(name: str) -> None:
    family = FAMILIES[name]
    model = ir.from_proto(onnx.load_from_string(source(name)))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    made = qcompiler.compile(model, calibration=family.feeds(), guard=False)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert made.to_bytes() == plain(name).to_bytes()


def test_a_model_is_taken_in_every_form(tmp_path: Path) -> None:
    proto = synthetic.residual_cnn()
    onnx.save(proto, tmp_path / "given.onnx")
    feeds = FAMILIES["residual"].feeds()
    for given in (tmp_path / "given.onnx", str(tmp_path / "given.onnx"), proto, ir.from_proto(proto)):
        assert qcompiler.compile(given, calibration=feeds, guard=False).to_bytes() == plain("residual").to_bytes()


# ---- what the families are about ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_another_batch_than_that_of_calibration_runs(batch: int) -> None:
    (feed,) = feeds_of({"x": (batch, 3, 16, 16)}, 1, seed=9)
    wanted, made = run(source("residual"), feed)["logits"], run(plain("residual").model, feed)["logits"]
    assert made.shape == wanted.shape == (batch, 10)
    assert 10 * np.log10(np.square(wanted).sum() / np.square(wanted - made).sum()) > 30


def test_another_length_than_that_of_calibration_runs() -> None:
    (feed,) = masked(length=20, count=1)
    wanted, made = run(source("transformer"), feed)["y"], run(plain("transformer").model, feed)["y"]
    assert made.shape == wanted.shape == (2, 20, 64)
    assert 10 * np.log10(np.square(wanted).sum() / np.square(wanted - made).sum()) > 30


@pytest.mark.parametrize("loud", [True, False])
def test_both_branches_run_on_integers(loud: bool) -> None:
    feed = {**feeds_of({"x": (5, 2, 64)}, 1, seed=9)[0], "loud": np.asarray(loud)}
    wanted, made = run(source("lstm in an If"), feed)["y"], run(plain("lstm in an If").model, feed)["y"]
    assert 10 * np.log10(np.square(wanted).sum() / np.square(wanted - made).sum()) > 30
    kernels = plain("lstm in an If").report.proof.fused
    assert kernels["lstm"] == "DynamicQuantizeLSTM"
    assert kernels["product"] in ("MatMulIntegerToFloat", "DynamicQuantizeMatMul")


@COVERED
@pytest.mark.parametrize("name", ["qdq int8", "qdq uint8"])
def test_an_imported_model_gives_the_same_integers(name: str) -> None:
    for feed in FAMILIES[name].feeds():
        wanted, made = (run(m, feed)["y"] for m in (source(name), plain(name).model))
        assert made.dtype == wanted.dtype
        np.testing.assert_array_equal(made, wanted)
    assert set(plain(name).report.proof.fused.values()) == {"QLinearConv"}


def test_float16_runs_on_integers_between_its_own_types() -> None:
    report = plain("float16").report
    assert set(report.proof.fused) == {"/m1", "/m2"}
    graph = plain("float16").model.graph
    assert [v.dtype for v in (*graph.inputs, *graph.outputs)] == [ir.DataType.FLOAT16] * 2


def test_a_state_can_be_fed_back_for_many_steps() -> None:
    """Errors in a contracting recurrence stay as small as after one step."""
    given, made = (ENGINE.load(m) for m in (source("state"), plain("state").model))
    rng = np.random.default_rng(4)
    state = exact = np.zeros((1, 64), F)
    for _ in range(30):
        x = rng.standard_normal((1, 64)).astype(F)
        exact = given.run({"x": x, "h0": exact})["hn"]
        state = made.run({"x": x, "h0": state})["hn"]
    assert 10 * np.log10(np.square(exact).sum() / np.square(exact - state).sum()) > 25


# ---- a saved model ------------------------------------------------------------------------------------------------

ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("qcompiler", "onnx_ir", "onnx"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
try:
    import qcompiler
except ImportError:
    pass
else:
    raise SystemExit("qcompiler can be imported")
import numpy as np
import onnxruntime as ort

model, feeds, results = sys.argv[1:]
options = ort.SessionOptions()
options.intra_op_num_threads = 1
session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
names = [o.name for o in session.get_outputs()]
np.savez(results, **dict(zip(names, session.run(None, dict(np.load(feeds))))))
"""


@pytest.mark.parametrize("name", ["residual", "transformer", "lstm in an If", "qdq int8"])
def test_a_saved_model_runs_where_qcompiler_is_not_installed(name: str, tmp_path: Path) -> None:
    made, feed = plain(name), FAMILIES[name].feeds()[0]
    made.save(tmp_path / "model.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.decisions.json", "model.onnx"]
    np.savez(tmp_path / "feeds.npz", **feed)
    arguments = [str(tmp_path / n) for n in ("model.onnx", "feeds.npz", "results.npz")]
    command = [sys.executable, "-c", ALONE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ}, check=False)
    assert done.returncode == 0, done.stderr
    results = np.load(tmp_path / "results.npz")
    for key, array in run(made.model, feed).items():
        np.testing.assert_array_equal(results[key], array)


def test_a_saved_model_is_loaded_behind_one_call(tmp_path: Path) -> None:
    plain("residual").save(tmp_path / "model.onnx")
    feed = FAMILIES["residual"].feeds()[0]
    loaded = qcompiler.load(tmp_path / "model.onnx", threads=1)
    np.testing.assert_array_equal(loaded.run(feed)["logits"], run(plain("residual").model, feed)["logits"])
    session = plain("residual").session(threads=1)
    np.testing.assert_array_equal(session.run(None, feed)[0], loaded.run(feed)["logits"])


@pytest.mark.parametrize("place", ["missing/model.onnx", "."])
def test_what_cannot_be_written_leaves_nothing_behind(place: str, tmp_path: Path) -> None:
    with pytest.raises(QCompilerError):
        plain("residual").save(tmp_path / place)
    assert list(tmp_path.iterdir()) == []


def test_weights_beside_the_model_are_counted_and_taken_in(tmp_path: Path) -> None:
    path = tmp_path / "given" / "model.onnx"
    path.parent.mkdir()
    onnx.save(synthetic.residual_cnn(), path, save_as_external_data=True, location="weights.bin", size_threshold=64)
    weights = path.with_name("weights.bin").stat().st_size
    made = qcompiler.compile(path, calibration=FAMILIES["residual"].feeds(), guard=False)
    assert made.report.bytes_before == path.stat().st_size + weights
    assert made.to_bytes() == plain("residual").to_bytes()
    (tmp_path / "out").mkdir()
    made.save(tmp_path / "out" / "model.onnx")
    feed = FAMILIES["residual"].feeds()[0]
    path.with_name("weights.bin").unlink()
    saved = run(tmp_path / "out" / "model.onnx", feed)
    np.testing.assert_array_equal(saved["logits"], run(plain("residual").model, feed)["logits"])
