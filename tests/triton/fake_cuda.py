"""CUDA streams and graphs without a GPU: a capture records what torch computes, a replay computes it again.

What waits for the device (``tolist``, ``item``, memory of NumPy) is refused during a capture, as CUDA does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class _Recorder(TorchDispatchMode):
    def __init__(self, log: list[Any]) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.log.append((func, args, kwargs or {}, made))
        return made


class FakeGraph:
    def __init__(self) -> None:
        self.log: list[Any] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, made in self.log:
            again = func(*args, **kwargs)
            for old, new in zip(tree_flatten(made)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class FakeStream:
    def __init__(self, events: list[str], name: str) -> None:
        self.events, self.name = events, name

    def wait_stream(self, other: FakeStream) -> None:
        self.events.append(f"{self.name} waits for {other.name}")


class FakeCuda:
    """What happened.

    Attributes:
        events: in order.
        graphs: every capture that was begun.
        refuse: whether the next capture fails.
    """

    def __init__(self) -> None:
        self.events: list[str] = []
        self.graphs: list[FakeGraph] = []
        self.main = FakeStream(self.events, "main")
        self.refuse = False

    def new_stream(self) -> FakeStream:
        return FakeStream(self.events, "side")

    def new_graph(self) -> FakeGraph:
        self.graphs.append(FakeGraph())
        return self.graphs[-1]

    def pool(self) -> str:
        self.events.append("pool")
        return "pool"

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        self.events.append(f"on {stream.name}")
        yield
        self.events.append(f"off {stream.name}")

    @contextmanager
    def capture(self, graph: FakeGraph, pool: str) -> Iterator[None]:
        self.events.append(f"capture in {pool}")
        if self.refuse:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        with pytest.MonkeyPatch.context() as patch, _Recorder(graph.log):
            for owner, name in ((Tensor, "tolist"), (Tensor, "item"), (torch, "from_numpy")):
                patch.setattr(owner, name, _refused)
            yield


def _refused(*args: Any) -> Any:
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "Stream", fake.new_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: fake.main)
    monkeypatch.setattr(torch.cuda, "stream", fake.on)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", fake.new_graph)
    monkeypatch.setattr(torch.cuda, "graph", fake.capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", fake.pool)
    return fake
