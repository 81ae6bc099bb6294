"""Dumps that the tests of the viewer look at."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from qcompiler.calibration.observe import observe
from qcompiler.ir.importer import import_model
from qcompiler.ir.text import parse_text
from qcompiler.passes.catalog import shipped_passes
from qcompiler.pipeline.instruments.dump import DumpInstrument
from qcompiler.pipeline.instruments.numerics import NumericsInstrument
from qcompiler.pipeline.instruments.timing import TimeInstrument
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.state import CompileState
from qcompiler.targets.target import load_target
from tests.loops import parse
from tests.pipeline.sample_passes import REGISTRY, TARGET, chain_feeds, chain_state, engine
from tests.synthetic import normal

QUANTIZED = "canonicalize,plan-quantization,insert-qdq,fuse-qdq,lower-onnxruntime"

WIDTH = 64


def chain_dump(folder: Path, models: bool = True) -> Path:
    """Write a dump of small passes, with times and figures; the times are always the same."""
    ticks = iter(range(1000))
    times = TimeInstrument(lambda: next(ticks) / 1000)
    numerics = NumericsInstrument(engine(), chain_feeds(), strict=False)
    dump = DumpInstrument(folder, times, numerics, models)
    text = "drop-identity,many,scale-factors{factor=1.5,only=e},plan-nothing"
    Pipeline.parse(text, REGISTRY).run(chain_state(), (dump, numerics, times))
    return folder


def quantized_dump(folder: Path, numerics: bool = True) -> Path:
    """Write a dump of a two-layer network on its way to int8, calibrated, with figures."""
    state = quantized_state()
    random = np.random.default_rng(1)
    feeds = [{"x": random.normal(size=(8, WIDTH)).astype(np.float32)} for _ in range(4)]
    state.statistics = observe(state.model, ["x", "a", "b", "y"], feeds, engine(), threads=1)
    measure = NumericsInstrument(engine(), feeds, strict=False)
    dump = DumpInstrument(folder, numerics=measure if numerics else None)
    Pipeline.parse(QUANTIZED, shipped_passes()).run(state, (dump, measure) if numerics else (dump,))
    return folder


def quantized_state() -> CompileState:
    """Return a network of two layers, ``up`` and ``down``, both to be computed on integers."""
    nodes = "{ [up] a = MatMul (x, w) [act] b = Relu (a) [down] y = MatMul (b, v) }"
    text = f"(float[N,{WIDTH}] x) => (float[N,8] y) {nodes}"
    constants = {"w": normal(1, WIDTH, WIDTH, fan=WIDTH), "v": normal(2, WIDTH, 8, fan=WIDTH)}
    state = CompileState(import_model(parse(text, constants)), load_target("ort-x86"))
    state.forms = {"up": "static-float", "down": "static-float"}
    return state


def large_dump(folder: Path, nodes: int) -> Path:
    """Write a dump of a seeded random network of many nodes."""
    source = random.Random(0)
    lines, names = [], ["x"]
    for index in range(nodes - 1):
        near = names[-1 if source.random() < 0.7 else -source.randrange(1, min(12, len(names)) + 1)]
        far = names[-source.randrange(1, min(40, len(names)) + 1)]
        call = source.choice([f"MatMul ({near}, w)", f"Add ({near}, {far})", f"Relu ({near})", f"Mul ({near}, one)"])
        lines.append(f"v{index} = {call}")
        names.append(f"v{index}")
    lines.append(f"y = Relu ({names[-1]})")
    head = '<ir_version: 10, opset_import: ["" : 21]> large (float[N,2] x) => (float[N,2] y)'
    text = f"{head} <float[2,2] w = {{1, 0, 0, 1}}, float one = {{1.0}}> {{" + "\n".join(lines) + "}"
    state = CompileState(parse_text(text), TARGET)
    Pipeline.parse("drop-identity,scale-factors{factor=1.5}", REGISTRY).run(state, (DumpInstrument(folder),))
    return folder
