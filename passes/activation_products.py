"""Products of two activations: their kernel's node, and the transposes around it, which become its strides.

Heads of an attention lie side by side in the row of a token. The kernel reads and writes them there, so a Transpose
that leaves the last axis last costs nothing; one that swaps the last two axes of the second operand is the kernel's
other layout.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.ir.graph import attr_ints, const_array, is_op, rank_of, single_consumer
from qcompiler.ir.rewriter import Rewriter
from qcompiler.passes.integer_operators import Emission
from qcompiler.passes.kernel_nodes import FOLDED, arguments_of, is_kernel, kernel_node, scalar_params, settings_of

_MOST_AXES = 4
"""Of an operand that is read by strides: the kernel's batch has two axes."""
_ROLES = ("x", "xs", "xz", "w", "ws", "wz", "b", "ys", "yz")


def multiplies_activations(node: ir.Node) -> bool:
    """Return whether a node stands for a product of two activations."""
    return is_kernel(node, "int8_matmul", "float_matmul") and const_array(arguments_of(node).get("w")) is None


def find_product(e: Emission) -> dict[str, ir.Value | None] | str:
    """Return the arguments of a product of two activations by role, or why there is no kernel."""
    if any(e.roles[role].dtype is not ir.DataType.INT8 for role in "xw"):
        return f"activations of {e.roles['x'].dtype} and {e.roles['w'].dtype} have no kernel"
    if any(rank is None or rank < 2 for rank in (rank_of(e.roles["x"]), rank_of(e.roles["w"]))):
        return "an operand is no matrix"
    for role in ("x", "w", *(["y"] if "ys" in e.roles else [])):
        if scalar_params(e.get(role + "s"), e.get(role + "z")) is None:
            return f"the scale of {role} is not one constant"
    if "bs" in e.roles or ("b" in e.roles and const_array(e.roles["b"]) is None):
        return "the bias is not a constant of floats"
    return {role: e.get(role) for role in _ROLES}


def fold_transposes(rewriter: Rewriter, node: ir.Node) -> None:
    """Let a product of two activations read what is transposed for it, and write what is transposed behind it."""
    arguments: dict[str, ir.Value | None] = dict(arguments_of(node))
    settings, before = settings_of(node), node
    dead = []
    for role, name in (("x", "a_axes"), ("w", "w_axes")):
        value = arguments[role]
        maker = None if value is None else value.producer()
        axes = _axes(maker, node)
        if maker is None or axes is None:
            continue
        swapped = role == "w" and axes[-2] == len(axes) - 1
        if swapped:
            axes = (*axes[:-2], axes[-1], axes[-2])
        if axes[-1] != len(axes) - 1:
            continue
        arguments[role] = maker.inputs[0]
        settings |= ({"w_layout": "nk"} if swapped else {}) | ({name: axes} if axes != tuple(range(len(axes))) else {})
        dead.append(maker)
    last = single_consumer(node.outputs[0])
    axes = _axes(last, node)
    if last is not None and axes is not None and axes[-1] == len(axes) - 1:
        settings["out_axes"], before = axes, last
        dead.append(node)
    if not dead:
        return
    made = kernel_node(
        rewriter, node.op_type, arguments, settings, before=before, origin=[node, *dead], name=f"{node.name}:strided"
    )
    made.metadata_props.update({FOLDED: node.metadata_props[FOLDED]} if FOLDED in node.metadata_props else {})
    name, node.name = str(node.name), rewriter.unique(f"{node.name}:was")
    made.name = name
    rewriter.take_over(before.outputs[0], made.outputs[0])
    rewriter.replace(before.outputs[0], made.outputs[0])
    rewriter.erase_dead([before, *dead])


def _axes(node: ir.Node | None, reader: ir.Node) -> tuple[int, ...] | None:
    """Return where a Transpose of the reader's graph takes its result's axes from, None if it is none for strides."""
    if not is_op(node, "Transpose") or node.graph is not reader.graph:
        return None
    rank = rank_of(node.inputs[0])
    if rank is None or not 2 <= rank <= _MOST_AXES:
        return None
    return tuple(attr_ints(node, "perm") or range(rank - 1, -1, -1))
