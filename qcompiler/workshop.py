"""From a choice of forms to a lowered, proven build; what the searches call again and again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import onnx_ir as ir

from qcompiler.backends.backend import Backend
from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.backends.readback import ENGINE_REFUSED, Planned, Proof, planned_fusions
from qcompiler.engine import Engine, EngineOptions
from qcompiler.ir.constants import remove_unread_constants
from qcompiler.ir.phase import Phase
from qcompiler.passes.correct_bias import CorrectBias
from qcompiler.passes.fold_scales import FoldScales
from qcompiler.passes.fuse_qdq import FuseQdq
from qcompiler.passes.insert_qdq import InsertQdq
from qcompiler.passes.plan_quantization import PlanQuantization
from qcompiler.passes.round_adaptively import RoundAdaptively
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.pipeline import Instrument, Pipeline
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.plan import Form
from qcompiler.targets.groups import Group, find_groups

AS_GIVEN = "as-given"
"""Engine form of a build in which nothing was measured to be worth changing."""
METADATA = "qcompiler."
"""How an engine form begins that is told to the engine as metadata of the model."""


@dataclass(frozen=True)
class Build:
    """One lowered model and what was planned for it.

    Attributes:
        state: the state behind the last pass.
        planned: fused calls that lowering started from.
        forms: the forms in force (a group that calibration never observed is float).
    """

    state: CompileState
    planned: tuple[Planned, ...]
    forms: dict[str, Form]

    @property
    def model(self) -> ir.Model:
        """Return the LOWERED graph."""
        return self.state.model


@dataclass
class Workshop:
    """Build a canonical FLOAT graph in any choice of forms.

    Attributes:
        base: the FLOAT state; never changed.
        backend: lowers, runs and reads builds back.
        options: threads.
        emit: ``auto``, ``qdq`` or ``qoperator``.
        estimator: range estimator of activations.
        engine_forms: rewrites in force for every build (forced emissions, avoided traps).
        refused: groups that the engine does not fuse in any way, with the reason.
        truth: float32 on this engine is what results are compared with, and what is observed.
        given: the model as imported; the engine form ``as-given`` emits it unchanged.
    """

    base: CompileState
    backend: Backend
    options: EngineOptions = EngineOptions()
    emit: str = "auto"
    estimator: str = "min-max"
    engine_forms: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    truth: Engine = field(default_factory=OrtEngine)
    given: ir.Model | None = None

    @property
    def engine(self) -> Engine:
        """Return the engine that runs builds."""
        return self.backend.engine

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Return the fusion groups of the canonical graph."""
        return find_groups(self.base.model, self.base.target)

    def passes(self, lowering: tuple[Pass, ...] = ()) -> tuple[Pass, ...]:
        """Return the passes from FLOAT to LOWERED.

        Args:
            lowering: the passes behind FUSED; the backend's by default.
        """
        return (
            PlanQuantization(estimator=self.estimator),
            RoundAdaptively(),
            CorrectBias(),
            InsertQdq(),
            FoldScales(),
            FuseQdq(),
            *(lowering or self.backend.lowering(self.emit)),
        )

    def build(
        self,
        forms: Mapping[str, Form],
        engine_forms: Mapping[str, str] | None = None,
        instruments: Sequence[Instrument] = (),
    ) -> Build:
        """Lower the model in the given forms.

        Args:
            forms: form per group; unnamed groups are float.
            engine_forms: rewrites besides those in force.
            instruments: watch the passes.
        """
        if (engine_forms or {}).get(AS_GIVEN) == "keep" and self.given is not None:
            kept = replace(self.base, model=self.given.clone(), phase=Phase.LOWERED, remarks=list(self.base.remarks))
            asked = {**self.engine_forms, **(engine_forms or {})}.items()
            kept.model.metadata_props.update({key: value for key, value in asked if key.startswith(METADATA)})
            return Build(kept, (), {g.name: "float" for g in self.groups})
        state = self._start(forms, {**self.engine_forms, **(engine_forms or {})})
        watch = _PlannedFusions()
        Pipeline(self.passes()).run(state, (*instruments, watch))
        remove_unread_constants(state.model)
        made = {name: choice.form for name, choice in state.plan.choices.items()}
        return Build(state, watch.planned, made)

    def _start(self, forms: Mapping[str, Form], engine_forms: Mapping[str, str]) -> CompileState:
        state = self.base.clone()
        state.forms = {g.name: forms.get(g.name, "float") for g in self.groups}
        for name in self.refused:
            state.forms[name] = "float"
        state.engine_forms = dict(engine_forms)
        return state

    def computable(self, build: Build) -> ir.Model:
        """Return the build as the backend's engine can run it: itself, or a twin that computes the same numbers."""
        twin = self.backend.twin(build.model)
        return self._lowered_by(twin, build.forms, build.state.engine_forms) if twin else build.model

    def draft(self, forms: Mapping[str, Form], engine_forms: Mapping[str, str]) -> ir.Model:
        """Return a build whose numbers are nearly those of the lowered model, and that is cheap to make and to run."""
        draft = self.backend.draft()
        return self._lowered_by(draft, forms, engine_forms) if draft else self.build(forms, engine_forms).model

    def _lowered_by(
        self, lowering: tuple[Pass, ...], forms: Mapping[str, Form], engine_forms: Mapping[str, str]
    ) -> ir.Model:
        state = self._start(forms, {**self.engine_forms, **engine_forms})
        Pipeline(self.passes(lowering)).run(state)
        return state.model

    def prove(self, build: Build) -> Proof:
        """Read the engine's graph back and match it with what was planned."""
        return self.backend.prove(build.planned, build.model, self.options)

    def learn_emission(self, forms: Mapping[str, Form]) -> Proof:
        """Find out, group by group, which form the engine takes: Q/DQ, its integer operator, or neither.

        Groups that stay unfused either way are refused from then on: Q/DQ that nothing fuses only costs time.
        """
        proof = self.prove(self.build(forms))
        if any(miss.reason == ENGINE_REFUSED for miss in proof.missed):
            return proof  # it does not build in float either, or for what no group can help
        if proof.missed and self.emit == "auto" and self.backend.emits_operators:
            for miss in proof.missed:
                self.engine_forms[f"emit:{miss.group}"] = "qoperator"
            proof = self.prove(self.build(forms))
        for _ in range(3):
            if not proof.missed or self.emit != "auto":
                break
            for miss in proof.missed:
                self.engine_forms.pop(f"emit:{miss.group}", None)
                self.refused[miss.group] = f"{miss.reason}: {miss.text}"
            proof = self.prove(self.build(forms))
        return proof


class _PlannedFusions:
    """An instrument that notes the fused calls before lowering takes them apart."""

    def __init__(self) -> None:
        self.planned: tuple[Planned, ...] = ()

    def before_pass(self, state: CompileState, step: object) -> None:
        """Note the calls of a FUSED graph."""
        if state.phase is Phase.FUSED:
            self.planned = planned_fusions(state.model, state.plan)

    def after_pass(self, state: CompileState, step: object, changes: int) -> None:
        """Do nothing."""

    def on_failure(self, state: CompileState, step: object, error: Exception) -> None:
        """Do nothing."""
