"""The whole way on small models of every family: interfaces kept, bytes repeated, reports complete."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qcompiler
from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.compiler import CompiledModel, Options, compile_model
from qcompiler.engine import Array, EngineOptions, Feeds
from qcompiler.errors import BudgetError, PassError, QCompilerError, TargetError
from qcompiler.targets.host import Processor
from tests import synthetic
from tests.search.machine import InventedMachine
from tests.synthetic import feeds_of

F = np.float32
ENGINE = OrtEngine()


def typed(feeds: list[dict[str, Array]], dtype: type) -> list[dict[str, Array]]:
    return [{n: a.astype(dtype) for n, a in f.items()} for f in feeds]


def integers(dtype: type, count: int = 6) -> list[dict[str, Array]]:
    rng = np.random.default_rng(0)
    middle = 128 if dtype is np.uint8 else 0
    return [{"x": (rng.integers(-60, 60, (2, 8, 8, 8)) + middle).astype(dtype)} for _ in range(count)]


def masked(length: int = 12, count: int = 6) -> list[dict[str, Array]]:
    mask = (np.arange(length) < length - 3).astype(F).reshape(1, 1, 1, length).repeat(2, 0)
    return [{**f, "mask": mask} for f in feeds_of({"x": (2, length, 64)}, count)]


def chosen(count: int = 6) -> list[dict[str, Array]]:
    return [{**f, "loud": np.asarray(i % 2 == 0)} for i, f in enumerate(feeds_of({"x": (5, 2, 64)}, count))]


@dataclass(frozen=True)
class Family:
    """A model, its data, how many groups run on integers by rule, and the least SQNR in dB."""

    model: Callable[[], onnx.ModelProto]
    feeds: Callable[[], list[dict[str, Array]]]
    planned: int
    least_db: float = 30.0


FAMILIES: Mapping[str, Family] = {
    "residual": Family(synthetic.residual_cnn, lambda: feeds_of({"x": (2, 3, 16, 16)}), 6),
    "transformer": Family(synthetic.transformer_block, masked, 6),
    "lstm in an If": Family(synthetic.lstm_in_if, chosen, 2),
    "qdq int8": Family(lambda: synthetic.qdq_cnn(np.int8), lambda: integers(np.int8), 2, 200.0),
    "qdq uint8": Family(lambda: synthetic.qdq_cnn(np.uint8), lambda: integers(np.uint8), 2, 200.0),
    "float16": Family(synthetic.half_mlp, lambda: typed(feeds_of({"x": (4, 64)}), np.float16), 0, 60.0),
    "bfloat16": Family(synthetic.brain_mlp, lambda: typed(feeds_of({"x": (4, 64)}), ml_dtypes.bfloat16), 2),
    "two outputs": Family(synthetic.two_heads, lambda: feeds_of({"x": (1, 8, 16, 16)}), 3),
    "state": Family(synthetic.recurrent_step, lambda: feeds_of({"x": (1, 64), "h0": (1, 64)}), 3),
}
EVERY = pytest.mark.parametrize("name", FAMILIES)


@functools.cache
def source(name: str) -> bytes:
    return FAMILIES[name].model().SerializeToString()


@functools.cache
def plain(name: str) -> CompiledModel:
    """Return a build by the recipe's rules, which no test changes."""
    return qcompiler.compile(source(name), calibration=FAMILIES[name].feeds(), guard=False)


def nodes(made: CompiledModel) -> list[ir.Node]:
    return list(made.model.graph.all_nodes())


def run(model: ir.Model | bytes | Path, feed: Feeds, *, optimize: bool = True) -> dict[str, Array]:
    return ENGINE.load(model, EngineOptions(threads=1, optimize=optimize)).run(feed)


# ---- every family --------------------------------------------------------------------------------------------------


