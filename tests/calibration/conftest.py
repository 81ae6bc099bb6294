from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
import pytest

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.engine import Array, EngineOptions, EngineValue, Feeds, ModelLike, Runner, TensorInfo


class CountedValue:
    """A value that its engine knows of while it is alive."""

    def __init__(self, value: EngineValue, engine: CountingEngine) -> None:
        self.value, self.engine = value, engine
        engine.alive += 1
        engine.most_alive = max(engine.most_alive, engine.alive)

    def __del__(self) -> None:
        self.engine.alive -= 1

    @property
    def type(self) -> ir.TypeProtocol:
        return self.value.type

    def array(self) -> Array:
        return self.value.array()


@dataclass(frozen=True)
class CountedRunner:
    """A model that tells its engine what it runs."""

    runner: Runner
    engine: CountingEngine
    nodes: tuple[str, ...]

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        return self.runner.inputs

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        return self.runner.outputs

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, Array]:
        self.engine.ran += self.nodes
        return self.runner.run(feeds, outputs)

    def run_values(self, values: Mapping[str, EngineValue], outputs: Sequence[str]) -> dict[str, EngineValue]:
        self.engine.ran += self.nodes
        plain = {name: value.value for name, value in values.items() if isinstance(value, CountedValue)}
        made = self.runner.run_values(plain, outputs)
        return {name: CountedValue(value, self.engine) for name, value in made.items()}


@dataclass
class CountingEngine(OrtEngine):
    """ONNX Runtime, with a record of what was asked of it; for one thread.

    Attributes:
        loads: options of every load.
        ran: names of the nodes of every model that ran, once per run.
        alive: values that exist now.
        most_alive: the most that existed at a time.
    """

    loads: list[EngineOptions] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)
    alive: int = 0
    most_alive: int = 0

    def load(self, model: ModelLike, options: EngineOptions = EngineOptions()) -> CountedRunner:  # type: ignore[override]
        assert isinstance(model, ir.Model)
        self.loads.append(options)
        names = tuple(str(node.name) for node in model.graph.all_nodes())
        return CountedRunner(super().load(model, options), self, names)

    def value(self, array: Array) -> CountedValue:
        return CountedValue(super().value(array), self)


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine()
