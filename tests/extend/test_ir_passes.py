"""Our passes in other people's onnx_ir pipelines, on models as they have them; and theirs in ours."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes import PassBase, PassManager, PreconditionError, Sequential, functionalize
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    InlinePass,
    RemoveUnusedNodesPass,
    ShapeInferencePass,
)

import qcompiler
from qcompiler.errors import PassError, TargetError
from qcompiler.ir.phase import Phase
from qcompiler.ir.serialize import to_bytes
from qcompiler.ir_passes import FromIrPass, PhaseError, carried_state, from_ir_pass, ir_pass
from qcompiler.passes.catalog import DEFAULT_PIPELINE, PASSES, shipped_passes
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Exact
from qcompiler.pipeline.instruments.verify import VerifyInstrument
from qcompiler.pipeline.parse import read_passes
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.registry import PassRegistry, needed_phases
from qcompiler.pipeline.state import CompileState
from qcompiler.recipes.recipe import Override, load_recipe
from qcompiler.targets.target import load_target
from tests.extend.foreign import MODELS, convolutions, feeds_of, outputs, to_text, transformer_block

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "models"
FLOAT = tuple(p for p in PASSES if needed_phases(p) == (Phase.FLOAT,) and p.gives is None)
FIRES = {
    "transformer-block": {"canonicalize", "recognize-layer-norm", "recognize-gelu", "cancel-transposes"},
    "convolutions": {"canonicalize", "fuse-batch-norm", "eliminate-identity"},
    "old-file": {"canonicalize", "fuse-batch-norm"},
    "with-function": {"canonicalize", "eliminate-identity"},
    "branches": {"canonicalize", "eliminate-identity", "fold-constants"},
    "shapes": {"canonicalize", "fold-shapes", "fold-reshapes", "eliminate-identity", "deduplicate", "order-operands"},
}
"""Passes that must have something to do on each model; others may."""
REL = 2e-6
"""Of the largest magnitude: float32 sums of some tens of terms in another order, 16 units in the last place."""


def load(name: str) -> ir.Model:
    return ir.from_proto(MODELS[name]())


def fire(cls: type[Pass], name: str) -> bool:
    """Run one pass alone; check that it says the truth, keeps the numbers and finds nothing more a second time."""
    model, feeds = load(name), feeds_of(MODELS[name]())
    before = to_text(model)
    result = ir_pass(cls.name())(model)
    after = to_text(model)
    assert result.model is model
    assert result.modified == (before != after)
    if result.modified:
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        for feed in feeds:
            was, now = outputs(before, feed), outputs(after, feed)
            assert was.keys() == now.keys()
            for key, value in was.items():
                np.testing.assert_allclose(now[key], value, rtol=0, atol=REL * max(1e-3, float(np.abs(value).max())))
        again = ir_pass(cls.name())(model)
        assert not again.modified
        assert to_text(model) == after
    assert not any(k.startswith("qcompiler.") for n in model.graph.all_nodes() for k in n.metadata_props)
    assert not any(k.startswith("qcompiler.") for k in model.metadata_props)
    return result.modified


@pytest.mark.parametrize("name", MODELS)
def test_every_float_pass_alone_keeps_the_numbers(name: str) -> None:
    fired = {cls.name() for cls in FLOAT if fire(cls, name)}
    assert FIRES[name] <= fired


def test_untouched_nodes_and_names_stay_the_same_objects() -> None:
    model = load("transformer-block")
    nodes = {n.outputs[0].name: (n, n.name, n.op_type, tuple(n.inputs)) for n in model.graph}
    values = {v.name: v for v in model.graph.initializers.values()}
    result = ir_pass("cancel-transposes")(model)
    assert result.modified
    assert model.opset_imports[""] == 18, "ReduceMean takes its axes as an input in what the pass works on"
    assert {n.op_type for n in model.graph} >= {"Constant", "Erf", "Pow"}
    same = [name for n in model.graph if (name := n.outputs[0].name) in nodes and nodes[name][0] is n]
    assert set(nodes) - set(same) == {"m", "v", "t1", "t2"}
    assert all(model.graph.initializers[name] is value for name, value in values.items())
    assert all((n.name, n.op_type) == nodes[n.outputs[0].name][1:3] for n in model.graph if n.outputs[0].name in same)


def test_the_operator_set_stays_where_nothing_needs_another() -> None:
    for name, cls, opset in (("branches", "eliminate-identity", 15), ("shapes", "fold-reshapes", 13)):
        model = load(name)
        assert ir_pass(cls)(model).modified
        assert model.opset_imports[""] == opset
        assert model.ir_version == MODELS[name]().ir_version
    model = load("transformer-block")
    ir_pass("recognize-gelu")(model)
    assert model.opset_imports[""] == 20
    assert [n.op_type for n in model.graph].count("Gelu") == 1


def test_names_used_twice_in_branches_stay() -> None:
    model = load("branches")
    assert ir_pass("fold-constants")(model).modified
    (node,) = (n for n in model.graph if n.op_type == "If")
    names = [[n.name or "" for n in a.as_graph() if n.op_type != "Constant"] for a in node.attributes.values()]
    assert names == [["same", "", "last"], ["same", "", "last"]]
    inside = [[v.name for n in a.as_graph() for v in n.outputs] for a in node.attributes.values()]
    assert all({"inner", "scaled", "out"} <= set(values) for values in inside)
    model = load("branches")
    assert ir_pass("eliminate-identity")(model).modified
    (node,) = (n for n in model.graph if n.op_type == "If")
    for attribute in node.attributes.values():
        assert [n.name for n in attribute.as_graph()] == ["last"]
        assert attribute.as_graph().outputs[0].name == "out"


def test_functions_stay_and_are_raised_with_the_model() -> None:
    model = load("with-function")
    assert ir_pass("eliminate-identity")(model).modified
    assert [n.op_type for n in model.graph] == ["twice", "Neg", "Relu"]
    (function,) = model.functions.values()
    assert (len(list(function)), function.opset_imports[""], model.opset_imports[""]) == (3, 18, 18)


def test_a_weight_that_callers_may_override_is_no_constant() -> None:
    proto = convolutions()
    for tensor in proto.graph.initializer:
        proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    model = ir.from_proto(proto)
    assert not ir_pass("fuse-batch-norm")(model).modified
    assert len(model.graph.inputs) == 1 + len(proto.graph.initializer)


def test_passes_nest_in_onnx_ir_pipelines() -> None:
    proto = transformer_block()
    model = ir.from_proto(proto)
    before, feeds = to_text(model), feeds_of(proto)
    manager = PassManager(
        [ShapeInferencePass(), ir_pass("recognize-layer-norm"), CommonSubexpressionEliminationPass(),
         Sequential(ir_pass("recognize-gelu"), RemoveUnusedNodesPass()), ir_pass("fold-casts")],
        steps=4, early_stop=True,
    )  # fmt: skip
    assert manager.in_place
    assert manager(model).modified
    kinds = [n.op_type for n in model.graph]
    assert ("LayerNormalization" in kinds, "Gelu" in kinds, "Erf" in kinds) == (True, True, False)
    (was,), (now,) = outputs(before, feeds[0]).values(), outputs(to_text(model), feeds[0]).values()
    np.testing.assert_allclose(now, was, rtol=0, atol=REL * float(np.abs(was).max()))
    other = ir.from_proto(proto)
    result = functionalize(ir_pass("recognize-gelu"))(other)
    assert result.modified
    assert to_text(other) == before


def test_infer_shapes_says_what_it_found() -> None:
    model = load("with-function")
    assert ir_pass("infer-shapes")(model).modified
    assert not ir_pass("infer-shapes")(model).modified
    assert model.opset_imports[""] == 18


def test_remarks_say_why_nothing_was_done() -> None:
    proto = transformer_block()
    proto.graph.output.append(onnx.helper.make_tensor_value_info("g2", onnx.TensorProto.FLOAT, ["N", 3, 32]))
    step = ir_pass("recognize-gelu")
    assert not step(ir.from_proto(proto)).modified
    assert {r.pass_name for r in step.remarks} == {"recognize-gelu"}
    assert all(not r.done for r in step.remarks)


# ---- passes that quantize -------------------------------------------------------------------------------------------


def pipeline_of(recipe: str, statistics: object, target: str = "ort-x86") -> Sequential:
    """Return the passes of a build, one by one."""
    steps = [part.name for part in read_passes(DEFAULT_PIPELINE)]
    given: dict[str, dict[str, object]] = {"plan-quantization": {"recipe": recipe, "statistics": statistics}}
    first = {steps[0]: {"target": target}}
    return Sequential(*(ir_pass(n, **{**first.get(n, {}), **given.get(n, {})}) for n in steps))  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", ["int8", "int8-static", "int8-dynamic"])
@pytest.mark.parametrize("name", ["transformer-block", "convolutions", "with-function"])
def test_a_whole_sequence_gives_the_bytes_of_compile(name: str, recipe: str) -> None:
    proto = MODELS[name]()
    statistics = qcompiler.calibrate(proto, feeds_of(proto, 6))
    wanted = qcompiler.compile(proto, target="ort-x86", recipe=recipe, calibration=statistics, guard=False)
    model = ir.from_proto(proto)
    assert pipeline_of(recipe, statistics)(model).modified
    assert to_bytes(model) == wanted.to_bytes()
    state = carried_state(model)
    assert state is not None
    assert state.phase is Phase.LOWERED
    assert {n: c.form for n, c in state.plan.choices.items() if c.form != "float"} == wanted.decisions.forms
    assert not any(k.startswith("qcompiler.") for n in model.graph.all_nodes() for k in n.metadata_props)


@pytest.mark.models
@pytest.mark.parametrize("name", ["resnet8_cifar10", "vit_cifar10", "resnet8_cifar10_int8"])
def test_a_whole_sequence_gives_the_bytes_of_compile_on_reference_models(name: str) -> None:
    path = REFERENCE / name / "model.onnx"
    if not path.is_file():
        pytest.skip("the reference models are not beside the checkout")
    statistics = qcompiler.calibrate(path, feeds_of(onnx.load(path), 4))
    wanted = qcompiler.compile(path, target="ort-x86", recipe="int8-static", calibration=statistics, guard=False)
    model = ir.load(path)
    pipeline_of("int8-static", statistics)(model)
    assert to_bytes(model) == wanted.to_bytes()


def test_a_clone_in_between_and_other_passes_in_between_change_nothing() -> None:
    proto = convolutions()
    statistics = qcompiler.calibrate(proto, feeds_of(proto, 4))
    straight, broken = ir.from_proto(proto), ir.from_proto(proto)
    passes = pipeline_of("int8-static", statistics).passes
    for step in passes:
        step(straight)
        broken = functionalize(step)(broken).model
        broken = RemoveUnusedNodesPass()(broken).model
    assert to_bytes(broken) == to_bytes(straight)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("insert-qdq", "needs a model in phase PLANNED, this one is in FLOAT: run plan-quantization first"),
        ("fuse-qdq", "needs a model in phase QDQ, this one is in FLOAT: run insert-qdq first"),
        ("lower-onnxruntime", "needs a model in phase FUSED, this one is in FLOAT: run fuse-qdq first"),
    ],
)
def test_a_pass_that_comes_too_early_names_the_one_that_comes_first(name: str, first: str) -> None:
    model = load("convolutions")
    before = to_text(model)
    with pytest.raises(PhaseError, match=f"^pass {name} {first}$") as caught:
        ir_pass(name)(model)
    assert isinstance(caught.value, PassError)
    assert isinstance(caught.value, PreconditionError)
    assert to_text(model) == before


def test_a_pass_that_comes_too_late_says_so() -> None:
    model = load("convolutions")
    ir_pass("plan-quantization", target="ort-x86", recipe="int8-dynamic")(model)
    with pytest.raises(
        PhaseError, match="needs a model in phase FLOAT, this one is in PLANNED already: run it before p"
    ):
        ir_pass("canonicalize")(model)
    with pytest.raises(PassError, match=r"was planned for ort-x86 \(int8\), this pass is given ort-arm \(int8\)"):
        ir_pass("insert-qdq", target="ort-arm")(model)


def test_quantized_models_of_others_are_taken_as_qdq() -> None:
    proto = convolutions()
    compiled = qcompiler.compile(proto, target="ort-x86", recipe="int8-static", calibration=feeds_of(proto, 4),
                                 guard=False, emit="qdq")  # fmt: skip
    model = ir.from_proto(onnx.load_model_from_string(compiled.to_bytes()))
    feed = feeds_of(proto)[0]
    before = outputs(to_text(model), feed)
    assert Sequential(ir_pass("fuse-qdq", target="ort-x86"), ir_pass("lower-onnxruntime"))(model).modified
    np.testing.assert_array_equal(outputs(to_text(model), feed)["y"], before["y"])
    lowered = ir.from_proto(onnx.load_model_from_string(compiled.to_bytes()))
    assert not ir_pass("avoid-engine-traps", phase=Phase.LOWERED)(lowered).modified


def overridable(opset: int = 13) -> ir.Model:
    """Return a float32 model with a weight that callers may override, and names that import would change."""
    rng = np.random.default_rng(0)
    weight = onnx.numpy_helper.from_array(rng.normal(0, 1, (64, 64)).astype(np.float32), "w")
    x, w, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s)
               for n, s in (("x", ["n", 64]), ("w", [64, 64]), ("y", ["n", 64])))  # fmt: skip
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["h"], name="mm"), onnx.helper.make_node("Relu", ["h"], ["y"])]
    graph = onnx.helper.make_graph(nodes, "g", [x, w], [y], [weight])
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)],
                                                ir_version=8))  # fmt: skip


@pytest.mark.parametrize("name", ["widen-half-precision", "import-qdq", "fold-focus", "smooth-activations"])
def test_a_pass_before_planning_that_finds_nothing_leaves_the_model_untouched(name: str) -> None:
    model = overridable()
    before, nodes = to_text(model), list(model.graph)
    result = ir_pass(name)(model)
    assert (result.modified, to_text(model)) == (False, before)
    assert list(model.graph) == nodes
    assert carried_state(model) is None
    assert model.opset_imports[""] == 13
    assert [v.name for v in model.graph.inputs] == ["x", "w"]


def test_half_precision_is_widened_where_there_is_any() -> None:
    text = '<ir_version: 8, opset_import: ["" : 13]> g (float16[N,4] x) => (float16[N,4] y) { y = Exp(x) }'
    model = ir.from_proto(onnx.parser.parse_model(text))
    assert ir_pass("widen-half-precision")(model).modified
    assert [n.op_type for n in model.graph] == ["Cast", "Exp", "Cast"]
    state = carried_state(model)
    assert state is not None
    assert state.half is ir.DataType.FLOAT16


WRONG = replace(load_recipe("int8-dynamic"), overrides=(Override("nosuch", "float"),))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"recipe": WRONG}, "override 'nosuch' matches no group"),
        ({"forms": {"nn": "dynamic"}}, "for the group 'nn', which the model does not have; known: mm$"),
        ({"forms": {"mn": "dynamic"}}, r"the group 'mn', which the model does not have; did you mean mm\?"),
        ({"forms": {"mn": "float"}, "recipe": "int8-dynamic"}, "the group 'mn', which the model does not have"),
        ({"forms": {"mm": "weight-only"}}, "mm cannot be weight-only; it can be float, .*dynamic"),
    ],
)
@pytest.mark.parametrize("carried", [False, True])
def test_a_pass_that_raises_leaves_the_model_as_it_was(given: dict[str, object], reason: str, carried: bool) -> None:
    model = overridable(21)
    del model.graph.inputs[1]
    if carried:
        ir_pass("import-qdq", target="ort-x86")(model)
        next(iter(model.graph)).outputs[0].name = "y"  # a name used twice, which the next pass would change
    before, graph, state = to_text(model), model.graph, model.graph.meta.get("qcompiler.state")
    with pytest.raises(PassError, match=reason):
        ir_pass("plan-quantization", target="ort-x86", **given)(model)  # type: ignore[arg-type]
    assert to_text(model) == before
    assert model.graph is graph
    assert model.graph.meta.get("qcompiler.state") is state
    assert [v.const_value.name for v in graph.initializers.values() if v.const_value is not None] == ["w"]


def test_forms_are_taken_and_unknown_ones_refused() -> None:
    with pytest.raises(PassError, match=r"unknown form 'statik' of the group 'mm'; did you mean static\b"):
        ir_pass("plan-quantization", forms={"mm": "statik"})  # type: ignore[dict-item]
    with pytest.raises(PassError, match="unknown form 'bogus' of the group 'mm'; known: dynamic, float, static, "):
        ir_pass("plan-quantization", forms={"mm": "bogus"})  # type: ignore[dict-item]
    for form in ("float", "dynamic"):
        model = overridable()
        del model.graph.inputs[1]
        assert ir_pass("plan-quantization", target="ort-x86", forms={"mm": form})(model).modified  # type: ignore[dict-item]
        state = carried_state(model)
        assert state is not None
        assert state.plan.form("mm") == form


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(PassError, match="expected one pass, found 2 in"):
        ir_pass("fold-casts,fold-constants")
    with pytest.raises(PassError, match="unknown pass 'fold-cats'; did you mean fold-casts"):
        ir_pass("fold-cats")
    with pytest.raises(TargetError, match="unknown target 'ort-z80'"):
        ir_pass("fold-casts", target="ort-z80")
    assert repr(ir_pass("canonicalize{rounds=1}")) == "ir_pass('canonicalize{rounds=1}')"
    assert qcompiler.ir_pass is ir_pass


# ---- theirs in ours -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EliminateCommon(FromIrPass):
    """Compute equal things once."""

    numerics = Exact()
    size_limit: int = 10

    def make(self) -> PassBase:
        return CommonSubexpressionEliminationPass(self.size_limit)


TWICE = (
    '<ir_version: 10, opset_import: ["" : 21]> g (float[N] x) => (float[N] y) { a = Neg(x) b = Neg(x) y = Add(a, b) }'
)


def run_text(passes: str, registry: PassRegistry) -> tuple[CompileState, list[int]]:
    from qcompiler.ir.importer import import_model
    from qcompiler.ir.text import parse_text

    state = CompileState(import_model(parse_text(TWICE)), load_target("ort-x86"))
    results = Pipeline.parse(passes, registry).run(state, [VerifyInstrument()])
    return state, [r.changes for r in results]


def operators(state: CompileState) -> Iterable[str]:
    return [n.op_type for n in state.model.graph]


def test_a_pass_of_onnx_ir_runs_in_our_pipelines() -> None:
    registry = shipped_passes().with_passes([EliminateCommon])
    state, changes = run_text("eliminate-common{size-limit=3},remove-unused,eliminate-common", registry)
    assert (operators(state), changes[0], changes[2]) == (["Neg", "Add"], 1, 0)
    step = EliminateCommon(size_limit=3)
    assert str(Pipeline((step,))) == "eliminate-common{size-limit=3}"


def test_a_pass_without_options_is_wrapped_in_a_line() -> None:
    inline = from_ir_pass(InlinePass, "inline-functions", doc="Inline functions.", numerics=Exact())
    common = from_ir_pass(CommonSubexpressionEliminationPass, "eliminate-common")
    registry = shipped_passes().with_passes([inline, common])
    assert registry.get("inline-functions").__doc__ == "Inline functions."
    state, changes = run_text("inline-functions,eliminate-common", registry)
    assert (operators(state), changes) == (["Neg", "Add"], [0, 1])


def test_a_failing_pass_of_onnx_ir_is_named() -> None:
    class Fails(RemoveUnusedNodesPass):
        def call(self, model: ir.Model) -> ir.passes.PassResult:
            raise RuntimeError("no luck")

    registry = PassRegistry([from_ir_pass(Fails, "try-luck")])
    with pytest.raises(PassError, match="try-luck: RuntimeError: no luck"):
        run_text("try-luck", registry)
