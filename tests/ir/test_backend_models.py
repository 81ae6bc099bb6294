"""The models shipped with onnx's backend tests: each imports and means the same, or is refused with a known reason."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests
from onnx.reference import ReferenceEvaluator

from qcompiler.errors import ModelError
from qcompiler.ir.importer import import_model
from qcompiler.ir.phase import Phase
from qcompiler.ir.serialize import to_bytes
from qcompiler.ir.text import print_model
from qcompiler.ir.verify import verify

KINDS = ("simple", "pytorch-operator", "pytorch-converted")
LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"
NODE_STRIDE = 6
REFUSED = "unknown operator domain 'ai.onnx.preview"
RANDOM = ("random", "bernoulli", "dropout", "multinomial")


@dataclass(frozen=True)
class Case:
    name: str
    model: onnx.ModelProto
    inputs: list[Any] | None


def node_cases() -> list[Case]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's case generators divide by zero on purpose
        cases = sorted(load_model_tests(kind="node"), key=lambda c: c.name)
    return [Case(c.name, c.model, list(c.data_sets[0][0]) if c.data_sets else None) for c in cases[::NODE_STRIDE]]


def file_cases() -> list[Case]:
    cases = []
    for kind in KINDS:
        for case in sorted(load_model_tests(kind=kind), key=lambda c: c.name):
            folder = Path(case.model_dir)
            files = sorted((folder / "test_data_set_0").glob("input_*.pb"), key=lambda p: int(p.stem[6:]))
            try:
                inputs = [numpy_helper.to_array(onnx.load_tensor(str(f))) for f in files]
            except Exception:  # a sequence
                inputs = None
            cases.append(Case(f"{kind}/{case.name}", onnx.load(folder / "model.onnx"), inputs))
    return cases


def onnxruntime_outputs(model: bytes, feeds: dict[str, Any]) -> list[Any]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(model, options).run(None, feeds)


def reference_outputs(model: bytes, feeds: dict[str, Any]) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ReferenceEvaluator(onnx.load_model_from_string(model)).run(None, feeds)


def same(first: Any, second: Any) -> bool:
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if first is None or second is None:
        return first is second
    a, b = np.asarray(first), np.asarray(second)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.kind in "OSU":
        return bool((a == b).all())
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    a, b = a.astype(wide), b.astype(wide)
    finite = np.abs(a[np.isfinite(a)])
    # Float32 sums in another order: some units in the last place of the largest value.
    return bool(np.allclose(a, b, rtol=0, atol=1e-5 * float(finite.max(initial=1e-5)), equal_nan=True))


def examine(case: Case) -> str:
    """Return ``refused``, ``equal``, ``runs nowhere`` or what is wrong."""
    before = case.model.SerializeToString(deterministic=True)
    try:
        model = import_model(case.model)
    except ModelError as error:
        return "refused" if REFUSED in str(error) else f"refused for a new reason: {error}"
    if case.model.SerializeToString(deterministic=True) != before:
        return "the given model was changed"
    verify(model, Phase.FLOAT)
    print_model(model)
    data = to_bytes(model)
    onnx.checker.check_model(data)
    if to_bytes(import_model(data)) != data:
        return "a second import changes the model"
    if case.inputs is None:
        return "runs nowhere"
    feeds = {v.name: array for v, array in zip(case.model.graph.input, case.inputs, strict=False)}
    for run in (onnxruntime_outputs, reference_outputs):
        try:
            expected = run(before, feeds)
        except Exception:
            continue
        found = run(data, feeds)
        if any(word in case.name for word in RANDOM) or same(expected, found):
            return "equal"
        return f"differs under {run.__name__}"
    return "runs nowhere"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", [node_cases, file_cases], ids=lambda f: f.__name__)
def test_backend_models(source: Any) -> None:
    cases = source()
    results = {case.name: examine(case) for case in cases}
    wrong = {name: r for name, r in results.items() if r not in ("equal", "refused", "runs nowhere")}
    assert not wrong
    counts = Counter(results.values())
    assert counts["equal"] >= 0.85 * len(cases)
    assert counts["refused"] <= 0.03 * len(cases)


@pytest.mark.parametrize("path", sorted(LIGHT.glob("*.onnx")), ids=lambda p: p.stem)
def test_light_models_import(path: Path) -> None:
    model = import_model(path)
    verify(model, Phase.FLOAT)
    onnx.checker.check_model(to_bytes(model))
    assert model.opset_imports[""] == 21
    assert all(v.shape is not None and v.shape.is_static() for v in model.graph.outputs)
    assert len(model.graph) == len([n for n in onnx.load(path).graph.node if n.op_type != "Constant"])
