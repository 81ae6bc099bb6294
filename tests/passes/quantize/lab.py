"""A small laboratory: a model as text, its calibration on seeded feeds, and a build in chosen forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.backends.readback import Planned, Proof, planned_fusions, prove
from qcompiler.backends.reference import Gap, ReferenceEngine, integer_gaps
from qcompiler.calibration.observe import observe
from qcompiler.engine import Array, EngineOptions, Feeds
from qcompiler.ir.graph import all_nodes
from qcompiler.ir.importer import check_supported, finish, prepare
from qcompiler.ir.phase import Phase
from qcompiler.ir.reader import read_model
from qcompiler.ir.text import print_model
from qcompiler.ir.verify import verify
from qcompiler.observed import wanted_values
from qcompiler.passes.fold_scales import FoldScales
from qcompiler.passes.fuse_qdq import FuseQdq
from qcompiler.passes.insert_qdq import InsertQdq
from qcompiler.passes.lower_onnxruntime import LowerOnnxruntime
from qcompiler.passes.plan_quantization import PlanQuantization
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.instruments.verify import VerifyInstrument
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.plan import Form
from qcompiler.targets.groups import Group, find_groups
from qcompiler.targets.target import Target, load_target

ENGINE = OrtEngine()
REFERENCE = EngineOptions(threads=1, optimize=False)
OPTIMIZED = EngineOptions(threads=1, optimize=True)


def model_of(
    inputs: str, outputs: str, body: str, weights: Mapping[str, Array] | None = None, opset: int = 21
) -> onnx.ModelProto:
    """Make a model of ONNX text and named constants."""
    head = f'<ir_version: 10, opset_import: ["": {opset}]> agraph ({inputs}) => ({outputs})'
    proto = onnx.parser.parse_model(f"{head} {{ {body} }}")
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in (weights or {}).items())
    return proto


def import_exactly(proto: onnx.ModelProto) -> ir.Model:
    """Import without changing the operator set."""
    model = read_model(proto)
    check_supported(model)
    prepare(model)
    finish(model)
    return model


def random_feeds(model: ir.Model, count: int = 3, size: int = 2, seed: int = 0) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    feeds = []
    for _ in range(count):
        feed: dict[str, Array] = {}
        for value in model.graph.inputs:
            shape = [d if isinstance(d, int) else size for d in (value.shape or [])]
            kind = value.dtype.numpy()
            if kind.kind == "b":
                feed[value.name] = rng.integers(0, 2, shape).astype(bool)
            elif kind.kind in "iu":
                feed[value.name] = rng.integers(0, 3, shape).astype(kind)
            else:
                feed[value.name] = rng.normal(0, 1, shape).astype(kind)
        feeds.append(feed)
    return feeds


@dataclass
class Lab:
    """A FLOAT graph with statistics, from which builds are made."""

    base: CompileState
    feeds: list[dict[str, Array]]
    engine_forms: dict[str, str] = field(default_factory=dict)

    @property
    def groups(self) -> dict[str, Group]:
        return {g.name: g for g in find_groups(self.base.model, self.base.target)}

    def group(self, op_type: str) -> Group:
        """Return the only group of an operator type."""
        (found,) = [g for g in self.groups.values() if g.root.op_type == op_type]
        return found

    def forms(self, **by_type: Form) -> dict[str, Form]:
        """Return forms by operator type; all others are float."""
        return {name: by_type.get(g.root.op_type, "float") for name, g in self.groups.items()}

    def run(self, passes: Sequence[Pass], forms: Mapping[str, Form] | None = None, **by_type: Form) -> CompileState:
        """Run passes on a copy, verified after each, in the given forms."""
        state = self.base.clone()
        state.forms = dict(forms) if forms is not None else self.forms(**by_type)
        state.engine_forms = dict(self.engine_forms)
        Pipeline(tuple(passes)).run(state, [VerifyInstrument()])
        return state

    def planned(self, **by_type: Form) -> CompileState:
        return self.run([PlanQuantization()], **by_type)

    def inserted(self, **by_type: Form) -> CompileState:
        return self.run([PlanQuantization(), InsertQdq()], **by_type)

    def fused(self, **by_type: Form) -> CompileState:
        return self.run([PlanQuantization(), InsertQdq(), FoldScales(), FuseQdq()], **by_type)

    def lowered(self, emit: str = "auto", **by_type: Form) -> CompileState:
        passes = [PlanQuantization(), InsertQdq(), FoldScales(), FuseQdq(), LowerOnnxruntime(emit=emit)]
        return self.run(passes, **by_type)

    def prove(self, emit: str = "auto", **by_type: Form) -> Proof:
        """Lower and read back what the engine made of it."""
        fused = self.fused(**by_type)
        planned: tuple[Planned, ...] = planned_fusions(fused.model, fused.plan)
        lowered = self.lowered(emit, **by_type)
        return prove(planned, ENGINE.optimized_graph(lowered.model, OPTIMIZED))

    def gaps(self, **by_type: Form) -> tuple[Gap, ...]:
        """Compare true integer arithmetic with the fused bodies, call by call."""
        return integer_gaps(self.fused(**by_type).model, self.feeds)


def lab(
    proto: onnx.ModelProto,
    *,
    target: Target | None = None,
    calibrate: bool = True,
    feeds: Sequence[Feeds] | None = None,
    size: int = 2,
    passes: Sequence[Pass] = (),
) -> Lab:
    """Read a model, run FLOAT passes on it and observe its values."""
    state = CompileState(import_exactly(proto), target or load_target("ort-x86"))
    for step in passes:
        step.run(state)
    verify(state.model, Phase.FLOAT)
    given = [dict(f) for f in feeds] if feeds is not None else random_feeds(state.model, size=size)
    if calibrate:
        names = list(dict.fromkeys(wanted_values(state.model, find_groups(state.model, state.target))))
        state.statistics = observe(state.model, names, given, ENGINE)
    return Lab(state, given)


def outputs(model: ir.Model, feed: Feeds, options: EngineOptions = REFERENCE) -> list[Array]:
    return list(ENGINE.load(model, options).run(feed).values())


def reference_outputs(model: ir.Model, feed: Feeds) -> list[Array]:
    return list(ReferenceEngine().load(model).run(feed).values())


def ops(model: ir.Model) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in all_nodes(model):
        found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


def reasons(state: CompileState, pass_name: str = "") -> list[str]:
    return [r.reason for r in state.remarks if not r.done and pass_name in ("", r.pass_name)]


def show(model: ir.Model) -> str:
    return print_model(model)


def normal(seed: int, *shape: int, scale: float = 1.0) -> Array:
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)
