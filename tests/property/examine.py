"""Take one random model through the whole compiler and hold every promise on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir

from qcompiler.backends.backend import OrtBackend
from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.backends.readback import Proof
from qcompiler.calibration.observe import observe
from qcompiler.engine import Array, EngineOptions, Feeds
from qcompiler.ir.graph import all_graphs
from qcompiler.ir.importer import import_model
from qcompiler.ir.phase import Phase
from qcompiler.ir.serialize import to_bytes
from qcompiler.ir.text import print_model
from qcompiler.observed import wanted_values
from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.passes.front import front_passes
from qcompiler.pipeline.changed import FED, exposed, fed
from qcompiler.pipeline.instruments.verify import VerifyInstrument
from qcompiler.pipeline.numerics import quantization_step, run_outputs, sqnr_db
from qcompiler.pipeline.pipeline import Pipeline, Step
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.plan import Form
from qcompiler.targets.groups import find_groups
from qcompiler.targets.host import detect, host_target_name
from qcompiler.targets.placement import Policy, propose
from qcompiler.targets.target import load_target
from qcompiler.workshop import Build, Workshop
from tests.property.families import Case

ENGINE = OrtEngine()
OPTIMIZED = EngineOptions(threads=1, optimize=True)
POLICIES: Mapping[str, Policy] = {
    "static": Policy("static", "static", "dynamic"),
    "dynamic": Policy("float", "dynamic", "dynamic", False),
    "mixed": Policy("static", "static-float", "dynamic"),
    "patchy": Policy("static", "static", "dynamic"),
}
FLOAT_STEPS = 255
"""A float result of integer operators has no scale: its step is this share of its range."""
_ROUNDING = 1e-3
"""Share of a step that float32 arithmetic on both sides may add to a whole number of steps."""


LEAST_DB = 20.0
"""Least SQNR of 8-bit quantization of a model whose weights and feeds are of ordinary size."""
_RECURRENT_DB = 30.0
"""Least SQNR of a dynamically quantized LSTM against the same with float activations."""
_FLOAT_DB = 110.0
"""Noise of float32 sums in another order; what lies beyond counts as equal."""


class BrokenPromiseError(AssertionError):
    """A promise that a random model shows to be broken."""


@dataclass
class Outcome:
    """What one policy made of a model.

    Attributes:
        integer_groups: groups that do not compute in float.
        fused: calls that the engine runs on integers.
        refused: groups that the engine fuses in no form; each has a reason.
        steps: greatest difference at a fused group's border, in quantization steps.
        sqnr_db: float against QDQ, the worst output.
        gap_db: QDQ as written against the optimized engine, the worst output.
    """

    integer_groups: int = 0
    fused: int = 0
    refused: int = 0
    steps: float = 0.0
    sqnr_db: float = math.inf
    gap_db: float = math.inf


@dataclass
class Snapshots:
    """An instrument that keeps the graph behind each phase."""

    models: dict[Phase, ir.Model] = field(default_factory=dict)

    def before_pass(self, state: CompileState, step: Step) -> None:
        """Do nothing."""

    def after_pass(self, state: CompileState, step: Step, changes: int) -> None:
        """Keep a copy."""
        self.models[state.phase] = state.model.clone()

    def on_failure(self, state: CompileState, step: Step, error: Exception) -> None:
        """Do nothing."""


def canonical_state(case: Case, feeds: Sequence[Feeds]) -> CompileState:
    """Import and canonicalize, and hold that this keeps the function.

    Raises:
        BrokenPromiseError: an output moved by more than the contract of canonicalize allows.
    """
    given = case.model.SerializeToString()
    state = CompileState(import_model(case.model), load_target(host_target_name(detect())[0]))
    if case.model.SerializeToString() != given:
        raise BrokenPromiseError("importing changed the given model")
    Pipeline(front_passes()).run(state, [VerifyInstrument()])
    wanted = run_outputs(ENGINE, ir.from_proto(case.model), feeds)
    found = run_outputs(ENGINE, state.model, feeds)
    rel = Canonicalize.numerics.rel  # type: ignore[union-attr]  # its contract is Reassociates
    for first, second in zip(wanted, found, strict=True):
        for name, array in first.items():
            scale = float(np.abs(array).max(initial=1e-6))
            off = float(np.abs(array - second[name]).max(initial=0.0))
            if array.shape != second[name].shape or not off <= rel * scale:
                raise BrokenPromiseError(f"canonicalize moves {name} by {off / scale:.2g} of its size")
    if Canonicalize().run(state.clone()):
        raise BrokenPromiseError("canonicalize changes its own result")
    return state


def examine(case: Case, policies: Sequence[str]) -> dict[str, Outcome]:
    """Compile a case in the given policies and return what was measured.

    Raises:
        BrokenPromiseError: a promise is broken; any other error is a crash.
    """
    feeds = case.feeds(3)
    state = _calibrated(canonical_state(case, feeds), feeds)
    emit = ("auto", "auto", "qoperator", "qdq")[case.seed % 4]
    before = print_model(state.model)
    results = {}
    for policy in policies:
        workshop = Workshop(state, OrtBackend(), OPTIMIZED, emit=emit)
        try:
            results[policy] = _examine_policy(case, workshop, policy, feeds)
        except BrokenPromiseError as error:
            raise BrokenPromiseError(f"{policy}: {error}") from error
        if print_model(state.model) != before:
            raise BrokenPromiseError(f"{policy}: building changed the canonical graph")
    return results


def build_once(case: Case, policy: str) -> tuple[dict[Phase, ir.Model], list[dict[str, Array]]]:
    """Return the graph behind each phase, and the feeds it was calibrated with."""
    feeds = case.feeds(3)
    workshop = Workshop(_calibrated(canonical_state(case, feeds), feeds), OrtBackend(), OPTIMIZED)
    snapshots = Snapshots()
    workshop.build(propose(workshop.groups, POLICIES[policy]), instruments=[VerifyInstrument(), snapshots])
    return snapshots.models, feeds


def _calibrated(state: CompileState, feeds: Sequence[Feeds]) -> CompileState:
    groups = find_groups(state.model, state.target)
    state.statistics = observe(state.model, list(dict.fromkeys(wanted_values(state.model, groups))), feeds, ENGINE)
    return state


def _examine_policy(case: Case, workshop: Workshop, policy: str, feeds: Sequence[Feeds]) -> Outcome:
    forms = propose(workshop.groups, POLICIES[policy], _returned(case, workshop) if policy == "patchy" else None)
    proof = workshop.learn_emission(forms)
    snapshots = Snapshots()
    build = workshop.build(forms, instruments=[VerifyInstrument(), snapshots])
    integer = {name for name, form in build.forms.items() if form != "float"}
    _check_explained(workshop, build, proof, forms)
    _check_deterministic(workshop, build, forms)
    made = Outcome(len(integer), len(proof.fused), len(workshop.refused))
    if not integer:
        return made
    check_weights(build)
    reference = snapshots.models[Phase.QDQ]
    made.steps = check_groups(reference, build, feeds, least_db=_RECURRENT_DB if case.benign else -math.inf)
    _compare_outputs(case, made, workshop, reference, build.model, feeds)
    return made


def _returned(case: Case, workshop: Workshop) -> dict[str, Form]:
    """Return groups that are float for good, as after an accuracy guard: a third of those with a weight."""
    rng = np.random.default_rng([case.seed, 1])
    return {g.name: "float" for g in workshop.groups if g.row.kind == "weighted" and rng.random() < 1 / 3}


def _check_explained(workshop: Workshop, build: Build, proof: Proof, forms: Mapping[str, Form]) -> None:
    """Hold that every group that was wanted on integers is proven there or has a reason why not."""
    if len(proof.fused) + len(proof.missed) != proof.planned or not all(m.reason and m.text for m in proof.missed):
        raise BrokenPromiseError(f"the proof does not add up: {proof}")
    said = {r.node for r in build.state.remarks if r.reason and r.text}
    for name, wanted in forms.items():
        known = name in proof.fused or name in {m.group for m in proof.missed} or name in workshop.refused
        if wanted != "float" and not known and not (build.forms[name] == "float" and name in said):
            raise BrokenPromiseError(f"{name} was wanted {wanted}, is {build.forms[name]} and nobody says why")
    if proof.missed and workshop.emit == "auto":
        raise BrokenPromiseError(f"the engine still misses {proof.missed[0]}")


def _check_deterministic(workshop: Workshop, build: Build, forms: Mapping[str, Form]) -> None:
    """Hold that a second build gives the same bytes, and that text survives serialization."""
    data = to_bytes(build.model, strip=True)
    if to_bytes(workshop.build(forms).model, strip=True) != data:
        raise BrokenPromiseError("two builds differ")
    whole = to_bytes(build.model)
    text = print_model(ir.serde.deserialize_model(onnx.load_model_from_string(whole)))
    if text != print_model(build.model):
        raise BrokenPromiseError("the text changes through serialization")


def check_groups(reference: ir.Model, build: Build, feeds: Sequence[Feeds], least_db: float = -math.inf) -> float:
    """Feed every fused group what the reference computes for it; return the greatest difference in steps.

    Args:
        reference: the QDQ graph.
        build: what was lowered from it.
        feeds: inputs of both.
        least_db: bound for recurrent operators, whose kernel quantizes input and state anew in every step.

    Raises:
        BrokenPromiseError: a group of the optimized engine is more than one step away from its Q/DQ form.
    """
    present = {v.name for node in build.model.graph for v in node.outputs}
    present &= {v.name for node in reference.graph for v in node.outputs}
    present.discard("")  # an output that is left out
    outputs = {o: p.kind for p in build.planned for o in p.outputs if o in present}
    borders = (*outputs, *(i for p in build.planned for i in p.inputs if i in present))
    names = list(dict.fromkeys(borders))
    if not outputs:
        return 0.0
    first = ENGINE.load(exposed(reference, names), EngineOptions(threads=1, optimize=False))
    second = None
    worst = 0.0
    for feed in feeds:
        wanted = first.run(_known(first.inputs, feed), names)
        if second is None:
            second = ENGINE.load(fed(build.model, names, wanted), OPTIMIZED)
        given = {**feed, **{n + FED: wanted[n] for n in names}}
        found = second.run(_known(second.inputs, given), names)
        for name, kind in outputs.items():
            if kind == "LSTM":
                noise = sqnr_db([{name: wanted[name]}], [{name: found[name]}])[name]
                if not noise >= least_db:
                    raise BrokenPromiseError(f"{name} of a fused LSTM has {noise:.1f} dB")
                continue
            steps = _steps(name, wanted[name], found[name], reference)
            if not steps <= 1 + _ROUNDING:
                raise BrokenPromiseError(f"{name} of a fused {kind} is {steps:.3g} steps off")
            worst = max(worst, steps)
    return worst


def _known(inputs: Sequence[object], feed: Feeds) -> dict[str, Array]:
    names = {i.name for i in inputs}  # type: ignore[attr-defined]
    return {n: a for n, a in feed.items() if n in names}


def _steps(name: str, wanted: Array, found: Array, reference: ir.Model) -> float:
    if wanted.size == 0:
        return 0.0
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return math.inf
    off = np.abs(wanted.astype(np.float64) - found.astype(np.float64))
    if wanted.dtype.kind in "iu":
        return float(off.max())
    step = quantization_step(name, reference)
    size = float(np.ptp(wanted.astype(np.float64))) / FLOAT_STEPS if step is None else float(step.scale.min())
    # One element, or equal ones, have no range: their size is the only scale there is.
    size = max(size, float(np.abs(wanted).max()) * 1e-5)
    return float(off.max()) / size if off.max() > 0 else 0.0


def _compare_outputs(
    case: Case,
    made: Outcome,
    workshop: Workshop,
    reference: ir.Model,
    lowered: ir.Model,
    feeds: Sequence[Feeds],
) -> None:
    """Measure float against QDQ, and QDQ against the engine; hold that the engine adds no noise of another order.

    A group adds noise of step^2 / 12 by rounding; an engine that is one step off everywhere adds step^2. So by power
    the engine may be 12 times as far from the reference as that is from float.
    """
    plain = run_outputs(ENGINE, workshop.base.model, feeds)
    written = run_outputs(ENGINE, reference, feeds)
    runner = ENGINE.load(lowered, OPTIMIZED)
    engine = [runner.run(_known(runner.inputs, f)) for f in feeds]
    floats = [n for n, a in plain[0].items() if a.dtype.kind == "f"]
    noise = sqnr_db([{n: p[n] for n in floats} for p in plain], written)
    gap = sqnr_db([{n: w[n] for n in floats} for w in written], engine)
    made.sqnr_db, made.gap_db = min(noise.values()), min(gap.values())
    if case.benign and made.sqnr_db < LEAST_DB:
        raise BrokenPromiseError(f"quantization leaves {made.sqnr_db:.1f} dB")
    for name in floats:
        if not gap[name] >= min(noise[name], _FLOAT_DB) - 10 * math.log10(12):
            raise BrokenPromiseError(f"{name}: engine {gap[name]:.1f} dB from its reference, that {noise[name]:.1f} dB")


def check_weights(build: Build) -> None:
    """Hold that the engine keeps weights in float that the plan keeps in float.

    ONNX Runtime quantizes the weight of a float Conv, ConvTranspose or Gemm that lies between a DequantizeLinear and a
    QuantizeLinear, per tensor, without being asked.
    """
    ours = _integer_weights(build.model, shared=True)
    engine = _integer_weights(ENGINE.optimized_graph(build.model, OPTIMIZED))
    if engine > ours:
        raise BrokenPromiseError(f"the engine holds {engine} 8-bit weights, the build {ours}")


def _integer_weights(model: ir.Model, shared: bool = False) -> int:
    """Count 8-bit matrices and filters; ``shared`` counts one per reader, since engines repack for each."""
    wanted = (ir.DataType.INT8, ir.DataType.UINT8)
    return sum(
        len(v.uses()) if shared else 1
        for graph in all_graphs(model)
        for v in graph.initializers.values()
        if v.const_value is not None and v.const_value.dtype in wanted and len(v.const_value.shape) > 1
    )
