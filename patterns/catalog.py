"""All rules there are, for ``qcompiler patterns``."""

from __future__ import annotations

from qcompiler.patterns.activations import ACTIVATIONS, GELU, SILU_RULES
from qcompiler.patterns.affine import BATCH_NORMS, FACTORS
from qcompiler.patterns.casts import CASTS
from qcompiler.patterns.focus import FOCUS_RULES
from qcompiler.patterns.gemm import GEMM, MATMUL_ADD, OPERAND_ORDER
from qcompiler.patterns.identities import IDENTITIES
from qcompiler.patterns.language import Rule
from qcompiler.patterns.norms import NORMS
from qcompiler.patterns.padding import PADDING
from qcompiler.patterns.qdq import FUSE_RULES
from qcompiler.patterns.reshapes import RESHAPES
from qcompiler.patterns.scales import SCALES
from qcompiler.patterns.shape_arithmetic import SHAPE_ARITHMETIC
from qcompiler.patterns.transposes import TRANSPOSES
from qcompiler.patterns.traps import QUICK_GELU, TRAP_RULES


def all_rules() -> tuple[Rule, ...]:
    """Return every rule, by family."""
    return (
        *IDENTITIES,
        *CASTS,
        *RESHAPES,
        *SHAPE_ARITHMETIC,
        *TRANSPOSES,
        *ACTIVATIONS,
        *PADDING,
        *FOCUS_RULES,
        *BATCH_NORMS,
        *GEMM,
        *MATMUL_ADD,
        *FACTORS,
        *OPERAND_ORDER,
        *NORMS,
        *GELU,
        *SILU_RULES,
        *SCALES,
        *FUSE_RULES,
        *(rule for rules in TRAP_RULES.values() for rule in rules),
        QUICK_GELU,
    )