@EVERY
def test_names_types_and_shapes_of_the_interface_are_kept(name: str) -> None:
    given, made = ENGINE.load(source(name)), ENGINE.load(plain(name).model)
    assert made.inputs == given.inputs
    assert made.outputs == given.outputs


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
    assert set(report["proof"]) == {"planned", "fused", "missed", "kernels"}
    assert report["bytes_before"] == len(source(name))
    assert report["bytes_after"] == len(plain(name).to_bytes())
    assert report["speedup"] is None  # without the guard nothing is timed
    steps = [p["pass"].partition("{")[0] for p in report["passes"]]
    assert steps[0] == "import-qdq"
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


@pytest.mark.parametrize("name", ["qdq int8", "qdq uint8"])
def test_an_imported_model_gives_the_same_integers(name: str) -> None:
    for feed in FAMILIES[name].feeds():
        wanted, made = (run(m, feed)["y"] for m in (source(name), plain(name).model))
        assert made.dtype == wanted.dtype
        np.testing.assert_array_equal(made, wanted)
    assert set(plain(name).report.proof.fused.values()) == {"QLinearConv"}


def test_float16_says_why_it_stays_as_it_is() -> None:
    why = {g.group: g.why for g in plain("float16").report.groups}
    assert all("not-float32" in text and "float16" in text for text in why.values())
    assert list(why) == ["/m1", "/m2"]


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
    onnx.save(
        synthetic.residual_cnn(), path, save_as_external_data=True, location="weights.bin", size_threshold=64
    )
    weights = path.with_name("weights.bin").stat().st_size
    made = qcompiler.compile(path, calibration=FAMILIES["residual"].feeds(), guard=False)
    assert made.report.bytes_before == pytest.approx(path.stat().st_size + weights, abs=0)
    assert made.to_bytes() == plain("residual").to_bytes()
    (tmp_path / "out").mkdir()
    made.save(tmp_path / "out" / "model.onnx")
    feed = FAMILIES["residual"].feeds()[0]
    path.with_name("weights.bin").unlink()
    saved = run(tmp_path / "out" / "model.onnx", feed)
    np.testing.assert_array_equal(saved["logits"], run(plain("residual").model, feed)["logits"])


# ---- data ----------------------------------------------------------------------------------------------------------


class Endless:
    """A re-iterable that is no sequence."""

    def __init__(self, feeds: list[dict[str, Array]]) -> None:
        self.feeds = feeds

    def __iter__(self) -> Iterator[dict[str, Array]]:
        return iter(self.feeds)


@pytest.mark.parametrize("kind", ["generator", "callable", "re-iterable", "npz"])
def test_calibration_may_come_in_any_form(kind: str, tmp_path: Path) -> None:
    feeds = FAMILIES["two outputs"].feeds()
    if kind == "npz":
        np.savez(tmp_path / "feeds.npz", x=np.stack([f["x"] for f in feeds]))
    forms = {
        "generator": (f for f in feeds), "callable": lambda: iter(feeds), "re-iterable": Endless(feeds),
        "npz": tmp_path / "feeds.npz",
    }  # fmt: skip
    made = qcompiler.compile(source("two outputs"), calibration=forms[kind], guard=False)  # type: ignore[arg-type]
    assert made.to_bytes() == plain("two outputs").to_bytes()


def test_without_data_only_dynamic_forms_are_left_and_the_report_says_so() -> None:
    made = qcompiler.compile(source("transformer"), guard=False)
    forms = {g.form for g in made.report.groups}
    assert forms == {"float", "dynamic"}
    assert made.report.quality is None
    (warning,) = made.report.warnings
    assert warning.startswith("no calibration data: only dynamic forms were considered and accuracy was not measured")
    assert made.to_bytes() == plain("transformer").to_bytes()  # by rule, products are dynamic with data as well
    convolutions = qcompiler.compile(source("residual"), guard=False)
    assert {g.form for g in convolutions.report.groups} == {"float"}


def test_without_data_a_dynamic_form_that_wins_is_kept() -> None:
    made = compile_model(source("transformer"), Options(stopwatch=InventedMachine()))
    assert {g.group for g in made.report.groups if g.form == "dynamic"} == {
        "/attn/q/MatMul", "/attn/k/MatMul", "/attn/v/MatMul", "/attn/o/MatMul", "/mlp/up", "/mlp/down",
    }  # fmt: skip
    assert made.report.speedup is not None
    assert made.report.speedup > 1.0


