"""Compile one model for many engines from one calibration, and show how the results differ.

One pass over the data gives statistics; every target then gets a plan of its own: its formats, its operators, its
scales. What an engine needs beyond ONNX Runtime is optional: without it the target is lowered and written all the same,
and the last column says what to install for the rest.

    python examples/one_calibration_many_targets.py                      # a demo model
    python examples/one_calibration_many_targets.py --model model.onnx --calibration feeds.npz --output out/
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
from demo_data import demo_models
from rich.console import Console
from rich.table import Table
from rich.text import Text

import qcompiler

BUILDS = (
    ("ort-x86", "int8"), ("ort-x86-avx2", "int8"), ("ort-arm", "int8"), ("ort-cuda", "int4-weights"),
    ("openvino", "int8"), ("tensorrt-sm80", "int8"), ("tensorrt-sm89", "int8"), ("tensorrt-sm89", "fp8"),
    ("tensorrt-sm89", "int4-weights"), ("tensorrt-sm90", "fp8"), ("tensorrt-sm120", "nvfp4"),
)  # fmt: skip
"""(target, recipe) of each row."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Calibrate once, compile for every target, write the models, and print one row for each."""
    options = _parse(arguments)
    demo = next(m for m in demo_models() if m.name == "digits_resnet")
    model = options.model or demo.path
    calibration = options.calibration or demo.calibration
    folder = options.output or Path(tempfile.mkdtemp(prefix="qcompiler-targets-"))
    folder.mkdir(parents=True, exist_ok=True)
    statistics = qcompiler.calibrate(model, calibration)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("target", "recipe", "activations", "weights", "fused/planned", "SQNR", "proof, or what is missing"):
        table.add_column(column, overflow="fold")
    evaluation = options.evaluation or (demo.evaluation if options.model is None else calibration)
    for target, recipe in BUILDS:
        table.add_row(*map(Text, _row(model, target, recipe, statistics, evaluation, folder)))
    console = Console(width=None if Console().is_terminal else 160, highlight=False)
    console.print(table)
    console.print(Text(f"models: {folder}"), soft_wrap=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="an ONNX model; default: the demo model digits_resnet")
    parser.add_argument("--calibration", help="its calibration feeds, as for qcompiler compile")
    parser.add_argument("--evaluation", help="feeds to measure the error on; default: the calibration feeds")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the models go; a new temporary folder")
    options = parser.parse_args(arguments)
    if options.model is not None and options.calibration is None:
        parser.error("--model needs --calibration")
    return options


def _row(
    model: Path, target: str, recipe: str, statistics: qcompiler.Statistics, evaluation: object, folder: Path
) -> tuple[str, ...]:
    """Compile for one target; return the cells of its row."""
    try:
        made = qcompiler.compile(model, target=target, recipe=recipe, calibration=statistics, evaluation=evaluation)
    except qcompiler.QCompilerError as error:
        return target, recipe, "", "", "", "", str(error)
    made.save(folder / f"{target}.{recipe}.onnx")
    proof, quality = made.report.proof, made.report.quality
    fused = f"{len(proof.fused)}/{proof.planned}" if proof.fused or proof.missed else f"-/{proof.planned}"
    sqnr = "" if quality is None else f"{quality.worst:.1f} dB"
    said = proof.note or ("" if not proof.missed else f"{proof.missed[0].group}: {proof.missed[0].text}")
    return target, recipe, *formats(made.model), fused, sqnr, said


def formats(model: ir.Model) -> tuple[str, str]:
    """Return the element types of quantized activations and of quantized weights in a model, as text."""
    activations, weights = set(), set()
    for node in model.graph.all_nodes():
        if node.op_type == "DequantizeLinear":
            value = node.inputs[0]
            assert value is not None
            place = weights if value.const_value is not None else activations
            place.add("?" if value.dtype is None else value.dtype.name.lower())
        elif node.op_type == "MatMulNBits":
            weights.add(f"int{node.attributes['bits'].as_int()} blocks")
    return ", ".join(sorted(activations)) or "float", ", ".join(sorted(weights)) or "float"


if __name__ == "__main__":
    main()
