"""Passes in other people's pipelines: each of ours as one of onnx_ir's kind, and the other way round.

::

    import onnx_ir as ir
    import qcompiler

    passes = ir.passes.Sequential(qcompiler.ir_pass("fold-casts"), qcompiler.ir_pass("recognize-gelu"))
    result = passes(ir.load("model.onnx"))      # result.model, result.modified

Passes that quantize hand what they know from one to the next in ``model.graph.meta``, which is not written to files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PreconditionError

from qcompiler.borrowing import Fingerprint, Loan, put_origins_aside, tag_origins
from qcompiler.errors import CalibrationError, PassError
from qcompiler.ir.constants import lift_constants
from qcompiler.ir.graph import all_graphs, all_nodes, is_op
from qcompiler.ir.importer import OWN_DOMAIN, import_model
from qcompiler.ir.naming import make_names_unique
from qcompiler.ir.phase import Phase
from qcompiler.ir.reader import read_model
from qcompiler.passes.catalog import PASSES, shipped_passes
from qcompiler.passes.infer_shapes import InferShapes
from qcompiler.passes.plan_quantization import PlanQuantization
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.from_ir import FromIrPass, from_ir_pass
from qcompiler.pipeline.parse import near, print_pass
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.registry import needed_phases
from qcompiler.pipeline.state import CompileState, Remark
from qcompiler.quant.plan import FORMS, Form
from qcompiler.quant.spec import RangeSource
from qcompiler.recipe_forms import check_forms, recipe_forms
from qcompiler.recipes.recipe import Recipe, load_recipe
from qcompiler.targets.groups import find_groups
from qcompiler.targets.host import detect, host_target_name
from qcompiler.targets.target import Target, load_target

__all__ = ["FromIrPass", "IrPass", "PhaseError", "carried_state", "from_ir_pass", "ir_pass"]

STATE = "qcompiler.state"
"""Key of ``model.graph.meta`` under which passes that quantize hand on what they know."""


class PhaseError(PassError, PreconditionError):
    """A model that is not in a phase that the pass needs; names the pass that must come first."""


def ir_pass(
    step: str | Pass,
    *,
    target: str | Target | None = None,
    recipe: str | Recipe | None = None,
    statistics: RangeSource | str | Path | None = None,
    forms: Mapping[str, Form] | None = None,
    smoothing: Mapping[str, tuple[float, ...]] | None = None,
    phase: Phase | None = None,
) -> IrPass:
    """Return one of our passes as a pass of onnx_ir's kind, which works on any ``onnx_ir.Model`` in place.

    A float pass that finds nothing to do leaves the model untouched to the last name. One that does something leaves
    alone what it does not change; the model's operator set is raised only where something in it needs that. A pass
    that takes part in quantization, finds something to do, or is given something, brings the model into the imported
    form first (one operator set, no local functions, no Constant nodes) and hands on what it knows to the next; what is
    given to one pass holds for those behind it. A pass that raises leaves the model as it was.

    Args:
        step: a pass with its options, as in a pipeline (``"canonicalize{rounds=1}"``), or a pass.
        target: capability table; by default that of the pass in front, or of this processor.
        recipe: gives the target's scheme, and to plan-quantization forms and estimator, as ``compile(guard=False)``.
        statistics: observed ranges for plan-quantization and insert-qdq: what `qcompiler.calibrate` returns, or a path.
        forms: form by group, for plan-quantization; the others follow the recipe or the pass's options.
        smoothing: scale per channel by value name, for smooth-activations.
        phase: the phase that the model is in, where it does not follow from the passes in front or from the model.

    Raises:
        PassError: the pass, the recipe or a form is unknown, or the text names several passes.
        TargetError: the target is unknown.
        CalibrationError: the statistics cannot be read.
    """
    if isinstance(step, str):
        parsed = Pipeline.parse(step, shipped_passes().with_entry_points()).passes
        if len(parsed) != 1:
            raise PassError(f"expected one pass, found {len(parsed)} in {step!r}; join them with onnx_ir's Sequential")
        step = parsed[0]
    for group, form in (forms or {}).items():
        if form not in FORMS:
            raise PassError(f"unknown form {form!r} of the group {group!r}{near(str(form), FORMS)}")
    known_recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    table = load_target(target) if isinstance(target, str) and target != "host" else target
    host = load_target(host_target_name(detect())[0]) if target == "host" else None
    given = _Given(
        host or (table if isinstance(table, Target) else None), known_recipe, _ranges(statistics), dict(forms or {}),
        dict(smoothing or {}), phase,
    )  # fmt: skip
    return IrPass(step, given)


def _ranges(statistics: RangeSource | str | Path | None) -> RangeSource | None:
    if not isinstance(statistics, str | Path):
        return statistics
    from qcompiler.dataset import read_statistics

    found = read_statistics(Path(statistics))
    if found is None:
        raise CalibrationError(f"{statistics} holds no statistics: expected a .qcal (see: qcompiler calibrate --help)")
    return found


def carried_state(model: ir.Model) -> CompileState | None:
    """Return what passes that quantize know of a model (plan, phase, remarks), or None if none has worked on it."""
    state = model.graph.meta.get(STATE)
    if not isinstance(state, CompileState):
        return None
    # A clone of the model has the same store: nothing in it may be changed for both.
    return replace(
        state,
        model=model,
        forms=dict(state.forms),
        engine_forms=dict(state.engine_forms),
        estimators=dict(state.estimators),
        imported=dict(state.imported),
        remarks=list(state.remarks),
    )


@dataclass(frozen=True)
class _Given:
    """What the caller gives besides the pass."""

    target: Target | None = None
    recipe: Recipe | None = None
    statistics: RangeSource | None = None
    forms: dict[str, Form] = field(default_factory=dict)
    smoothing: dict[str, tuple[float, ...]] = field(default_factory=dict)
    phase: Phase | None = None

    def __bool__(self) -> bool:
        """Return whether anything is given."""
        return self != _Given()

    def state(self, model: ir.Model, carried: CompileState | None) -> CompileState:
        """Return the state for a pass: what was carried, and over it what is given."""
        if carried is not None:
            state = carried
            state.model = model
        else:
            state = CompileState(model, self.target or load_target(host_target_name(detect())[0]))
        table = self.target or state.target
        if self.recipe is not None and (self.target is not None or carried is None or table.scheme_tables):
            table = self.recipe.on(table)
        if table != state.target and state.phase is not Phase.FLOAT:
            raise PassError(
                f"the model was planned for {state.target.name} ({state.target.scheme}), this pass is given "
                f"{table.name} ({table.scheme}); give the target to plan-quantization or a pass in front of it"
            )
        state.target = table
        state.statistics = self.statistics or state.statistics
        state.smoothing = self.smoothing or state.smoothing
        state.forms |= self.forms
        return state


class IrPass(InPlacePass):
    """One of our passes as one of onnx_ir's kind; made by `ir_pass`.

    Attributes:
        step: the pass.
        remarks: what it did and declined at its last call, and why.
    """

    def __init__(self, step: Pass, given: _Given) -> None:
        super().__init__()
        self.step = step
        self.remarks: tuple[Remark, ...] = ()
        self._given = given

    def __repr__(self) -> str:
        return f"ir_pass({print_pass(self.step)!r})"

    @property
    def _quantizes(self) -> bool:
        """Return whether the pass takes part in quantization: it changes the phase, or notes numbers for planning."""
        needs, gives = needed_phases(self.step), self.step.gives
        return gives is not None and (gives not in needs or gives is Phase.FLOAT)

    def requires(self, model: ir.Model) -> None:
        """Refuse a model that is not in a phase that the pass needs.

        Raises:
            PhaseError: names the pass that must come first.
        """
        self._phase(model)

    def _phase(self, model: ir.Model) -> Phase:
        """Return the phase, among those the pass needs, that the model is in."""
        carried = carried_state(model)
        if self._given.phase is not None:
            possible: tuple[Phase, ...] = (self._given.phase,)
        else:
            possible = (carried.phase,) if carried is not None else possible_phases(model)
        needs = needed_phases(self.step)
        if fitting := [phase for phase in needs if phase in possible]:
            return fitting[0]
        name, wanted = self.step.name(), " or ".join(p.name for p in needs)
        found = possible[0]
        if max(needs) < found:
            raise PhaseError(
                f"pass {name} needs a model in phase {wanted}, this one is in {found.name} already: run it before "
                f"{' or '.join(_givers(found))}, on the model that those were given"
            )
        raise PhaseError(
            f"pass {name} needs a model in phase {wanted}, this one is in {found.name}: run "
            f"{' or '.join(dict.fromkeys(g for p in needs for g in _givers(p)))} first"
        )

    def call(self, model: ir.Model) -> PassResult:
        """Run the pass.

        Raises:
            QCompilerError: as the pass itself.
        """
        carried, phase = carried_state(model), self._phase(model)
        if carried is not None or self._quantizes:
            return PassResult(model, self._run_on_ours(model, carried, phase))
        shapes = not isinstance(self.step, InferShapes)
        # Nobody can tell before a pass has run whether it will find something; a copy shares all weights.
        trial = Loan(read_model(model), shapes)
        trial.begin()
        before = Fingerprint.of(trial.model, annotations=not shapes)
        self._run(self._state(trial.model, None, phase))
        if Fingerprint.of(trial.model, annotations=not shapes) == before:
            return PassResult(model, False)
        given = Fingerprint.of(model)
        loan = Loan(model, shapes)
        loan.begin()
        self._run(self._state(model, None, phase))
        loan.end()
        return PassResult(model, Fingerprint.of(model) != given)

    def _run_on_ours(self, model: ir.Model, carried: CompileState | None, phase: Phase) -> bool:
        """Run the pass on a model in the imported form, brought into it if need be; return whether it changed.

        The pass works on a copy, so that one that raises leaves no half of its work behind.
        """
        given = Fingerprint.of(model)
        with _tensor_names(model):
            ours = import_model(model) if carried is None else model.clone()
            tag_origins(ours)
            # Another package's pass may have been at work since.
            lift_constants(ours)
            make_names_unique(ours)
            state = self._state(ours, carried, phase)
            first = carried is None and not self._given
            before = (Fingerprint.of(ours), _notes(state)) if first else None
            self._run(state)
        if first and (Fingerprint.of(state.model), _notes(state)) == before:
            return False  # nothing was found, and nothing is handed on
        _become(model, state.model)
        state.model = model
        put_origins_aside(model)
        model.graph.meta[STATE] = state
        return Fingerprint.of(model) != given

    def _state(self, model: ir.Model, carried: CompileState | None, phase: Phase) -> CompileState:
        state = self._given.state(model, carried)
        state.phase = phase
        return state

    def _run(self, state: CompileState) -> None:
        step, told = self.step, len(state.remarks)
        recipe = self._given.recipe
        if isinstance(step, PlanQuantization):
            check_forms(state.forms, find_groups(state.model, state.target))
        if recipe is not None and isinstance(step, PlanQuantization):
            state.forms, state.estimators = recipe_forms(recipe, state)
            step = replace(step, estimator=recipe.estimator)
        Pipeline((step,)).run(state)
        self.remarks = tuple(state.remarks[told:])


def _notes(state: CompileState) -> tuple[object, ...]:
    """Return what a pass may note for others besides what it does to the graph."""
    return state.phase, state.half, dict(state.imported), dict(state.forms), dict(state.estimators)


@contextmanager
def _tensor_names(model: ir.Model) -> Iterator[None]:
    """Give tensors their names back if something fails: a copy has the same ones, and renames them with its values."""
    tensors = [t for g in all_graphs(model) for v in g.initializers.values() if (t := v.const_value) is not None]
    names = [t.name for t in tensors]
    try:
        yield
    except BaseException:
        for tensor, name in zip(tensors, names, strict=True):
            tensor.name = name
        raise


def _become(model: ir.Model, other: ir.Model) -> None:
    """Let a model hold what another one does."""
    model.graph = other.graph
    model.ir_version = other.ir_version
    model.functions.clear()
    model.functions.update(other.functions)
    model.metadata_props.clear()
    model.metadata_props.update(other.metadata_props)


def possible_phases(model: ir.Model) -> tuple[Phase, ...]:
    """Return the phases that a model without a history can be taken for, the likeliest first."""
    if any(function.domain == OWN_DOMAIN for function in model.functions.values()):
        return (Phase.FUSED,)
    if any(is_op(node, "QuantizeLinear", "DequantizeLinear") for node in all_nodes(model)):
        return (Phase.FLOAT, Phase.QDQ, Phase.LOWERED)
    return (Phase.FLOAT, Phase.LOWERED)


def _givers(phase: Phase) -> tuple[str, ...]:
    """Return the names of the passes that lead to a phase."""
    return tuple(p.name() for p in PASSES if p.gives is phase and phase not in needed_phases(p))