def test_random_data_is_used_on_request_and_warned_about() -> None:
    made = qcompiler.compile(source("two outputs"), random_calibration=4, guard=False)
    assert {g.form for g in made.report.groups} >= {"static"}
    assert [w for w in made.report.warnings if w.startswith("calibrated with random data, as asked")]
    assert made.to_bytes() == qcompiler.compile(source("two outputs"), random_calibration=4, guard=False).to_bytes()


def test_a_single_feed_serves_for_all_and_is_warned_about() -> None:
    made = qcompiler.compile(source("two outputs"), calibration=FAMILIES["two outputs"].feeds()[:1], guard=False)
    assert [w for w in made.report.warnings if w.startswith("a single calibration feed serves")]


# ---- what a user asks for ------------------------------------------------------------------------------------------


def overridden(tmp_path: Path, text: str, name: str = "transformer", **more: object) -> dict[str, str]:
    (tmp_path / "pins.toml").write_text(text)
    made = qcompiler.compile(
        source(name), calibration=FAMILIES[name].feeds(), guard=False, overrides=tmp_path / "pins.toml"
    )
    return {g.group: g.form for g in made.report.groups}


def test_a_glob_keeps_groups_in_float(tmp_path: Path) -> None:
    forms = overridden(tmp_path, '[[override]]\nmatch = "/attn/*/MatMul"\nform = "float"\n')
    assert {n for n, f in forms.items() if f == "dynamic"} == {"/mlp/up", "/mlp/down"}


def test_a_later_override_wins(tmp_path: Path) -> None:
    text = '[[override]]\nmatch = "*"\nform = "float"\n[[override]]\nmatch = "/mlp/up"\nform = "static-float"\n'
    forms = overridden(tmp_path, text)
    assert {n: f for n, f in forms.items() if f != "float"} == {"/mlp/up": "static-float"}


def test_a_glob_forces_dynamic_against_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "pins.toml").write_text('[[override]]\nmatch = "/mlp/*"\nform = "dynamic"\n')
    pins = '[[override]]\nmatch = "/mlp/[ud]*"\nform = "dynamic"\n'
    (tmp_path / "pins.toml").write_text(pins)
    made = qcompiler.compile(
        source("transformer"), calibration=masked(), guard=False, recipe="int8-static", overrides=tmp_path / "pins.toml"
    )
    forms = {g.group: g.form for g in made.report.groups}
    assert (forms["/mlp/up"], forms["/mlp/down"], forms["/attn/q/MatMul"]) == ("dynamic", "dynamic", "static-float")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[override]]\nmatch = "/nothing/*"\nform = "float"', "matches no group; groups are named like: /attn"),
        ('[[override]]\nmatch = "/mlp/up"\nform = "static"', "/mlp/up cannot be static; it can be float, static-float"),
        ('[[override]]\nmatch = "/mlp/up"\nform = "int3"', "form is 'int3'; expected one of"),
    ],
)
def test_an_override_that_cannot_be_met_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(PassError, match=message):
        overridden(tmp_path, text)


def closeness(reference: Sequence[Array]) -> Callable[[Sequence[Mapping[str, Array]], Sequence[Feeds]], float]:
    """Return the metric 1 - relative error against given outputs."""

    def metric(outputs: Sequence[Mapping[str, Array]], feeds: Sequence[Feeds]) -> float:
        wrong = sum(float(np.square(o["y"] - r).sum()) for o, r in zip(outputs, reference, strict=True))
        return 1.0 - (wrong / sum(float(np.square(r).sum()) for r in reference)) ** 0.5

    return metric


