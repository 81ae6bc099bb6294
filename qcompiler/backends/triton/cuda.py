"""Run on a GPU: one CUDA graph per plan, replayed without any work of the host in between.

Not run yet on a GPU: the same steps and plans run on the CPU, as references and interpreted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qcompiler.backends.triton.executor import Executor, Prepared
from qcompiler.backends.triton.launcher import Launcher
from qcompiler.backends.triton.program import CONTROL, Program
from qcompiler.backends.triton.tensors import to_torch

_HOSTED = frozenset({"NonZero", "Compress", "Range", "ReverseSequence"})
"""Operators whose torch functions wait for the device: plans with them are not captured."""
_WARM_UPS = 3
"""Runs before a capture: kernels compile, and libraries choose and allocate."""


@dataclass
class Graph:
    """A captured plan: fixed inputs and outputs."""

    graph: Any
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


@dataclass
class CudaExecutor(Executor):
    """An executor that captures each plan once.

    Attributes:
        graphs: captured plans by the shapes of their inputs.
    """

    graphs: dict[int, Graph] = field(default_factory=dict)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run once; inputs are copied to where the graph reads them."""
        tensors = {name: to_torch(array) for name, array in feeds.items()}
        prepared = self.prepare({name: tuple(t.shape) for name, t in tensors.items()})
        if not capturable(prepared):
            return self.run_prepared(prepared, {n: t.to(self.device) for n, t in tensors.items()} | prepared.constants)
        graph = self.graphs.get(id(prepared))
        if graph is None:
            graph = self._capture(prepared, tensors)
            self.graphs = {k: g for k, g in self.graphs.items() if k in map(id, self.plans.values())}
            self.graphs[id(prepared)] = graph
        for name, tensor in tensors.items():
            graph.inputs[name].copy_(tensor, non_blocking=True)
        graph.graph.replay()
        return {name: tensor.clone() for name, tensor in graph.outputs.items()}

    def _capture(self, prepared: Prepared, tensors: Mapping[str, Tensor]) -> Graph:
        inputs = {name: tensor.to(self.device).clone() for name, tensor in tensors.items()}
        stream: Any = torch.cuda.Stream  # torch's types leave its constructor out
        stream = stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self.run_prepared(prepared, inputs | prepared.constants)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.run_prepared(prepared, inputs | prepared.constants)
        return Graph(graph, inputs, outputs)


def capturable(prepared: Prepared) -> bool:
    """Return whether no step of a plan needs the host: all shapes are planned, and no branch depends on data."""
    hosted = any(s.kind == CONTROL or s.operator in _HOSTED for s in prepared.plan.steps)
    return not hosted and not prepared.plan.unplanned


def open_executor(program: Program, sm: int) -> CudaExecutor:
    """Return the executor of this machine's GPU; configurations are those of the GPU, not of the compiled target."""
    major, minor = torch.cuda.get_device_capability()
    found = 10 * major + minor
    return CudaExecutor(program, "cuda", Launcher(f"sm{max(found, 80) if found else sm}"))
