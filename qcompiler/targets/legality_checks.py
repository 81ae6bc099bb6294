"""The checks that rows of a legality table name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from qcompiler.targets import legality_operators as operators
from qcompiler.targets import legality_parameters as parameters
from qcompiler.targets.legality_parameters import Finding
from qcompiler.targets.quantized_view import QuantizedView


class Check(Protocol):
    """A predicate with its parameters."""

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield what breaks the rule."""
        ...


CHECKS: dict[str, type[Check]] = {
    "stored-types": parameters.StoredTypes,
    "stored-type-missing": parameters.StoredTypeMissing,
    "stored-type-differs": parameters.StoredTypeDiffers,
    "zero-point-nonzero": parameters.ZeroPointNonzero,
    "not-constant": parameters.NotConstant,
    "parameter-shapes": parameters.ParameterShapes,
    "scale-values": parameters.ScaleValues,
    "scale-types": parameters.ScaleTypes,
    "scale-matches-data": parameters.ScaleMatchesData,
    "float-types-meet": operators.FloatTypesMeet,
    "mixed-stored-types": operators.MixedStoredTypes,
    "operators": operators.Operators,
    "operator-on-types": operators.OperatorOnTypes,
    "weight-per-channel": operators.WeightPerChannel,
    "granularity": parameters.Granularity,
    "block-length": parameters.BlockLength,
    "block-axis": parameters.BlockAxis,
    "weight-axis": operators.WeightAxis,
    "one-operand-quantized": operators.OneOperandQuantized,
    "stored-operand": operators.StoredOperand,
    "odd-length": parameters.OddLength,
    "stored-constant-use": operators.StoredConstantUse,
    "quantized-before-activation": operators.Follows,
    "reads-quantized": operators.ReadsQuantized,
    "opset-range": parameters.OpsetRange,
    "opset-at-least": parameters.OpsetAtLeast,
    "one-tensor-thrice": operators.OneTensorThrice,
    "moved-across-types": operators.MovedAcrossTypes,
    "names-shared": operators.NamesShared,
    "matmulnbits": operators.MatMulNBits,
}
"""Checks by the name that a row gives."""