@pytest.mark.parametrize(("budget", "loss"), [("drop<=50pt", 0.5), ("drop<=0.6pt", 0.006), ("drop<=0.001%", 1e-5)])
def test_a_budget_on_a_metric_is_kept(budget: str, loss: float) -> None:
    feeds = masked()
    reference = [run(source("transformer"), f)["y"] for f in feeds]
    options = Options(
        calibration=feeds, evaluation=feeds, metric=closeness(reference), budget=budget, stopwatch=InventedMachine()
    )
    made = compile_model(source("transformer"), options)
    metric = made.report.to_dict()["metric"]
    assert metric >= 1.0 - loss
    integer = sum(g.form != "float" for g in made.report.groups)
    assert integer == 6 if loss == 0.5 else integer < 6
    if loss == 1e-5:
        assert integer == 0
    else:
        assert metric < 1.0
    returned = [name for step in made.report.returned for name in step["groups"]]
    assert len(set(returned)) >= 6 - integer
    assert all(made.decisions.why[name].startswith("float: the accuracy guard measured") for name in returned)


def test_a_budget_without_what_it_measures_is_refused() -> None:
    with pytest.raises(BudgetError, match="a drop budget needs a metric"):
        qcompiler.compile(source("residual"), budget="drop<=1pt")
    with pytest.raises(BudgetError, match="a metric needs evaluation data"):
        qcompiler.compile(source("residual"), metric=lambda outputs, feeds: 1.0)


@pytest.mark.parametrize("least", [10.0, 42.0, 60.0])
def test_the_least_sqnr_is_met_for_every_output(least: float) -> None:
    options = Options(
        calibration=FAMILIES["two outputs"].feeds(), min_sqnr=least, stopwatch=InventedMachine(integer_us=20.0)
    )
    made = compile_model(source("two outputs"), options)
    found = made.report.to_dict()["sqnr_db"]
    assert min(found.values()) >= least
    forms = {g.group: g.form for g in made.report.groups if g.operator == "Conv"}
    expected = {10.0: 3, 60.0: 0}.get(least)
    assert expected is None or sum(f == "static" for f in forms.values()) == expected
    assert any(step["demanded"] for step in made.report.returned) is (least > 40)
    assert made.report.warnings == ()


def test_a_bound_that_a_pinned_group_breaks_is_warned_about(tmp_path: Path) -> None:
    (tmp_path / "pins.toml").write_text('[[override]]\nmatch = "/trunk"\nform = "static"\n')
    options = Options(
        calibration=FAMILIES["two outputs"].feeds(), min_sqnr=100.0, overrides=tmp_path / "pins.toml",
        stopwatch=InventedMachine(),
    )  # fmt: skip
    made = compile_model(source("two outputs"), options)
    assert {g.group: g.form for g in made.report.groups}["/trunk"] == "static"
    (warning,) = made.report.warnings
    assert warning.startswith("the accuracy bound (boxes 100 dB, scores 100 dB) is not met: boxes ")


# ---- forms of the output ---------------------------------------------------------------------------------------------

INTEGER_OPS = {"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"}


@pytest.mark.parametrize("name", ["residual", "transformer", "two outputs"])
@pytest.mark.parametrize("recipe", ["int8", "int8-static"])
def test_emitting_qdq_leaves_only_standard_operators(name: str, recipe: str) -> None:
    feeds = FAMILIES[name].feeds()
    made = qcompiler.compile(source(name), calibration=feeds, guard=False, emit="qdq", recipe=recipe)
    found = {(n.domain, n.op_type) for n in nodes(made)}
    assert {d for d, _ in found} == {""}
    assert not {op for _, op in found} & INTEGER_OPS
    assert "DequantizeLinear" in {op for _, op in found}
    assert all(v == 21 for d, v in made.model.opset_imports.items() if d == "")
    assert min(made.report.to_dict()["sqnr_db"].values()) > 30


