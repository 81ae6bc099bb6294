"""What all passes of one build share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import onnx_ir as ir

from qcompiler.engine import Array
from qcompiler.ir.graph import origins
from qcompiler.ir.phase import Phase
from qcompiler.quant.plan import Form, QuantPlan
from qcompiler.quant.rounding import RoundedWeight
from qcompiler.quant.spec import QuantSource, RangeSource
from qcompiler.targets.target import Target


@dataclass(frozen=True)
class Remark:
    """Why something was or was not done.

    Attributes:
        pass_name: the pass that speaks.
        node: the node it speaks of (its name in the graph), or empty for the whole model.
        reason: a stable kebab-case code, such as ``never-observed`` or ``not-constant``.
        text: one sentence for people.
        rule: the pattern rule, if one was tried.
        done: true if the pass acted, false if it declined.
        numbers: figures behind the decision.
    """

    pass_name: str
    node: str
    reason: str
    text: str = ""
    rule: str = ""
    done: bool = False
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """One application of a rule: the rule, the node it was applied at and the imported nodes that one comes from."""

    rule: str
    node: str
    origins: tuple[str, ...] = ()


@dataclass
class ChangeLog:
    """The rule applications of a run, and how many there may be; bisecting sets the limit.

    Attributes:
        limit: number of applications after which all are refused; None is no limit.
        applied: those that were made, in order.
    """

    limit: int | None = None
    applied: list[Change] = field(default_factory=list)

    def allow(self, rule: str, node: ir.Node) -> bool:
        """Return whether one more application may be made, and count it if so."""
        if self.limit is not None and len(self.applied) >= self.limit:
            return False
        self.applied.append(Change(rule, node.name or "", origins(node)))
        return True


@dataclass
class CompileState:
    """The model on its way, and what the passes know about it (the one mutable type).

    Attributes:
        model: the graph.
        phase: which phase the graph is in.
        target: the capability table it is compiled for.
        plan: decisions; empty until plan-quantization.
        statistics: observed ranges, if calibration ran.
        forms: forms that were decided outside (search, overrides, a decisions record), by group.
        engine_forms: engine-specific rewrites that were decided outside, by name.
        estimators: range estimator per group, where it is not the default.
        imported: scales and zero points of an imported quantized model, by value name.
        smoothing: scale per channel of activations that smooth-activations divides, by value name.
        equalization: scale per channel that equalize-layers divides by, by the class's first value; emptied by it.
        splitting: input channels that split-outlier-channels halves, by group; emptied by it.
        rounding: weights with their codes that round-adaptively puts in place, by group.
        bias_corrections: what correct-bias adds to the bias, by group and form (`correction_key`).
        half: the half type that floats had before widen-half-precision; None where nothing was widened.
        remarks: why things were or were not done, in order.
        quantized: weights quantized so far, by name, specification and numbers; clones share it.
        changes: the log that each rule application is entered in, if somebody wants to know or to limit them.
    """

    model: ir.Model
    target: Target
    phase: Phase = Phase.FLOAT
    plan: QuantPlan = field(default_factory=QuantPlan)
    statistics: RangeSource | None = None
    forms: dict[str, Form] = field(default_factory=dict)
    engine_forms: dict[str, str] = field(default_factory=dict)
    estimators: dict[str, str] = field(default_factory=dict)
    imported: dict[str, QuantSource] = field(default_factory=dict)
    smoothing: dict[str, tuple[float, ...]] = field(default_factory=dict)
    equalization: dict[str, tuple[float, ...]] = field(default_factory=dict)
    splitting: dict[str, tuple[int, ...]] = field(default_factory=dict)
    rounding: dict[str, RoundedWeight] = field(default_factory=dict)
    bias_corrections: dict[str, tuple[float, ...]] = field(default_factory=dict)
    half: ir.DataType | None = None
    remarks: list[Remark] = field(default_factory=list)
    quantized: dict[tuple[str, str], Array] = field(default_factory=dict, repr=False)
    changes: ChangeLog | None = None

    def allow(self, rule: str, node: ir.Node) -> bool:
        """Return whether a pass may apply a rule at a node; a pass asks right before each application.

        Passes hand this on as ``apply_rules(..., allow=state.allow)``, or ask it themselves with a rule name of their
        own, so that ``qcompiler opt --bisect`` can stop them half-way.
        """
        return self.changes is None or self.changes.allow(rule, node)

    def remark(
        self,
        pass_name: str,
        node: ir.Node | str,
        reason: str,
        text: str = "",
        *,
        rule: str = "",
        done: bool = False,
        numbers: dict[str, float] | None = None,
    ) -> None:
        """Record a remark; the same one is kept once."""
        name = node if isinstance(node, str) else (node.name or "")
        made = Remark(pass_name, name, reason, text, rule, done, numbers or {})
        if made not in self.remarks:
            self.remarks.append(made)

    def clone(self) -> CompileState:
        """Return a state whose graph can be changed without touching this one (tensors are shared)."""
        return replace(
            self,
            model=self.model.clone(),
            forms=dict(self.forms),
            engine_forms=dict(self.engine_forms),
            estimators=dict(self.estimators),
            imported=dict(self.imported),
            equalization=dict(self.equalization),
            splitting=dict(self.splitting),
            rounding=dict(self.rounding),
            bias_corrections=dict(self.bias_corrections),
            remarks=list(self.remarks),
        )
