"""Which function stands behind a value."""

import onnx_ir as ir
import pytest

from qcompiler.calibration.estimators import estimate
from qcompiler.calibration.statistics import TensorStatistics
from qcompiler.targets.following import activation_bounds, function_behind
from qcompiler.targets.points import estimator_for

HEAD = '<ir_version: 10, opset_import: ["": 21]>\ng (float[2, 4] a) => (float[2, 4] y) {\n  x = Neg (a)\n'


def value(body: str, opset: int = 21) -> ir.Value:
    """Return x of a graph whose further nodes are given."""
    model = ir.from_onnx_text(HEAD.replace(": 21", f": {opset}") + body + "\n}")
    return next(node for node in model.graph if node.op_type == "Neg").outputs[0]


SIGMOID = "s = Sigmoid (x)\n"
HALF = "h = Constant <value = float {0.5}> ()\n"
ONE = "one = Constant <value = float {1.0}> ()\n"
ROOT = "r = Constant <value = float {1.4142135}> ()\n"
GELU = f"{ONE}{ROOT}{HALF}d = Div (x, r)\ne = Erf (d)\np = Add (e, one)\n"

FOUND = {
    "relu": "y = Relu (x)",
    "sigmoid": "y = Sigmoid (x)",
    "tanh": "y = Tanh (x)",
    "gelu": "y = Gelu (x)",
    "softmax": "y = Softmax (x)",
    "hard-swish": "y = HardSwish (x)",
    "hard-sigmoid": "y = HardSigmoid <alpha = 0.16666667> (x)",
    "silu": SIGMOID + "y = Mul (x, s)",
    "clip(0.0,6.0)": "l = Constant <value = float {0}> ()\nu = Constant <value = float {6}> ()\ny = Clip (x, l, u)",
    "clip(-inf,inf)": "y = Clip (x)",
}


@pytest.mark.parametrize("name", FOUND)
def test_single_operators_and_gates(name: str) -> None:
    assert function_behind(value(FOUND[name])) == name


def test_an_open_end_of_a_clip() -> None:
    assert function_behind(value("u = Constant <value = float {6}> ()\ny = Clip (x, , u)")) == "clip(-inf,6.0)"


def test_a_gate_written_with_a_hard_sigmoid() -> None:
    body = "s = HardSigmoid <alpha = 0.16666667> (x)\ny = Mul (s, x)"
    assert function_behind(value(body)) == "hard-swish"
    assert function_behind(value(body.replace("0.16666667", "0.2"))) == ""


@pytest.mark.parametrize(
    "end",
    [
        "m = Mul (x, p)\ny = Mul (m, h)",
        "m = Mul (x, h)\ny = Mul (m, p)",
        "q = Mul (p, h)\ny = Mul (q, x)",
    ],
)
def test_a_gelu_written_with_erf(end: str) -> None:
    assert function_behind(value(GELU + end)) == "gelu"
    multiplied = GELU.replace("float {1.4142135}", "float {0.70710678}").replace("Div", "Mul")
    assert function_behind(value(multiplied + end)) == "gelu"


@pytest.mark.parametrize(
    "body",
    [
        "y = Abs (x)",
        "y = Add (x, x)",
        SIGMOID + "t = Tanh (x)\ny = Mul (s, t)",
        SIGMOID + "y = Add (x, s)",
        SIGMOID + "m = Mul (x, x)\ny = Mul (m, s)",
        "b = ReduceMax <keepdims = 0> (a)\ny = Clip (x, , b)",
        "y = HardSigmoid (x)",
        GELU.replace("1.4142135", "1.5") + "m = Mul (x, p)\ny = Mul (m, h)",
        GELU + "m = Mul (x, p)\ny = Add (m, x)",
        "t = Relu (x)\nu = Abs (x)\ny = Add (t, u)",
    ],
)
def test_what_else_reads_a_value_forgives_nothing(body: str) -> None:
    assert function_behind(value(body)) == ""


def test_nothing_is_known_of_what_leaves_the_graph() -> None:
    text = HEAD.replace("float[2, 4] y", "float[2, 4] x, float[2, 4] y")
    model = ir.from_onnx_text(text + "y = Relu (x)\n}")
    assert function_behind(model.graph.outputs[0]) == ""


def test_a_value_that_nothing_reads() -> None:
    assert function_behind(value("y = Relu (a)")) == ""


def test_the_bounds_of_a_relu() -> None:
    reader = next(iter(value("y = Relu (x)").uses())).node
    assert activation_bounds(reader) == (0.0, float("inf"))


def test_the_estimator_follows_the_function() -> None:
    assert estimator_for(value(FOUND["relu"])) == "mse::relu"
    assert estimator_for(value("y = Abs (x)")) == "mse"
    assert estimator_for(value("y = Abs (x)"), "percentile:99.9") == "percentile:99.9"


@pytest.mark.parametrize("name", FOUND)
def test_every_function_has_an_estimator(name: str) -> None:
    tensor = TensorStatistics()
    tensor.add([-3.0, -1.0, 0.0, 2.0])  # type: ignore[arg-type]
    low, high = estimate(tensor, estimator_for(value(FOUND[name])))
    assert -3.0 <= low <= 0.0 < high <= 2.0
