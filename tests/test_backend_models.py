"""The models shipped with onnx's backend tests, compiled: what the engine loads compiles, runs and keeps its contracts.

Whether they import and mean the same is the subject of ``ir/test_backend_models.py``.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests

import qcompiler
from qcompiler.backends.backend import OrtBackend
from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.calibration.observe import observe
from qcompiler.calibration.readers import random_feeds
from qcompiler.engine import Array, EngineOptions
from qcompiler.errors import CalibrationError, ModelError
from qcompiler.ir.importer import import_model
from qcompiler.ir.phase import Phase
from qcompiler.observed import wanted_values
from qcompiler.passes.front import front_passes
from qcompiler.pipeline.instruments.numerics import NumericsInstrument
from qcompiler.pipeline.instruments.verify import VerifyInstrument
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.plan import Form
from qcompiler.targets.placement import Policy, propose
from qcompiler.targets.target import Target, load_target
from qcompiler.workshop import Workshop
from tests.property.examine import Snapshots, check_groups, check_weights

DATA = Path(onnx.__file__).parent / "backend/test/data"
ENGINE = OrtEngine()
AS_WRITTEN = EngineOptions(optimize=False)
WHOLE = os.environ.get("QCOMPILER_BACKEND_MODELS") == "all"
"""Set to try every model; the default run takes the small ones and a sample of the rest."""
NODE_STRIDE = 1 if WHOLE else 11
LIGHT = "*" if WHOLE else "light_s[hq]*"
QUANTIZED = {"pytorch-converted": 20, "pytorch-operator": 1, "light": 2}
"""How many models of a kind have something to quantize at least; the others hold single operators without weights."""
ANY_NUMBERS = ("bernoulli", "dropout", "multinomial", "random")
"""Operators whose results differ from run to run."""


@dataclass(frozen=True)
class Case:
    name: str
    model: onnx.ModelProto
    inputs: list[Any] | None = None


def node_cases() -> Iterator[Case]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's case generators divide by zero on purpose
        found = sorted(load_model_tests(kind="node"), key=lambda c: c.name)
    for case in found[::NODE_STRIDE]:
        yield Case(case.name, case.model, list(case.data_sets[0][0]) if case.data_sets else None)


def file_cases(kind: str) -> Iterator[Case]:
    for case in sorted(load_model_tests(kind=kind), key=lambda c: c.name):
        folder = Path(case.model_dir)
        files = sorted((folder / "test_data_set_0").glob("input_*.pb"), key=lambda p: int(p.stem[6:]))
        try:
            inputs = [numpy_helper.to_array(onnx.load_tensor(str(f))) for f in files]
        except Exception:  # a sequence
            inputs = None
        yield Case(case.name, onnx.load(folder / "model.onnx"), inputs)


def light_cases() -> Iterator[Case]:
    for path in sorted((DATA / "light").glob(f"{LIGHT}.onnx")):
        yield Case(path.stem, onnx.load(path))


def given_feed(case: Case, names: list[str]) -> dict[str, Array] | None:
    """Return the case's own inputs as a feed, if they are arrays throughout."""
    if case.inputs is None or any(not isinstance(a, np.ndarray | np.generic) for a in case.inputs):
        return None
    by_name = {v.name: np.asarray(a) for v, a in zip(case.model.graph.input, case.inputs, strict=False)}
    return {n: by_name[n] for n in names} if all(n in by_name for n in names) else None


def examine(case: Case, recipe: str) -> str:
    """Return ``quantized`` or ``float only``, ``skipped: why``, or what is wrong."""
    try:
        before = ENGINE.load(case.model.SerializeToString(), AS_WRITTEN)
    except ModelError:
        return "skipped: the engine does not load the model itself"
    names = [i.name for i in before.inputs]
    own = given_feed(case, names)
    try:
        feed = own if own is not None else random_feeds(before.inputs, 1, seed=1)[0]
        expected = before.run(feed)
    except CalibrationError:
        return "skipped: no feed that the engine runs the model on"
    try:
        random = {"calibration": [feed]} if own is not None else {"random_calibration": 2}
        made = qcompiler.compile(case.model, recipe=recipe, guard=False, **random)
    except CalibrationError as error:
        return "skipped: NaN or infinity in the data" if "holds" in str(error) else f"refused: {error}"
    after = ENGINE.load(made.to_bytes())
    wrong = differs(case, expected, after.run(feed), any(g.form != "float" for g in made.report.groups))
    if wrong:
        return wrong
    if all(g.form == "float" for g in made.report.groups):
        return "float only"
    hold_contracts(case, feed)
    return "quantized"


