"""What the pattern engine knows about operators: which commute, which are elementwise, their defaults."""

from __future__ import annotations

from functools import lru_cache

import onnx
import onnx_ir as ir

COMMUTATIVE = frozenset(
    {"Add", "Mul", "Max", "Min", "Sum", "Mean", "And", "Or", "Xor", "Equal", "BitwiseAnd", "BitwiseOr", "BitwiseXor"}
)
"""Operators whose inputs may be exchanged (when there are exactly two)."""

UNARY_ELEMENTWISE = frozenset(
    {
        "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "Ceil", "Celu", "Clip", "Cos",
        "Cosh", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "IsInf", "IsNaN", "LeakyRelu",
        "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin",
        "Sinh", "Softplus", "Softsign", "Sqrt", "Tan", "Tanh", "ThresholdedRelu",
    }
)  # fmt: skip
"""Operators that map each element of their first input on its own; further inputs are scalars."""

BINARY_ELEMENTWISE = frozenset(
    {
        "Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Mod", "And", "Or", "Xor", "Equal", "Greater",
        "GreaterOrEqual", "Less", "LessOrEqual", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "PRelu",
    }
)  # fmt: skip
"""Operators of two broadcast inputs."""

RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
"""Operators that give another result at each run."""

AttributeValue = int | float | str | tuple[int, ...] | tuple[float, ...] | tuple[str, ...] | ir.TensorProtocol


@lru_cache(maxsize=4096)
def default_attribute(op_type: str, name: str, opset: int, domain: str = "") -> AttributeValue | None:
    """Return the default that an operator's specification gives an attribute, or None if it has none.

    Args:
        op_type: operator name.
        name: attribute name.
        opset: version of the operator's domain.
        domain: operator domain.
    """
    try:
        schema = onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return None
    attribute = schema.attributes.get(name)
    if attribute is None or not attribute.default_value.type:
        return None
    value = onnx.helper.get_attribute_value(attribute.default_value)
    if isinstance(value, bytes):
        return value.decode()
    return tuple(value) if isinstance(value, list) else value


def attribute_value(node: ir.Node, name: str, opset: int) -> AttributeValue | None:
    """Return an attribute in a comparable form (lists as tuples), its default where absent, or None."""
    attribute = node.attributes.get(name)
    if attribute is None:
        return default_attribute(node.op_type, name, opset, "" if node.domain == "ai.onnx" else node.domain)
    value = attribute.value
    if attribute.type in (ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS):
        return tuple(value)
    return value  # type: ignore[no-any-return]
