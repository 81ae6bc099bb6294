"""Whole models through the executor, against the same network in torch: float16, eager and compiled."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from gpu_machines import DryMachine, Machine
from gpu_tables import spread
from torch import Tensor

from qcompiler.backends.triton.stopwatch import SHORT_US

ROUNDS = 5
OPSET = 20


@dataclass(frozen=True)
class Encoder:
    """A transformer encoder: width, heads, layers, and the feed [batch, steps, width]."""

    name: str
    width: int
    heads: int
    layers: int
    batch: int
    steps: int

    def weights(self) -> dict[str, np.ndarray]:
        """Return float32 weights by name, drawn once."""
        random = np.random.default_rng(0)
        shapes = {"q": (self.width,) * 2, "k": (self.width,) * 2, "v": (self.width,) * 2, "o": (self.width,) * 2}
        shapes |= {"up": (self.width, 4 * self.width), "down": (4 * self.width, self.width)}
        found = {}
        for layer in range(self.layers):
            for name, shape in shapes.items():
                drawn = random.standard_normal(shape) / np.sqrt(shape[0])
                found[f"{name}{layer}"] = drawn.astype(np.float32)
        ones = np.ones(self.width, np.float32)
        return found | {"gamma": ones, "beta": 0 * ones}

    def feed(self, seed: int) -> np.ndarray:
        """Return an input."""
        drawn = np.random.default_rng(seed).standard_normal((self.batch, self.steps, self.width))
        return drawn.astype(np.float32)

    def onnx(self) -> Any:
        """Return the model in ONNX."""
        from onnx import TensorProto, helper, numpy_helper

        constants = self.weights()
        split = [self.batch, self.steps, self.heads, self.width // self.heads]
        constants |= {"split": np.array(split), "join": np.array([self.batch, self.steps, self.width])}
        constants["root"] = np.array((self.width // self.heads) ** -0.5, np.float32)
        nodes: list[Any] = []

        def add(operator: str, inputs: list[str], name: str, **attributes: Any) -> str:
            nodes.append(helper.make_node(operator, inputs, [name], name=f"/{name}", **attributes))
            return name

        x = "x"
        for i in range(self.layers):
            h = add("LayerNormalization", [x, "gamma", "beta"], f"n{i}", axis=-1, epsilon=1e-5)
            parts = []
            for part, order in (("q", (0, 2, 1, 3)), ("k", (0, 2, 3, 1)), ("v", (0, 2, 1, 3))):
                made = add("MatMul", [h, f"{part}{i}"], f"{part}m{i}")
                made = add("Reshape", [made, "split"], f"{part}r{i}")
                parts.append(add("Transpose", [made], f"{part}t{i}", perm=order))
            scores = add("Mul", [add("MatMul", parts[:2], f"s{i}"), "root"], f"ss{i}")
            mixed = add("MatMul", [add("Softmax", [scores], f"p{i}", axis=-1), parts[2]], f"c{i}")
            mixed = add("Reshape", [add("Transpose", [mixed], f"ct{i}", perm=(0, 2, 1, 3)), "join"], f"cr{i}")
            x = add("Add", [x, add("MatMul", [mixed, f"o{i}"], f"om{i}")], f"a{i}")
            h = add("LayerNormalization", [x, "gamma", "beta"], f"m{i}", axis=-1, epsilon=1e-5)
            h = add("Gelu", [add("MatMul", [h, f"up{i}"], f"u{i}")], f"g{i}")
            x = add("Add", [x, add("MatMul", [h, f"down{i}"], f"d{i}")], f"b{i}")
        add("Identity", [x], "y")
        shape = [self.batch, self.steps, self.width]
        ports = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name in ("x", "y")]
        weights = [numpy_helper.from_array(array, name) for name, array in constants.items()]
        graph = helper.make_graph(nodes, self.name, *ports, weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)

    def torch(self, device: str, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """Return the same network as a function of torch."""
        w = {name: torch.from_numpy(a).to(device, dtype) for name, a in self.weights().items()}

        def run(x: Tensor) -> Tensor:
            for i in range(self.layers):
                h = F.layer_norm(x, (self.width,), w["gamma"], w["beta"])
                shape = (self.batch, self.steps, self.heads, self.width // self.heads)
                q, k, v = ((h @ w[f"{p}{i}"]).reshape(shape).transpose(1, 2) for p in "qkv")
                mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
                x = x + mixed @ w[f"o{i}"]
                h = F.layer_norm(x, (self.width,), w["gamma"], w["beta"])
                x = x + F.gelu(h @ w[f"up{i}"]) @ w[f"down{i}"]
            return x

        return run


MODELS = (
    Encoder("encoder, width 1024, 4 layers, 16 x 512", 1024, 16, 4, 16, 512),
    Encoder("encoder, width 4096, 2 layers, 4 x 1024", 4096, 32, 2, 4, 1024),
)
TINY = (Encoder("encoder, tiny", 32, 2, 1, 2, 8),)


@dataclass
class ModelResult:
    """Figures of one model: runs by contender in microseconds, SQNR in dB against float32, or an error."""

    name: str
    runs: dict[str, list[float]] = field(default_factory=dict)
    sqnr_db: dict[str, float] = field(default_factory=dict)
    error: str = ""

    def line(self) -> str:
        """Return the result in one line."""
        if self.error:
            return f"{self.name}: FAILED {self.error}"
        medians = {name: float(np.median(runs)) for name, runs in self.runs.items()}
        own = medians["ours"]
        parts = [f"ours {own:.1f} us ({self.sqnr_db['ours']:.1f} dB, spread {spread(self.runs['ours']):.1%})"]
        parts += [f"{other / own:.2f}x {name}" for name, other in medians.items() if name != "ours"]
        return f"{self.name}: {', '.join(parts)}"


def run_models(machine: Machine, budget: float, out: Path, say: Callable[[str], None]) -> list[ModelResult]:
    """Compile, check and time whole models until the budget is spent; write ``gpu-models.json``.

    Args:
        machine: where.
        budget: seconds that are left.
        out: folder of the results.
        say: is told each result in a line.
    """
    end = machine.seconds() + budget
    results = []
    for model in TINY if isinstance(machine, DryMachine) else MODELS:
        if machine.seconds() >= end:
            results.append(ModelResult(model.name, error="not run: out of time"))
        else:
            results.append(_run(machine, model))
        say(results[-1].line())
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu-models.json").write_text(
            json.dumps([asdict(r) for r in results], indent=1) + "\n", encoding="utf-8"
        )
    return results


def _run(machine: Machine, model: Encoder) -> ModelResult:
    result = ModelResult(model.name)
    try:
        with tempfile.TemporaryDirectory(prefix="qcompiler-gpu-") as folder:
            runner = _compiled(machine, model, Path(folder) / "model.qc")
        x = torch.from_numpy(model.feed(99)).to(machine.device)
        half = torch.float16 if machine.device == "cuda" else torch.bfloat16
        eager = model.torch(machine.device, half)
        narrow = x.to(half)
        compiled = machine.compiler(eager)
        with torch.inference_mode():
            expected = model.torch(machine.device, torch.float32)(x).to(torch.float64)
            for name, found in (("ours", runner.run({"x": x})["y"]), ("torch fp16", eager(narrow))):
                result.sqnr_db[name] = _sqnr(found.to(torch.float64), expected)
            contenders = {
                "ours": [lambda: runner.run({"x": x})],
                "torch fp16": [lambda: eager(narrow)],
                "torch.compile fp16": [lambda: compiled(narrow)],
            }
            estimates = {name: machine.warm(launches) for name, launches in contenders.items()}
            for _ in range(ROUNDS):
                for name, launches in contenders.items():
                    # The executor replays a graph of its own: only events may surround it.
                    spent = machine.measure(launches, max(estimates[name], SHORT_US))
                    result.runs.setdefault(name, []).append(spent)
    except Exception as error:  # the executor may fail in any way; the kernels' figures stand
        result.error = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    return result


def _compiled(machine: Machine, model: Encoder, path: Path) -> Any:
    """Compile a model for the GPU's architecture and load it."""
    import qcompiler
    from qcompiler.kernels.config import ARCHS, table_arch

    feeds = [{"x": model.feed(seed)} for seed in range(2)]
    target = f"triton-{table_arch(machine.arch, ARCHS)}"
    made = qcompiler.compile(model.onnx(), target=target, recipe="int8-static", calibration=feeds, guard=False)
    made.save(path)
    return qcompiler.load(path)


def _sqnr(found: Tensor, expected: Tensor) -> float:
    noise = float(((found - expected) ** 2).sum())
    return 10 * float(np.log10(float((expected**2).sum()) / max(noise, 1e-30)))
