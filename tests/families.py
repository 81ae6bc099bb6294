"""The families of small models, their data, and builds of them that tests share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qcompiler
from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.compiled import CompiledModel
from qcompiler.engine import Array, EngineOptions, Feeds
from qcompiler.targets.host import detect, host_target_name
from tests import synthetic
from tests.synthetic import feeds_of

F = np.float32
ENGINE = OrtEngine()


def typed(feeds: list[dict[str, Array]], dtype: type) -> list[dict[str, Array]]:
    return [{n: a.astype(dtype) for n, a in f.items()} for f in feeds]


def integers(dtype: type, count: int = 6) -> list[dict[str, Array]]:
    rng = np.random.default_rng(0)
    middle = 128 if dtype is np.uint8 else 0
    return [{"x": (rng.integers(-60, 60, (2, 8, 8, 8)) + middle).astype(dtype)} for _ in range(count)]


def masked(length: int = 12, count: int = 6) -> list[dict[str, Array]]:
    mask = (np.arange(length) < length - 3).astype(F).reshape(1, 1, 1, length).repeat(2, 0)
    return [{**f, "mask": mask} for f in feeds_of({"x": (2, length, 64)}, count)]


def chosen(count: int = 6) -> list[dict[str, Array]]:
    return [{**f, "loud": np.asarray(i % 2 == 0)} for i, f in enumerate(feeds_of({"x": (5, 2, 64)}, count))]


@dataclass(frozen=True)
class Family:
    """A model, its data, how many groups run on integers by rule, and the least SQNR in dB."""

    model: Callable[[], onnx.ModelProto]
    feeds: Callable[[], list[dict[str, Array]]]
    planned: int
    least_db: float = 30.0


FAMILIES: Mapping[str, Family] = {
    "residual": Family(synthetic.residual_cnn, lambda: feeds_of({"x": (2, 3, 16, 16)}), 6),
    "transformer": Family(synthetic.transformer_block, masked, 6),
    "lstm in an If": Family(synthetic.lstm_in_if, chosen, 2),
    "qdq int8": Family(lambda: synthetic.qdq_cnn(np.int8), lambda: integers(np.int8), 2, 200.0),
    "qdq uint8": Family(lambda: synthetic.qdq_cnn(np.uint8), lambda: integers(np.uint8), 2, 200.0),
    "float16": Family(synthetic.half_mlp, lambda: typed(feeds_of({"x": (4, 64)}), np.float16), 2),
    "bfloat16": Family(synthetic.brain_mlp, lambda: typed(feeds_of({"x": (4, 64)}), ml_dtypes.bfloat16), 2),
    "two outputs": Family(synthetic.two_heads, lambda: feeds_of({"x": (1, 8, 16, 16)}), 3),
    "state": Family(synthetic.recurrent_step, lambda: feeds_of({"x": (1, 64), "h0": (1, 64)}), 3),
}
COVERED = pytest.mark.skipif(host_target_name(detect())[0] != "ort-x86", reason="a figure of processors with VNNI")
EVERY = pytest.mark.parametrize("name", FAMILIES)


@functools.cache
def source(name: str) -> bytes:
    return FAMILIES[name].model().SerializeToString()


@functools.cache
def plain(name: str) -> CompiledModel:
    """Return a build by the recipe's rules, which no test changes."""
    return qcompiler.compile(source(name), calibration=FAMILIES[name].feeds(), guard=False)


def nodes(made: CompiledModel) -> list[ir.Node]:
    return list(made.model.graph.all_nodes())


def run(model: ir.Model | bytes | Path, feed: Feeds, *, optimize: bool = True) -> dict[str, Array]:
    return ENGINE.load(model, EngineOptions(threads=1, optimize=optimize)).run(feed)
