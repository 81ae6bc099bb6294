"""Our legality against parser and builder of TensorRT for RTX, which need no GPU: never laxer, stricter by a row."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from qcompiler.targets.legality import load_legality
from tests.backends.quantized_graphs import FORMS, Spec, build, specs
from tests.targets.legality_cases import TENSORRT, serialized

if importlib.util.find_spec("tensorrt_rtx") is None:
    pytest.skip("tensorrt_rtx is not installed (pip install 'qcompiler[trt-rtx]')", allow_module_level=True)

COUNT = 300
SMS = (80, 89, 120)
RTX = "tensorrt-rtx"
LEGALITY = load_legality("tensorrt")
WORKER = Path(__file__).with_name("rtx_worker.py")
CRASH = "the library ended the process"


@dataclass(frozen=True)
class Probe:
    """What library and legality say of one graph on one compute capability."""

    label: str
    sm: int
    refusal: str
    errors: frozenset[str]
    losses: frozenset[str]

    @property
    def accepted(self) -> bool:
        """Return whether it was parsed and built."""
        return not self.refusal


def refusals(models: Sequence[bytes], sms: Sequence[int], folder: Path) -> list[str]:
    """Return the library's reason to refuse each model, empty where it builds; a crash is a reason, too."""
    for index, model in enumerate(models):
        (folder / f"{index:03d}.onnx").write_bytes(model)
    (folder / "sms.json").write_text(json.dumps([[sm] for sm in sms]))
    found: list[str] = []
    while len(found) < len(models):
        command = [sys.executable, str(WORKER), str(folder), str(len(found))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"index"')]
        for row in rows:
            found.append(row["error"] if not row["parsed"] else row["built"][str(sms[row["index"]])])
        if done.returncode:
            assert done.returncode < 0, done.stderr  # a signal: anything else is a fault of the worker
            found.append(CRASH)
    return found


def probe(graphs: dict[str, tuple[bytes, int]], folder: Path) -> dict[str, Probe]:
    models, sms = [m for m, _ in graphs.values()], [sm for _, sm in graphs.values()]
    found = {}
    for (label, (model, sm)), refusal in zip(graphs.items(), refusals(models, sms, folder), strict=True):
        own = LEGALITY.check(ir.serde.deserialize_model(onnx.load_model_from_string(model)), sm, flavour=RTX)
        by = {s: frozenset(d.code for d in own if d.severity == s) for s in ("error", "loss")}
        found[label] = Probe(label, sm, refusal, by["error"], by["loss"])
    return found


@pytest.fixture(scope="module")
def generated() -> dict[Spec, int]:
    return {spec: SMS[index % len(SMS)] for index, spec in enumerate(specs(COUNT))}


@pytest.fixture(scope="module")
def probes(generated: dict[Spec, int], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Probe]:
    return probe({str(s): (build(s), sm) for s, sm in generated.items()}, tmp_path_factory.mktemp("generated"))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Probe]:
    graphs = {}
    for code, case in TENSORRT.items():
        if case.flavour in ("", RTX):
            graphs[f"{code} bad"] = (serialized(case.bad), min(case.sm, 120))
            graphs[f"{code} good"] = (serialized(case.good), min(case.sm, 120))
    return probe(graphs, tmp_path_factory.mktemp("cases"))


def test_the_graphs_are_many_and_various(generated: dict[Spec, int], probes: dict[str, Probe]) -> None:
    assert len(probes) == COUNT >= 200
    assert {s.form for s in generated} == set(FORMS)
    assert {s.place for s in generated} == {"main", "branch", "function"}
    refused = [p for p in probes.values() if not p.accepted]
    assert len(refused) > COUNT // 4
    assert sum(p.accepted and not p.errors for p in probes.values()) > COUNT // 4
    assert len({code for p in probes.values() for code in p.errors}) > 20


def test_never_laxer_than_parser_and_builder(probes: dict[str, Probe]) -> None:
    assert [p for p in probes.values() if not p.accepted and not p.errors] == []


def test_what_is_stricter_is_explained_by_a_row(probes: dict[str, Probe]) -> None:
    stricter = {row.code for row in LEGALITY.rows if row.stricter}
    found = [p for p in probes.values() if p.accepted and p.errors]
    assert found
    assert [p for p in found if not p.errors & stricter] == []


def test_what_is_imported_with_other_numbers_is_an_error(generated: dict[Spec, int], probes: dict[str, Probe]) -> None:
    accepted = 0
    for spec in generated:
        mine = probes[str(spec)]
        operands = (spec.x,) if spec.form == "pair" else (spec.w,) if spec.form == "gather" else (spec.x, spec.w)
        for quant in operands:
            trap = (
                quant.stored == "uint8" or quant.zero == "nonzero" or (quant.zero == "missing" and quant.form == "qdq")
            )
            if trap and quant.form != "float":
                used = spec.form not in ("add", "concat", "matmul-acts") or quant.form != "dq"
                assert mine.errors or not used, mine
                accepted += mine.accepted and used
    assert accepted > 5


@pytest.mark.parametrize("code", [c for c, case in TENSORRT.items() if case.flavour in ("", RTX)])
def test_a_row_agrees_with_the_library(code: str, cases: dict[str, Probe]) -> None:
    row, bad, good = LEGALITY.row(code), cases[f"{code} bad"], cases[f"{code} good"]
    assert good.accepted, good
    if row.severity == "loss":
        assert bad.accepted, bad
    elif not row.stricter:
        assert not bad.accepted
