from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qcompiler.engine import Array, EngineOptions, Feeds, ModelLike, Profile, TensorInfo

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(bool)": np.bool_}

_DEFAULT = EngineOptions()


class SmallRunner:
    """A model in ONNX Runtime that keeps what was asked of it."""

    def __init__(self, model: ir.Model, options: EngineOptions) -> None:
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = options.threads
        settings.log_severity_level = 4
        if not options.optimize:
            settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        data = ir.to_proto(model).SerializeToString()
        self._session = ort.InferenceSession(data, settings, providers=["CPUExecutionProvider"])

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        given = self._session.get_inputs()
        return tuple(TensorInfo(i.name, np.dtype(_DTYPES[i.type]), tuple(i.shape)) for i in given)

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        return ()

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, Array]:
        names = list(outputs or ())
        return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))


class SmallEngine:
    """As much of an engine as observation needs; remembers the options of every load."""

    name = "small"

    def __init__(self) -> None:
        self.loads: list[EngineOptions] = []

    @property
    def version(self) -> str:
        return "1"

    def load(self, model: ModelLike, options: EngineOptions = _DEFAULT) -> SmallRunner:
        assert isinstance(model, ir.Model)
        self.loads.append(options)
        return SmallRunner(model, options)

    def profile(self, model: ModelLike, feeds: Feeds, options: EngineOptions, rounds: int) -> Profile:
        raise NotImplementedError

    def optimized_graph(self, model: ModelLike, options: EngineOptions) -> ir.Model:
        raise NotImplementedError


@pytest.fixture
def engine() -> SmallEngine:
    return SmallEngine()
