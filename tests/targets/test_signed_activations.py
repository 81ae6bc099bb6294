"""Which activations get the signed format, on a target where a zero point costs time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

import qcompiler
from qcompiler.compiled import CompiledModel
from qcompiler.ir.graph import const_array
from qcompiler.quant.spec import QuantSource
from qcompiler.targets.groups import find_groups
from qcompiler.targets.placement import resolve
from qcompiler.targets.target import Target, load_target
from tests.passes.quantize.lab import import_exactly, model_of, normal
from tests.synthetic import feeds_of

TARGET = load_target("openvino")
WEIGHTS = {"w": normal(1, 8, 4, 3, 3), "b": normal(2, 8), "w2": normal(3, 8, 8, 1, 1)}
IMAGE, OUT = "float[n,4,8,8] x", "float[] y"
PAIR = "a = Conv(x, w, b) r = Relu(a) y = Conv(r, w2)"


class Ranges:
    """One range for every value."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def observed(self, name: str) -> bool:
        return True

    def range(self, name: str, estimator: str = "min-max", spec: object = None) -> tuple[float, float]:
        return self.low, self.high


def formats(
    low: float, high: float, target: Target = TARGET, imported: dict[str, QuantSource] | None = None
) -> tuple[str, bool]:
    """Return (format, whether it is symmetric) of the input of a convolution whose values have a range."""
    model = import_exactly(model_of(IMAGE, OUT, "y = Conv(x, w, b)", {n: WEIGHTS[n] for n in ("w", "b")}))
    groups = find_groups(model, target)
    found = resolve(groups, {g.name: "static" for g in groups}, target, Ranges(low, high), imported=imported)
    spec = found.plan.points["x"].spec
    return spec.format, spec.symmetric


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-1.0, 1.0, "int8"),
        (-3.0, 1.0, "int8"),
        (-3.0, -1.0, "int8"),
        (-3.0, 0.0, "int8"),
        (0.0, 6.0, "uint8"),
        (0.5, 6.0, "uint8"),
        (-0.375, 6.0, "uint8"),  # the tail of HardSwish: a symmetric format would waste half of its integers
        (-0.25, 1.0, "uint8"),
        (-0.2501, 1.0, "int8"),
        (0.0, 0.0, "uint8"),
    ],
)
def test_values_of_both_signs_are_signed_without_a_zero_point(low: float, high: float, expected: str) -> None:
    assert formats(low, high) == (expected, expected == "int8")


def test_a_target_without_a_signed_format_has_one_format() -> None:
    assert formats(-1.0, 1.0, replace(TARGET, signed="")) == ("uint8", False)
    assert formats(-1.0, 1.0, load_target("ort-x86")) == ("uint8", False)


def test_imported_numbers_stay_what_they_are() -> None:
    own = QuantSource("fixed", scale=(0.02,), zero_point=(77,))
    assert formats(-1.0, 1.0, imported={"x": own}) == ("uint8", False)


def emitted(body: str, low: float) -> dict[str, tuple[str, int]]:
    """Return (format, zero point) per QuantizeLinear of a compiled model, by the value it quantizes."""
    named = {
        n: a for n, a in WEIGHTS.items() if n in body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    }
    feeds = [{"x": np.clip(f["x"], low, None)} for f in feeds_of({"x": (2, 4, 8, 8)}, 5)]
    made: CompiledModel = qcompiler.compile(
        model_of(IMAGE, OUT, body, named), target="openvino", recipe="int8-static", calibration=feeds, guard=False
    )
    found = {}
    for node in made.model.graph:
        if node.op_type == "QuantizeLinear":
            zero = const_array(node.inputs[2])
            assert zero is not None
            assert node.inputs[2].dtype in (ir.DataType.INT8, ir.DataType.UINT8)
            found[str(node.inputs[0].name).rpartition("/")[2]] = (zero.dtype.name, int(zero))
    return found


def test_what_a_relu_leaves_is_unsigned_without_a_zero_point() -> None:
    both, positive = emitted(PAIR, -9.0), emitted(PAIR, 0.0)
    assert both["x"] == ("int8", 0)
    assert positive["x"] == ("uint8", 0)
    assert [value for name, value in both.items() if name != "x"] == [("uint8", 0)]


def test_a_mover_and_what_it_moves_have_one_format() -> None:
    found = emitted("a = Conv(x, w, b) t = Transpose<perm=[0,1,3,2]>(a) y = Conv(t, w2)", -9.0)
    assert set(found.values()) == {("int8", 0)}
