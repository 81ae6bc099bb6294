"""store-half-precision: keep float constants in the half type that the model came with, read through a Cast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.ir.graph import all_graphs
from qcompiler.ir.phase import Phase
from qcompiler.ir.rewriter import Rewriter
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Contract, Exact
from qcompiler.pipeline.state import CompileState

_LEAST_BYTES = 4096
"""Smaller constants are left alone: a Cast of theirs costs more than it saves."""
_NUMPY: dict[ir.DataType, npt.DTypeLike] = {
    ir.DataType.FLOAT16: np.float16,
    ir.DataType.BFLOAT16: ml_dtypes.bfloat16,
}


@dataclass(frozen=True)
class StoreHalfPrecision(Pass):
    """Store the float32 constants of a widened model in its own half type again, where that loses nothing.

    A Cast widens them. Engines fold it when they load the model, so that it costs file size half of what it would, and
    no time per run. Models that `widen-half-precision` did not touch are left alone.
    """

    needs = Phase.LOWERED
    numerics: ClassVar[Contract] = Exact()

    def run(self, state: CompileState) -> int:
        """Store constants narrow and return how many."""
        half, rewriter, stored = state.half, Rewriter(state.model), 0
        if half is None:
            return 0
        for graph in all_graphs(state.model):
            first = next(iter(graph), None)
            for value in list(graph.initializers.values()):
                tensor = value.const_value
                if first is None or tensor is None or not value.uses() or value.is_graph_output():
                    continue
                if value.dtype is not ir.DataType.FLOAT or tensor.nbytes < _LEAST_BYTES:
                    continue
                narrow = _narrowed(tensor, half)
                if narrow is None:
                    continue
                self._read_through_cast(rewriter, graph, value, ir.Tensor(narrow, dtype=half), first)
                stored += 1
        return stored

    def _read_through_cast(
        self, rewriter: Rewriter, graph: ir.Graph, value: ir.Value, tensor: ir.TensorProtocol, first: ir.Node
    ) -> None:
        name = str(value.name)
        constant = rewriter.constant(tensor, f"{name}:{tensor.dtype.name.lower()}", graph)
        cast = rewriter.node(
            "Cast", [constant], before=first, origin=name, name=f"{name}/Cast",
            attributes={"to": ir.DataType.FLOAT}, outputs=[f"{name}:float"],
        ).outputs[0]  # fmt: skip
        rewriter.declare(cast, ir.DataType.FLOAT, value.shape)
        value.replace_all_uses_with(cast)
        del graph.initializers[name]


def _narrowed(tensor: ir.TensorProtocol, half: ir.DataType) -> npt.NDArray[np.generic] | None:
    """Return the same numbers in a half type, or None if it does not hold all of them."""
    wide = tensor.numpy()
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and differs
        narrow = wide.astype(_NUMPY[half])
    return narrow if np.array_equal(narrow.astype(np.float32), wide, equal_nan=True) else None
