"""Run on a GPU: one CUDA graph per plan, replayed without any work of the host in between.

Not run yet on a GPU: the same steps and plans run on the CPU, as references and interpreted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompiler.backends.triton.executor import Executor, Prepared
from qcompiler.backends.triton.launcher import Launcher
from qcompiler.backends.triton.program import CONTROL, Program
from qcompiler.backends.triton.tensors import to_torch

_HOSTED = frozenset({"NonZero", "Compress"})
"""Operators whose results have shapes that the host must read: plans with them are not captured."""
_WARM_UPS = 3
"""Runs before a capture: kernels compile, libraries choose and allocate, contents of constants come to the host."""


@dataclass
class Graph:
    """A captured plan: a graph with the tensors that it reads and writes, always the same."""

    graph: Any
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


@dataclass
class CudaExecutor(Executor):
    """An executor that captures each plan once; the graph goes with its plan.

    One run at a time: all plans share the memory that graphs allocate, which is right since no graph reads what another
    one left there, and results are copied before the next replay.

    Attributes:
        pool: memory that the graphs share.
    """

    pool: Any = None

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run once; inputs are copied to where the graph reads them, results out of where it writes them."""
        tensors = {name: to_torch(array) for name, array in feeds.items()}
        prepared = self.prepare({name: tuple(t.shape) for name, t in tensors.items()})
        if prepared.graph is None and not prepared.eager:
            self._capture(prepared, tensors)
        graph = prepared.graph
        if graph is None:
            return self.run_prepared(prepared, {n: t.to(self.device) for n, t in tensors.items()} | prepared.constants)
        for name, tensor in tensors.items():
            graph.inputs[name].copy_(tensor)
        graph.graph.replay()
        return {name: tensor.clone() for name, tensor in graph.outputs.items()}

    def _capture(self, prepared: Prepared, tensors: Mapping[str, Tensor]) -> None:
        """Warm up and capture, as torch's notes on CUDA graphs say; a plan that cannot be captured runs step by step.

        Warming up on a stream of its own keeps what libraries allocate there apart from the graph's memory.
        """
        if not capturable(prepared):
            prepared.eager = True
            return
        inputs = {name: tensor.to(self.device).clone() for name, tensor in tensors.items()}
        make: Any = torch.cuda.Stream  # torch's types leave its constructor out
        side = make()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self.run_prepared(prepared, inputs | prepared.constants)
        torch.cuda.current_stream().wait_stream(side)
        if any(memo.waits for memo in prepared.memos.values()):
            prepared.eager = True
            return
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                outputs = self.run_prepared(prepared, inputs | prepared.constants)
        except RuntimeError:  # a library waits for the device: nothing was run, and the capture is over
            prepared.eager = True
            return
        prepared.graph = Graph(graph, inputs, outputs)


def capturable(prepared: Prepared) -> bool:
    """Return whether no step of a plan needs the host: all shapes are planned, and no branch depends on data."""
    hosted = any(s.kind == CONTROL or s.operator in _HOSTED for s in prepared.plan.steps)
    return not hosted and not prepared.plan.unplanned


def open_executor(program: Program, sm: int) -> CudaExecutor:
    """Return the executor of this machine's GPU; configurations are those of the GPU, not of the compiled target."""
    major, minor = torch.cuda.get_device_capability()
    found = 10 * major + minor
    return CudaExecutor(program, "cuda", Launcher(f"sm{max(found, 80) if found else sm}"))
