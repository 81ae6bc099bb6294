"""Whole small models on the real kernels, interpreted, against the references: in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.triton import models

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "triton")), reason="needs torch and triton"
)
SCRIPT = """
import sys
import numpy as np
from qcompiler.backends.triton.engine import TritonEngine
feed = dict(np.load(sys.argv[2]))
a = TritonEngine("cpu").load(sys.argv[1]).run(feed)["y"]
b = TritonEngine("interpreter").load(sys.argv[1]).run(feed)["y"]
print(float(np.abs(a - b).max() / np.ptp(a)))
"""


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("cnn", "int8-static"),
        ("silu", "int8-static"),
        ("mlp", "int8-static"),
        ("mlp", "int8-dynamic"),
        ("mlp", "int4-weights"),
    ],
)
def test_kernels_give_what_references_give(name: str, recipe: str, tmp_path: Path) -> None:
    import numpy as np

    data = models.feeds(3, 2, 5, 32) if name == "mlp" else models.feeds(3, 2, 3, 16, 16)
    model = {"cnn": models.residual_cnn, "silu": models.silu_cnn, "mlp": models.mlp_block}[name]()
    models.compiled(model, data, recipe).save(tmp_path / "m.qc")
    np.savez(tmp_path / "feed.npz", **data[0])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "m.qc"), str(tmp_path / "feed.npz")],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2 / 255
