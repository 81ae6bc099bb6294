"""The examples of docs/ecosystem.md run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import qcompiler
from qcompiler.errors import ModelError

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "ecosystem.md"
NEEDS = {
    "torch": ("torch", "onnxscript"),
    "onnx_graphsurgeon": ("onnx_graphsurgeon",),
    "olive": ("olive",),
    "optimum": ("optimum.onnxruntime", "datasets"),
}
"""Packages of an example, by the one that its imports name."""
WRITES = {
    "torch.onnx in memory": ("conv.onnx", "module.onnx"),
    "onnx-graphsurgeon": ("edited.onnx",),
    "Microsoft Olive": ("olive-out/model.onnx", "olive-out/model.decisions.json", "olive-out/model.report.json"),
    "Hugging Face Optimum": ("quantized/model_quantized.onnx", "quantized/config.json", "quantized/ort_config.json"),
}


@pytest.mark.filterwarnings("ignore")  # the other packages' own
@pytest.mark.parametrize("title", WRITES)
def test_a_section_s_examples_run(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (section,) = [s for s in PAGE.read_text(encoding="utf-8").split("\n## ") if s.startswith(title + "\n")]
    blocks = re.findall(r"```python\n(.*?)```", section, re.S)
    assert blocks
    for package, needed in NEEDS.items():
        if re.search(rf"^(import|from) {package}\b", section, re.M):
            for name in needed:
                pytest.importorskip(name, reason=f"{name} is not installed")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), {"__name__": "example"})
    assert [f for f in WRITES[title] if not (tmp_path / f).stat().st_size] == []


def test_no_door_is_opened_before_it_is_asked_for(tmp_path: Path) -> None:
    packages = ["torch", "onnx_graphsurgeon", "olive", "optimum", "datasets", "transformers", "onnxscript"]
    code = f"import sys, qcompiler, qcompiler.api, qcompiler.cli\nprint(sorted(set({packages}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "[]\n"


def test_an_absent_graphsurgeon_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx_graphsurgeon", None)
    with pytest.raises(ModelError, match=r'needs onnx-graphsurgeon: pip install "qcompiler\[graphsurgeon\]"'):
        qcompiler.to_graphsurgeon(ROOT / "examples" / "models" / "digits_resnet.onnx")