def differs(case: Case, expected: dict[str, Any], found: dict[str, Any], quantized: bool) -> str:
    """Return how the outputs differ in type or shape, or, of a model left in float, in value."""
    for name, wanted in expected.items():
        actual = found[name]
        if not isinstance(wanted, np.ndarray):
            continue
        if wanted.dtype != actual.dtype or wanted.shape != actual.shape:
            return f"{name} was {wanted.dtype} {wanted.shape}, is {actual.dtype} {actual.shape}"
        if quantized or any(word in case.name for word in ANY_NUMBERS) or wanted.dtype.kind not in "fiub":
            continue
        a, b = np.atleast_1d(wanted).astype(np.float64), np.atleast_1d(actual).astype(np.float64)
        # Float16 has 11 bits, of which reordered sums lose two or three; integers are compared as they are.
        loose = 0.0 if wanted.dtype.kind in "iub" else 8 * float(np.finfo(wanted.dtype).eps) + 1e-5
        scale = float(np.abs(a[np.isfinite(a)]).max(initial=0.0))
        if not np.allclose(a, b, rtol=0, atol=loose * scale, equal_nan=True):
            return f"{name} differs although nothing is quantized"
    return ""


def hold_contracts(case: Case, feed: dict[str, Array]) -> None:
    """Run the passes one by one, each held to its numeric contract: QDQ against FUSED and LOWERED above all."""
    state = CompileState(import_model(case.model), load_target("ort-x86"))
    Pipeline(front_passes()).run(state, [VerifyInstrument()])
    workshop = Workshop(state, OrtBackend())
    state.statistics = observe(
        state.model, list(dict.fromkeys(wanted_values(state.model, workshop.groups))), [feed], ENGINE
    )
    numerics = NumericsInstrument(ENGINE, [feed])
    workshop.build(propose(workshop.groups, Policy("static", "static", "float")), None, [numerics, VerifyInstrument()])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recipe", ["int8", "int8-static"])
@pytest.mark.parametrize("kind", ["simple", "pytorch-operator", "pytorch-converted", "node", "light"])
def test_backend_models_compile(kind: str, recipe: str) -> None:
    sources = {"node": node_cases, "light": light_cases}
    cases = list(sources[kind]() if kind in sources else file_cases(kind))
    results = {case.name: examine(case, recipe) for case in cases}
    counts = Counter(r if r.startswith(("quantized", "float only", "skipped")) else "wrong" for r in results.values())
    if WHOLE:
        print(kind, recipe, len(cases), dict(counts))
    assert not {
        n: r for n, r in results.items() if r not in ("quantized", "float only") and not r.startswith("skipped")
    }
    assert counts["quantized"] + counts["float only"] >= 0.6 * len(cases)
    assert counts["quantized"] >= QUANTIZED.get(kind, 0)


def with_constants(case: Case) -> tuple[onnx.ModelProto, dict[str, Array]] | None:
    """Return the model with all inputs but the first float one made constants, and a feed for what is left."""
    if case.inputs is None or any(not isinstance(a, np.ndarray | np.generic) for a in case.inputs):
        return None
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    known = {i.name for i in model.graph.initializer}
    given = [v for v in model.graph.input if v.name not in known]
    arrays = {v.name: np.asarray(a) for v, a in zip(given, case.inputs, strict=False)}
    data = next((v.name for v in given if arrays.get(v.name, np.zeros(0)).dtype == np.float32), None)
    if data is None or any(v.name not in arrays or arrays[v.name].dtype.kind in "OSU" for v in given):
        return None
    kept = [v for v in model.graph.input if v.name == data]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items() if n != data)
    return model, {data: arrays[data]}


def force(case: Case, target: Target, form: Form) -> str:
    """Compile with every operator in a form that the target's table offers it; return what came of it."""
    made = with_constants(case)
    if made is None:
        return "skipped"
    model, feed = made
    try:
        ENGINE.load(model.SerializeToString(), AS_WRITTEN).run(feed)
        state = CompileState(import_model(model), target)
        Pipeline(front_passes()).run(state, [VerifyInstrument()])
        workshop = Workshop(state, OrtBackend())
        names = list(dict.fromkeys(wanted_values(state.model, workshop.groups)))
        state.statistics = observe(state.model, names, [feed], ENGINE)
    except (ModelError, CalibrationError):
        return "skipped"
    forms: dict[str, Form] = {g.name: form if form in g.legal else "float" for g in workshop.groups}
    if all(f == "float" for f in forms.values()):
        return "float only"
    workshop.learn_emission(forms)
    snapshots = Snapshots()
    build = workshop.build(forms, instruments=[VerifyInstrument(), snapshots])
    check_groups(snapshots.models[Phase.QDQ], build, [feed])
    check_weights(build)
    return "quantized"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["static", "static-float", "dynamic"])
def test_every_operator_on_integers(form: Form) -> None:
    table = load_target("ort-x86")
    target = replace(table, rows=tuple(replace(row, min_reduce=0) for row in table.rows))
    cases = [*node_cases(), *file_cases("pytorch-converted"), *file_cases("pytorch-operator")]
    counts = Counter(force(case, target, form) for case in cases)
    if WHOLE:
        print("all", form, len(cases), dict(counts))
    assert counts["quantized"] >= {"static": 40, "static-float": 2, "dynamic": 2}[form]
