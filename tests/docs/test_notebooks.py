"""The notebooks of ``examples/`` run, and their figures hold."""

from __future__ import annotations

import json
from typing import Any

import pytest

from docs.generator.notebooks import EXAMPLES, NOTEBOOKS, execute, figures


def run(name: str) -> dict[str, Any]:
    pytest.importorskip("nbclient", reason="needs nbclient and ipykernel: pip install 'qcompiler[notebook]'")
    pytest.importorskip("ipykernel", reason="needs nbclient and ipykernel: pip install 'qcompiler[notebook]'")
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'qcompiler[plot]'")
    return figures(execute(name))


@pytest.mark.filterwarnings("ignore")  # of the notebook client's own libraries
def test_compile_and_prove() -> None:
    found = run(NOTEBOOKS[0])
    assert found["planned"] == found["fused"] > 0
    assert found["sqnr_db"] >= 18
    assert found["sqnr_of_50"] >= 50
    assert found["before"] == pytest.approx(0.9696, abs=1e-3)
    assert found["after"] >= found["before"] - 0.01
    assert found["size"] < 0.3


@pytest.mark.filterwarnings("ignore")
def test_why_is_it_not_faster() -> None:
    found = run(NOTEBOOKS[1])
    assert found["top1"]["given"] < found["top1"]["float"] - 0.05
    assert found["top1"]["mended"] >= found["top1"]["float"] - 0.01
    assert "block2.bn1.BatchNormalization" in found["first"]
    assert "too-wide" in found["first"]
    assert found["signed"] >= 0  # how many depends on the processor's kernels


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_committed_and_small(name: str) -> None:
    path = EXAMPLES / name
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert path.stat().st_size < 200_000
    code = [c for c in cells if c["cell_type"] == "code"]
    assert all(c["execution_count"] for c in code)
    assert not [o for c in code for o in c["outputs"] if o["output_type"] == "error"]
    assert any("image/png" in o.get("data", {}) for c in code for o in c["outputs"])