@pytest.mark.parametrize("name", ["residual", "transformer", "two outputs"])
@pytest.mark.parametrize("recipe", ["int8", "int8-static"])
def test_emitting_qoperator_leaves_no_dequantization_around_fused_groups(name: str, recipe: str) -> None:
    feeds = FAMILIES[name].feeds()
    made = qcompiler.compile(source(name), calibration=feeds, guard=False, emit="qoperator", recipe=recipe)
    planned = {g.group for g in made.report.groups if g.form != "float"}
    assert planned
    present = {str(n.name): n for n in nodes(made)}
    for group in planned:
        node = present[group]
        producers = {p.op_type for v in node.inputs if v is not None and (p := v.producer()) is not None}
        assert "DequantizeLinear" not in producers, group
        readers = {use.node.op_type for v in node.outputs for use in v.uses()}
        assert "QuantizeLinear" not in readers, group
    assert made.report.proof.missed == ()
    assert set(made.report.proof.fused) == planned
    assert min(made.report.to_dict()["sqnr_db"].values()) > 30


def test_a_form_of_output_that_does_not_exist_is_refused() -> None:
    with pytest.raises(PassError, match="emit is 'int4'; expected auto, qdq or qoperator"):
        qcompiler.compile(source("residual"), emit="int4")


# ---- other machines --------------------------------------------------------------------------------------------------


def test_a_target_that_is_not_this_machine_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = Processor("aarch64", "Other Processor", frozenset({"asimddp"}))
    monkeypatch.setattr("qcompiler.compiler.detect", lambda: elsewhere)
    watch = InventedMachine()
    options = Options(target="ort-x86", calibration=FAMILIES["residual"].feeds(), stopwatch=watch)
    made = compile_model(source("residual"), options)
    assert (watch.profiles, watch.compared) == (0, [])
    assert made.report.speedup is None
    (warning,) = made.report.warnings
    assert warning.startswith("target ort-x86 is not this machine (Other Processor); nothing was timed")
    assert made.report.context["processor"] == "Other Processor"
    assert {g.group for g in made.report.groups if g.form == "static"} >= {"/block/Conv1", "/block/Conv2"}


def test_a_processor_that_no_table_covers_gets_the_safe_form(monkeypatch: pytest.MonkeyPatch) -> None:
    old = Processor("x86_64", "Old Processor", frozenset({"avx2"}))
    monkeypatch.setattr("qcompiler.compiler.detect", lambda: old)
    made = compile_model(source("residual"), Options(calibration=FAMILIES["residual"].feeds(), guard=False))
    assert made.report.context["target"] == "ort-generic"
    assert made.report.warnings[0].startswith("no table covers this processor (x86_64 Old Processor)")
    weights = [
        v.const_value.numpy() for v in made.model.graph.initializers.values()
        if v.const_value is not None and v.dtype is ir.DataType.INT8 and len(v.const_value.shape) == 4
    ]  # fmt: skip
    assert weights
    assert max(int(np.abs(w.astype(int)).max()) for w in weights) <= 64  # 7 bits: no sum of two products saturates


def test_an_unknown_target_is_refused_with_those_there_are() -> None:
    with pytest.raises(TargetError, match="unknown target 'abacus'.*ort-x86"):
        qcompiler.compile(source("residual"), target="abacus")


# ---- records ---------------------------------------------------------------------------------------------------------


def test_a_record_of_another_model_is_refused() -> None:
    with pytest.raises(PassError, match="the decisions record is of another model: it names '/block/Add'"):
        qcompiler.compile(
            source("transformer"), calibration=masked(), decisions=plain("residual").decisions, guard=False
        )


def test_a_record_made_for_other_weights_is_repeated_with_a_warning() -> None:
    other = synthetic.residual_cnn()
    weights = onnx.numpy_helper.to_array(other.graph.initializer[0]) * F(0.5)
    other.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, "w0"))
    feeds = FAMILIES["residual"].feeds()
    made = qcompiler.compile(other, calibration=feeds, decisions=plain("residual").decisions)
    assert made.decisions.forms == plain("residual").decisions.forms
    assert made.to_bytes() != plain("residual").to_bytes()
    assert [w for w in made.report.warnings if w.startswith("the decisions record was made for a model of digest")]


def test_progress_is_told_and_the_library_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    qcompiler.compile(source("state"), calibration=FAMILIES["state"].feeds(), guard=False, progress=lines.append)
    assert lines[0] == "import"
    assert "canonicalize" in lines
    assert lines[-1] == "lower and prove"
    assert capfd.readouterr() == ("", "")
