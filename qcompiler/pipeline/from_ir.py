"""Passes of onnx_ir's own kind (``onnx_ir.passes``, onnxscript's rewriter) as passes of a pipeline here."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from onnx_ir.passes import PassBase

from qcompiler.errors import PassError, innermost
from qcompiler.ir.constants import lift_constants
from qcompiler.ir.graph import ORIGIN, all_nodes
from qcompiler.ir.naming import make_names_unique
from qcompiler.ir.phase import Phase
from qcompiler.ir.shapes import infer_shapes
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Contract, Lossy
from qcompiler.pipeline.state import CompileState

_UNKNOWN = Lossy()
"""The contract of a pass of which nothing is known."""


@dataclass(frozen=True)
class FromIrPass(Pass):
    """A pass that lets another one, of onnx_ir's kind, do the work.

    A subclass says which one (`make`); its dataclass fields are options, which ``make`` hands on. It has one change to
    tell: that the other pass modified the model. What the other pass leaves behind is brought back to what passes
    here rely on: constants are initializers, names are unique, new nodes have an origin, shapes are known.
    """

    numerics: ClassVar[Contract] = _UNKNOWN

    @abstractmethod
    def make(self) -> PassBase:
        """Return the pass that does the work."""

    def run(self, state: CompileState) -> int:
        """Run the other pass and return 1 if it modified the model, else 0.

        Raises:
            PassError: the other pass failed; the text carries its innermost reason.
        """
        before = set(all_nodes(state.model))
        try:
            result = self.make()(state.model)
        except Exception as error:  # another package's pass can raise anything
            cause = innermost(error)
            raise PassError(f"{self.name()}: {type(cause).__name__}: {cause}") from error
        state.model = result.model
        if not result.modified:
            return 0
        lift_constants(state.model)
        make_names_unique(state.model)
        for node in all_nodes(state.model):
            if node not in before and ORIGIN not in node.metadata_props:
                node.metadata_props[ORIGIN] = (node.name or "").replace(";", ",")
        infer_shapes(state.model)
        return 1


def from_ir_pass(
    make: Callable[[], PassBase],
    name: str,
    *,
    doc: str = "",
    needs: Phase | tuple[Phase, ...] = Phase.FLOAT,
    numerics: Contract = _UNKNOWN,
) -> type[FromIrPass]:
    """Return a pass class around a pass of onnx_ir's kind, for one that has no options.

    Args:
        make: returns the pass; called at every run.
        name: kebab-case, as pipelines write it.
        doc: what it does, for ``qcompiler passes``; by default the first line of the other pass's docstring.
        needs: the phases the graph may be in.
        numerics: how far the numbers may move; what is not known to be exact is `Lossy`.
    """
    first = (doc or type(make()).__doc__ or "").strip().splitlines()

    @dataclass(frozen=True)
    class Made(FromIrPass):
        pass_name: ClassVar[str] = name

        def make(self) -> PassBase:
            return make()

    Made.__doc__ = first[0] if first else f"Run {name}."
    Made.__qualname__ = Made.__name__ = "".join(part.capitalize() for part in name.split("-"))
    Made.needs, Made.numerics = needs, numerics
    return Made
