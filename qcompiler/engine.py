"""What qcompiler asks of an inference engine; only ``qcompiler.backends`` imports one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
ModelLike = ir.Model | bytes | str | Path


@dataclass(frozen=True)
class ShapeRange:
    """Shapes that an input may take, for engines that are built for a range: three tuples of the same length.

    Attributes:
        least: the smallest length of each axis.
        best: the lengths to optimize for.
        most: the largest length of each axis.
    """

    least: tuple[int, ...]
    best: tuple[int, ...]
    most: tuple[int, ...]

    @property
    def fixed(self) -> tuple[int, ...]:
        """Return the length of each axis that has only one, and -1 for the others."""
        return tuple(low if low == high else -1 for low, high in zip(self.least, self.most, strict=True))


@dataclass(frozen=True)
class TensorInfo:
    """Name, NumPy dtype and shape of a model's input or output; an axis is an int, a name or None if unknown."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is to run a model.

    Attributes:
        threads: threads inside one operator; 0 leaves the choice to the engine.
        optimize: let the engine rewrite the graph (off for reference runs and observation).
        shared_pool: take memory from one pool that all such sessions of the process share, rather than one each (for
            models that run in pieces).
    """

    threads: int = 1
    optimize: bool = True
    shared_pool: bool = False


class EngineValue(Protocol):
    """A value that an engine holds, of any ONNX type; passed from run to run without a copy."""

    @property
    def type(self) -> ir.TypeProtocol:
        """Return its ONNX type."""
        ...

    def array(self) -> Array:
        """Return a tensor's numbers, without a copy where the engine's memory can be read; not to be written to."""
        ...


class Runner(Protocol):
    """A loaded artifact of any engine."""

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """Return the inputs that a caller feeds, in the model's order."""
        ...

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """Return the outputs in the model's order."""
        ...

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run once and return the named outputs (all by default)."""
        ...

    def run_values(self, values: Mapping[str, EngineValue], outputs: Sequence[str]) -> dict[str, EngineValue]:
        """Run once on the engine's own values and return the named outputs as such."""
        ...


@dataclass(frozen=True)
class NodeCost:
    """Time of one executed node: microseconds per run, and what the engine calls it."""

    name: str
    op_type: str
    microseconds: float


@dataclass(frozen=True)
class Profile:
    """Per-node times of one model on one engine (minimum over rounds of the time per run).

    Attributes:
        nodes: the times.
        executed: the very graph that was timed, from an engine that names its nodes anew at every load.
    """

    nodes: tuple[NodeCost, ...] = field(default_factory=tuple)
    executed: ir.Model | None = None

    @property
    def total(self) -> float:
        """Return the sum over all nodes in microseconds per run."""
        return sum(node.microseconds for node in self.nodes)


class Engine(Protocol):
    """An inference engine as the compiler's measuring parts need it."""

    name: str

    @property
    def version(self) -> str:
        """Return the engine's version, for the decisions record."""
        ...

    def load(self, model: ModelLike, options: EngineOptions = EngineOptions()) -> Runner:
        """Load a model.

        Raises:
            ModelError: the engine refuses the model; the text carries the engine's reason.
        """
        ...

    def value(self, array: Array) -> EngineValue:
        """Return a tensor as a value of the engine; the array may be shared, so it must not be written to."""
        ...

    def profile(self, model: ModelLike, feeds: Feeds, options: EngineOptions, rounds: int) -> Profile:
        """Run ``rounds`` times with the engine's own profiler and return the time of each node."""
        ...

    def optimized_graph(self, model: ModelLike, options: EngineOptions) -> ir.Model:
        """Return the graph that the engine executes after its own optimizations."""
        ...
