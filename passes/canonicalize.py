"""One form for everything that can be written in several ways, the same for every target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.ir.shapes import infer_shapes
from qcompiler.passes.cancel_transposes import CancelTransposes
from qcompiler.passes.deduplicate import Deduplicate
from qcompiler.passes.eliminate_identity import EliminateIdentity
from qcompiler.passes.fold_casts import FoldCasts
from qcompiler.passes.fold_constants import FoldConstants
from qcompiler.passes.fold_focus import FoldFocus
from qcompiler.passes.fold_mul_add_into_weights import FoldMulAddIntoWeights
from qcompiler.passes.fold_reshapes import FoldReshapes
from qcompiler.passes.fold_shapes import FoldShapes
from qcompiler.passes.fuse_batch_norm import FuseBatchNorm
from qcompiler.passes.fuse_matmul_add import FuseMatmulAdd
from qcompiler.passes.fuse_pad import FusePad
from qcompiler.passes.infer_shapes import InferShapes
from qcompiler.passes.inline_constant_if import InlineConstantIf
from qcompiler.passes.normalize_activations import NormalizeActivations
from qcompiler.passes.normalize_gemm import NormalizeGemm
from qcompiler.passes.order_operands import OrderOperands
from qcompiler.passes.recognize_gelu import RecognizeGelu
from qcompiler.passes.recognize_layer_norm import RecognizeLayerNorm
from qcompiler.passes.recognize_silu import RecognizeSilu
from qcompiler.passes.remove_unused import RemoveUnused
from qcompiler.passes.rewrite import RewritePass
from qcompiler.patterns.catalog import offered_rules
from qcompiler.patterns.language import Rule
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Contract, Reassociates
from qcompiler.pipeline.state import CompileState


def canonical_passes() -> tuple[Pass, ...]:
    """Return the passes of one round of `Canonicalize`, in order.

    Constants and shapes come first since all other rules ask for them; nodes are merged before norms are recognised,
    since exporters compute the same difference twice, and those before factors go into weights, which would take a
    Gelu's one half; constants are merged last, since a shared weight takes up no factor.
    """
    return (
        RemoveUnused(),
        FoldConstants(),
        InlineConstantIf(),
        EliminateIdentity(),
        FoldCasts(),
        InferShapes(),
        FoldShapes(),
        FoldConstants(),
        FoldReshapes(),
        Deduplicate(constants=False),
        RecognizeLayerNorm(),
        RecognizeGelu(),
        RecognizeSilu(),
        CancelTransposes(),
        NormalizeActivations(),
        FusePad(),
        FoldFocus(),
        FuseBatchNorm(),
        NormalizeGemm(),
        FuseMatmulAdd(),
        FoldMulAddIntoWeights(),
        OrderOperands(),
        RemoveUnused(),
        InferShapes(),
    )


CANONICALIZE = (
    "remove-unused,fold-constants,inline-constant-if,eliminate-identity,fold-casts,infer-shapes,fold-shapes,"
    "fold-constants,fold-reshapes,deduplicate{constants=false},recognize-layer-norm,recognize-gelu,recognize-silu,"
    "cancel-transposes,normalize-activations,fuse-pad,fold-focus,fuse-batch-norm,normalize-gemm,fuse-matmul-add,"
    "fold-mul-add-into-weights,order-operands,remove-unused,infer-shapes"
)
"""The passes of one round as a pipeline string."""


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Run the passes of `CANONICALIZE` until none changes the graph, then merge equal constants.

    Rules that installed packages offer for it are tried at the end of every round.

    Options:
        rounds: bound on the number of rounds.
    """

    numerics: ClassVar[Contract] = Reassociates(1e-3)
    rounds: int = 6

    def run(self, state: CompileState) -> int:
        """Return the number of changes of all passes together."""
        infer_shapes(state.model)
        steps = (*canonical_passes(), *((_OfferedRules(),) if offered_rules(self.name()) else ()))
        total = 0
        for _ in range(self.rounds):
            changed = 0
            for step in steps:
                count = step.run(state)
                # Shapes that become better known are no change of the graph: they alone warrant no further round.
                changed += 0 if isinstance(step, InferShapes) else count
            total += changed
            if not changed:
                break
        return total + Deduplicate().run(state)


@dataclass(frozen=True)
class _OfferedRules(RewritePass):
    """The rules that other packages offer for every canonical graph; there are no others."""

    pass_name: ClassVar[str] = "canonicalize"
    numerics: ClassVar[Contract] = Reassociates(1e-3)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return none: `RewritePass` adds what is offered."""
        return ()
