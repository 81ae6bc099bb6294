"""What a user may ask of a compilation: data, overrides, budgets, forms of the output, targets, records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qcompiler
from qcompiler.compiler import compile_model
from qcompiler.engine import Array, Feeds
from qcompiler.errors import BudgetError, PassError, TargetError
from qcompiler.options import Options
from qcompiler.targets.host import Processor
from tests import synthetic
from tests.families import COVERED, FAMILIES, F, masked, nodes, plain, run, source
from tests.search.machine import InventedMachine


def test_options_are_named() -> None:
    """A new field between others must not give a caller's arguments another meaning."""
    with pytest.raises(TypeError, match="positional argument"):
        Options("ort-x86")  # type: ignore[misc]
    assert Options(target="ort-x86").target == "ort-x86"


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


@COVERED
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


def overridden(tmp_path: Path, text: str, name: str = "transformer") -> dict[str, str]:
    (tmp_path / "pins.toml").write_text(text)
    made = qcompiler.compile(
        source(name), calibration=FAMILIES[name].feeds(), guard=False, overrides=tmp_path / "pins.toml"
    )
    return {g.group: g.form for g in made.report.groups}


def test_a_glob_keeps_groups_in_float(tmp_path: Path) -> None:
    forms = overridden(tmp_path, '[[override]]\nmatch = "/attn/*/MatMul"\nform = "float"\n')
    assert {n for n, f in forms.items() if f == "dynamic"} == {"/mlp/up", "/mlp/down"}


def test_the_report_says_that_an_override_decided(tmp_path: Path) -> None:
    (tmp_path / "pins.toml").write_text('[[override]]\nmatch = "/mlp/up"\nform = "float"\n')
    for guard in (False, True):
        made = qcompiler.compile(
            source("transformer"), calibration=FAMILIES["transformer"].feeds(), guard=guard,
            overrides=tmp_path / "pins.toml",
        )  # fmt: skip
        why = {g.group: g.why for g in made.report.groups}
        assert why["/mlp/up"] == "float: by override"


def test_a_later_override_wins(tmp_path: Path) -> None:
    text = '[[override]]\nmatch = "*"\nform = "float"\n[[override]]\nmatch = "/mlp/up"\nform = "static-float"\n'
    forms = overridden(tmp_path, text)
    assert {n: f for n, f in forms.items() if f != "float"} == {"/mlp/up": "static-float"}


def test_a_glob_forces_dynamic_against_the_recipe(tmp_path: Path) -> None:
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


@COVERED
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
    told = ("float: for accuracy", "float: the accuracy guard measured")
    assert all(made.decisions.why[name].startswith(told) for name in returned)


def test_a_budget_without_what_it_measures_is_refused() -> None:
    with pytest.raises(BudgetError, match="a drop budget needs a metric"):
        qcompiler.compile(source("residual"), budget="drop<=1pt")
    with pytest.raises(BudgetError, match="a metric needs evaluation data"):
        qcompiler.compile(source("residual"), metric=lambda outputs, feeds: 1.0)


@COVERED
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


@COVERED
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
    kept = {r.node for r in made.remarks if r.reason == "no-integer-operator"}
    assert len(kept) <= 1
    for group in planned:
        node = present[group]
        if group in kept:
            assert "Relu" in {use.node.op_type for v in node.outputs for use in v.uses()}
            continue
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
    monkeypatch.setattr("qcompiler.options.detect", lambda: elsewhere)
    watch = InventedMachine()
    options = Options(target="ort-x86", calibration=FAMILIES["residual"].feeds(), stopwatch=watch)
    made = compile_model(source("residual"), options)
    assert (watch.profiles, watch.compared) == (0, [])
    assert made.report.speedup is None
    (warning,) = made.report.warnings
    assert warning.startswith("target ort-x86 is not this machine (Other Processor): nothing was timed")
    assert made.report.quality is not None  # accuracy does not depend on the machine
    assert made.report.quality.worst > 20.0
    assert made.report.context["processor"] == "Other Processor"
    assert {g.group for g in made.report.groups if g.form == "static"} >= {"/block/Conv1", "/block/Conv2"}


def test_a_processor_that_no_table_covers_gets_the_safe_form(monkeypatch: pytest.MonkeyPatch) -> None:
    old = Processor("x86_64", "Old Processor", frozenset({"avx2"}))
    monkeypatch.setattr("qcompiler.options.detect", lambda: old)
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
    with pytest.raises(TargetError, match=r"unknown target 'abacus'.*ort-x86"):
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


@pytest.mark.parametrize("name", ["qdq int8", "qdq uint8"])
def test_imported_weights_are_quantized_anew_where_their_range_is_too_wide(name: str) -> None:
    """The imported scales span 8 bits; clipped to 7 the outputs would be at 5 dB."""
    feeds = FAMILIES[name].feeds()
    made = qcompiler.compile(source(name), target="ort-generic", calibration=feeds, guard=False)
    assert made.report.to_dict()["sqnr_db"]["y"] > 25
    given, changed = (run(m, feeds[0])["y"] for m in (source(name), made.model))
    assert changed.dtype == given.dtype
    steps = np.abs(changed.astype(int) - given.astype(int))
    assert steps.mean() < 1.0
