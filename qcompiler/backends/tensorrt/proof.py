"""Planned against fused on TensorRT: by the operand types of the layers in the engine's build log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.backends.readback import ENGINE_REFUSED, Miss, Planned, Proof
from qcompiler.backends.tensorrt.layers import Layer
from qcompiler.backends.tensorrt.probe import describe_failure
from qcompiler.backends.tensorrt.report import BuildReport
from qcompiler.ir.graph import all_nodes, is_const

_PRODUCTS = ("gemm", "correlation", "deconv", "conv", "matmul", "matrixmultiply", "fullyconnected")
"""Parts of the kind of a layer that multiplies: RTX's, then those of kernels in TensorRT proper."""
_PRODUCT_STEPS = frozenset({"Fc", "Corr", "Gemm", "Dgra", "Matm"})
"""Operations of a generated kernel that multiply."""
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})
_QUANTIZERS = frozenset(
    {
        "QuantizeLinear", "DequantizeLinear", "TRT_FP4DynamicQuantize", "TRT_MXFP8DynamicQuantize",
        "TRT_MXFP8DequantizeLinear",
    }
)  # fmt: skip
_MOVERS = frozenset(
    {
        "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather", "Expand", "Tile", "DepthToSpace",
        "SpaceToDepth", "Split", "MaxPool", "Resize", "Concat", "Pad", "Identity",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Product:
    """How a layer multiplies.

    Attributes:
        quantized: both operands enter the product as they are stored.
        decoded: a quantized constant is turned into floats inside the layer: weight-only.
        text: such as ``Int8 x Int8 gemm``.
    """

    quantized: bool
    decoded: bool
    text: str


def product_of(layer: Layer) -> Product | None:
    """Return how a layer multiplies, None if it does not.

    A generated kernel is named after its operations in order. Quantization ends in ``Roun Cast`` (8-bit floats:
    ``Mul Cast``), and what decodes is ``Cast Mul``: with that in front of the product, it is one of floats.
    """
    kind = layer.kind.lower()
    if layer.steps and (kind in ("kgen", "runtime_fusion") or not any(part in kind for part in _PRODUCTS)):
        places = [index for index, step in enumerate(layer.steps) if step in _PRODUCT_STEPS]
        if not places:
            return None
        return _generated(layer, layer.steps, places)
    if not any(part in kind for part in _PRODUCTS):
        return None
    types = [operand.element for operand in layer.operands if operand.bits]
    lhs = layer.inputs[0] if layer.inputs else None
    if lhs is not None and lhs.bits and types.count(lhs.element) > 1:
        return Product(True, False, f"{lhs.element} x {lhs.element} {layer.kind}")
    rhs = next((o.element for o in layer.operands[1:]), "?")
    weight = next((o.element for o in layer.constants if o.bits), "")
    if weight:
        return Product(False, True, f"{layer.inputs[0].element if layer.inputs else '?'} x {weight} {layer.kind}")
    return Product(False, False, f"{lhs.element if lhs is not None else '?'} x {rhs} {layer.kind}")


def _generated(layer: Layer, steps: Sequence[str], places: Sequence[int]) -> Product:
    """Judge the products of a generated kernel: the worst of them counts."""
    narrow = [operand.element for operand in layer.operands if operand.bits]
    constant = next((o.element for o in layer.constants if o.bits), "")
    wide = next((o.element for o in (*layer.outputs, *layer.inputs) if not o.bits), "Float")
    start, quantized = 0, bool(narrow)
    for place in places:
        quantized = quantized and not _decodes(steps[start:place], narrow)
        start = place + 1
    name = f"{layer.kind} {layer.name.removeprefix('__myl_').partition('_myl')[0]}"
    if quantized:
        return Product(True, False, f"{narrow[0]} x {narrow[-1]} in {name}")
    if constant:
        return Product(False, True, f"{wide} x {constant} decoded in {name}")
    return Product(False, False, f"{wide} x {wide} in {name}")


def _decodes(before: Sequence[str], narrow: Sequence[str]) -> bool:
    """Return whether the operations in front of a product turn its operands into floats."""
    last = max((index for index, step in enumerate(before) if step == "Roun"), default=-1)
    behind = before[last + 1 :]
    if last < 0 and narrow and all(element.startswith("FP") for element in narrow):
        return any(behind[i : i + 2] == ("Cast", "Mul") for i in range(len(behind)))
    return "Mul" in behind


def prove_engine(planned: Sequence[Planned], report: BuildReport, model: ir.Model) -> Proof:
    """Match every planned fusion with the layers of the engine that was built.

    A product happened as planned if its layer multiplies stored numbers (both operands quantized in the model) or
    decodes the weight itself (only the weight quantized). What only moves data may have vanished or been absorbed; an
    operator in between happened if its layer reads or writes quantized numbers.

    Args:
        planned: fused calls, from `planned_fusions`.
        report: of the build.
        model: the lowered model that was built.
    """
    note = "; ".join((f"{report.flavour} {report.version}, sm{report.sm}", *report.notes))
    if not report.built:
        text = describe_failure(report)
        return Proof(len(planned), {}, tuple(Miss(p.group, p.kind, ENGINE_REFUSED, text) for p in planned), note)
    if not report.layers:
        return Proof(len(planned), note=f"{note}; its log lists no layers, so nothing is proven")
    nodes = {str(node.name): node for node in all_nodes(model)}
    fused: dict[str, str] = {}
    missed = []
    for plan in planned:
        kernel, reason, text = _judge(plan, report.layers, nodes)
        if kernel:
            fused[plan.group] = kernel
        else:
            missed.append(Miss(plan.group, plan.kind, reason, text))
    return Proof(len(planned), fused, tuple(missed), note)


def _judge(plan: Planned, layers: Sequence[Layer], nodes: Mapping[str, ir.Node]) -> tuple[str, str, str]:
    """Return the kernel of a planned fusion, or the reason and the text of a miss."""
    names = _names(plan, nodes)
    mine = [layer for layer in layers if names & set(layer.origins)] or _writers(plan, layers)
    if plan.kind in _WEIGHTED:
        return _judge_product(plan, mine, nodes)
    narrow = [layer for layer in mine if any(o.bits for o in (*layer.inputs, *layer.outputs))]
    if narrow:
        return _shown(narrow[0]), "", ""
    if not mine and plan.kind in _MOVERS:
        return "moved away", "", ""
    shared = [layer for layer in mine if _has_product(layer, nodes)]
    if shared:  # what stands behind a product costs neither a layer nor a pass over memory
        return f"behind a product in {_shown(shared[0])}", "", ""
    if not mine:
        return "", "engine-renamed", "no layer of the engine comes from the group"
    return "", "engine-kept-float", f"ran in {mine[0].kind} on {_types(mine[0])}"


def _judge_product(plan: Planned, mine: Sequence[Layer], nodes: Mapping[str, ir.Node]) -> tuple[str, str, str]:
    products = [product for layer in mine if (product := product_of(layer)) is not None]
    if not products:
        if mine:
            return (
                "",
                "engine-renamed",
                f"the group is only part of {mine[0].kind} {mine[0].name}, which multiplies nothing",
            )
        return "", "engine-renamed", "no layer of the engine comes from the group"
    weight_only = _weight_only(plan, nodes)
    for product in products:
        if product.quantized or (weight_only and product.decoded):
            return product.text, "", ""
    if weight_only:
        return "", "engine-decoded-weight", f"the weight is decoded by a layer of its own; ran as {products[0].text}"
    if products[0].decoded:
        return "", "engine-decoded-both", f"ran as {products[0].text}"
    return "", "engine-kept-float", f"ran as {products[0].text}"


def _has_product(layer: Layer, nodes: Mapping[str, ir.Node]) -> bool:
    return any(name in nodes and nodes[name].op_type in _WEIGHTED for name in layer.origins)


def _names(plan: Planned, nodes: Mapping[str, ir.Node]) -> set[str]:
    """Return the names of the nodes that do a group's work: its root, else what writes its results."""
    if plan.group in nodes and nodes[plan.group].op_type not in _QUANTIZERS:
        return {plan.group}
    return {
        name
        for name, node in nodes.items()
        if node.op_type not in _QUANTIZERS and any(str(value.name) in plan.outputs for value in node.outputs)
    }


def _writers(plan: Planned, layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers that write a group's results, by the names of tensors."""
    return [layer for layer in layers if any(output.name in plan.outputs for output in layer.outputs)]


def _weight_only(plan: Planned, nodes: Mapping[str, ir.Node]) -> bool:
    """Return whether the lowered model quantizes the weight of a group, and not what is multiplied by it."""
    node = nodes.get(plan.group)
    if node is None or len(node.inputs) < 2:
        return False
    return _stored(node.inputs[1]) and not _stored(node.inputs[0])


def _stored(value: ir.Value | None) -> bool:
    """Return whether a value is read from stored integers or narrow floats, through what only moves or casts."""
    while value is not None and not is_const(value) and (node := value.producer()) is not None:
        if node.op_type in ("DequantizeLinear", "TRT_MXFP8DequantizeLinear"):
            return True
        if node.op_type not in _MOVERS and node.op_type != "Cast":
            return False
        value = node.inputs[0]
    return False


def _shown(layer: Layer) -> str:
    return f"{layer.kind} {_types(layer)}"


def _types(layer: Layer) -> str:
    reads = ",".join(dict.fromkeys(o.element for o in layer.inputs)) or "-"
    return f"{reads} -> {','.join(dict.fromkeys(o.element for o in layer.outputs)) or '-'}"
