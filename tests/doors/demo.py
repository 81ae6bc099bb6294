"""What the tests of the doors share: the demo models, and what ``qcompiler compile`` makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from qcompiler.cli import app

MODELS = Path(__file__).resolve().parents[2] / "examples" / "models"
NAMES = ("digits_resnet", "code_lm")
"""A convolutional network, and a transformer with its weights in another file."""
BATCH = {"digits_resnet": 32, "code_lm": 1}
"""Rows per feed as the command cuts them: 32 where the model's batch is open. Other batches are other data."""


@dataclass(frozen=True)
class Reference:
    """A demo model as the command compiles it.

    Attributes:
        model: the float model.
        data: calibration data, .npz.
        compiled: the compiled model.
        decisions: its decisions record.
    """

    model: Path
    data: Path
    compiled: Path
    decisions: Path

    @property
    def rows(self) -> dict[str, np.ndarray]:
        with np.load(self.data) as archive:
            return dict(archive)


def compile_by_command(name: str, folder: Path, *more: str) -> Reference:
    """Run ``qcompiler compile`` on a demo model."""
    folder.mkdir(parents=True, exist_ok=True)
    model, data, out = MODELS / f"{name}.onnx", MODELS / f"{name}_calib.npz", folder / f"{name}.onnx"
    arguments = ["compile", str(model), "-o", str(out), "--calibration", str(data), "--no-guard", "--quiet", *more]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return Reference(model, data, out, out.with_suffix(".decisions.json"))
