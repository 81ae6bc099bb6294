"""normalize-activations, recognize-silu, recognize-gelu, recognize-layer-norm."""

import math

import numpy as np
import pytest

from qcompiler.passes.normalize_activations import NormalizeActivations
from qcompiler.passes.recognize_gelu import RecognizeGelu
from qcompiler.passes.recognize_layer_norm import RecognizeLayerNorm
from qcompiler.passes.recognize_silu import RecognizeSilu

_F = np.float32
_MAX = _F(np.finfo(np.float32).max)


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("y = Max(x, c)", {"c": _F(0)}),
        ("y = Max(c, x)", {"c": _F([0])}),
        ("y = Clip(x, c)", {"c": _F(0)}),
        ("y = Clip(x, c, d)", {"c": _F(0), "d": _MAX}),
        ("a = Relu(x) y = Relu(a)", {}),
        ("a = Clip(x, c) y = Relu(a)", {"c": _F(-1)}),
        ("a = Relu(x) y = Clip(a, c)", {"c": _F(-1)}),
    ],
)
def test_spelling_of_relu(run, text, body, weights):
    assert run(NormalizeActivations(), text("float[n,4] x", "float[n,4] y", body, weights)).ops == {"Relu": 1}


@pytest.mark.parametrize(
    ("body", "weights", "bounds"),
    [
        ("a = Relu(x) y = Clip(a, c, d)", {"c": _F(0), "d": _F(6)}, [0, 6]),
        ("a = Relu(x) y = Clip(a, c, d)", {"c": _F(-2), "d": _F(6)}, [0, 6]),
        ("a = Clip(x, c, d) y = Relu(a)", {"c": _F(-2), "d": _F(1.5)}, [0, 1.5]),
        ("a = Clip(x, c, d) y = Clip(a, e, f)", {"c": _F(-2), "d": _F(2), "e": _F(-1), "f": _F(3)}, [-1, 2]),
        ("a = Max(x, c) y = Min(a, d)", {"c": _F(-1), "d": _F(2)}, [-1, 2]),
        ("a = Min(d, x) y = Max(c, a)", {"c": _F(-1), "d": _F(2)}, [-1, 2]),
        ("y = Clip(x, c, d)", {"c": -_MAX, "d": _F(2)}, [None, 2]),
    ],
)
def test_spelling_of_clip(run, text, body, weights, bounds):
    found = run(NormalizeActivations(), text("float[n,4] x", "float[n,4] y", body, weights))
    assert found.ops == {"Clip": 1}
    inputs = [None if v is None else v.const_value.numpy().item() for v in found.node("Clip").inputs[1:]]
    assert inputs == bounds


@pytest.mark.parametrize(
    ("body", "weights", "rule", "reason"),
    [
        ("a = Clip(x, c, d) y = Clip(a, e, f)", {"c": _F(-2), "d": _F(-1), "e": _F(0), "f": _F(3)}, "clip-of-clip",
         "disjoint"),
        ("a = Max(x, c) y = Min(a, d)", {"c": _F(3), "d": _F(2)}, "min-of-max", "disjoint"),
        ("a = Max(x, c) y = Min(a, d)", {"c": _F([0, 1, 2, 3]), "d": _F(9)}, "min-of-max", "not-per-tensor"),
        ("a = Relu(x) b = Relu(a) y = Add(a, b)", {}, "clip-of-clip", "interior-used-elsewhere"),
    ],
)  # fmt: skip
def test_activations_that_do_not_join(run, text, body, weights, rule, reason):
    found = run(NormalizeActivations(), text("float[n,4] x", "float[n,4] y", body, weights))
    assert (found.changes, found.reason(rule)) == (0, reason)


def test_first_of_two_relus_is_a_graph_output(run, text):
    found = run(NormalizeActivations(), text("float[n] x", "float[n] a, float[n] y", "a = Relu(x) y = Relu(a)"))
    assert found.reason("clip-of-clip") == "graph-output"


def test_first_of_two_relus_is_read_by_a_subgraph(run, text):
    body = """
    a = Relu(x) b = Relu(a)
    y = If(c) <then_branch = t () => (float[n] p) { p = Neg(a) },
               else_branch = e () => (float[n] q) { q = Neg(b) }>
    """
    found = run(NormalizeActivations(), text("bool c, float[n] x", "float[n] y", body))
    assert found.reason("clip-of-clip") == "captured"


def test_integer_max_stays(run, text):
    found = run(NormalizeActivations(), text("int64[n] x", "int64[n] y", "y = Max(x, c)", {"c": np.int64(0)}))
    assert found.reason("max-zero") == "not-float"


def test_bounds_computed_at_run_time_stay(run, text):
    body = "a = Relu(x) y = Clip(a, lo, hi)"
    found = run(NormalizeActivations(), text("float[n] x, float lo, float hi", "float[n] y", body), compare=False)
    assert found.reason("clip-of-clip") == "not-constant"


@pytest.mark.parametrize(
    "body",
    [
        "s = Sigmoid(x) y = Mul(s, x)",
        "a = Neg(x) b = Exp(a) c = Add(b, one) y = Div(x, c)",
        "a = Neg(x) b = Exp(a) c = Add(one, b) s = Div(one, c) y = Mul(s, x)",
        "a = Neg(x) b = Exp(a) c = Add(b, one) s = Reciprocal(c) y = Mul(x, s)",
    ],
)
def test_spelling_of_silu(run, text, body):
    found = run(RecognizeSilu(), text("float[n,4] x", "float[n,4] y", body, {"one": _F(1)}))
    assert found.ops == {"Sigmoid": 1, "Mul": 1}
    product = found.node("Mul")
    assert product.inputs[0].name == "x"
    assert product.inputs[1] is found.node("Sigmoid").outputs[0]


def test_gate_on_another_value_is_no_silu(run, text):
    found = run(RecognizeSilu(), text("float[n] x, float[n] z", "float[n] y", "s = Sigmoid(x) y = Mul(s, z)"))
    assert found.changes == 0


_HALVES = {"half": _F(0.5), "two": _F(2)}
_ERF = {"r": _F(math.sqrt(2)), "i": _F(math.sqrt(0.5)), "one": _F(1), **_HALVES}


@pytest.mark.parametrize("argument", ["a = Div(x, r)", "a = Mul(x, i)", "a = Mul(i, x)"])
@pytest.mark.parametrize(
    "product",
    [
        "p = Mul(x, s) y = Mul(p, half)",
        "p = Mul(s, x) y = Div(p, two)",
        "h = Mul(x, half) y = Mul(h, s)",
        "h = Mul(half, x) y = Mul(s, h)",
        "h = Mul(s, half) y = Mul(x, h)",
        "h = Div(x, two) y = Mul(h, s)",
    ],
)
def test_spelling_of_gelu_with_erf(run, text, argument, product):
    body = f"{argument} e = Erf(a) s = Add(e, one) {product}"
    found = run(RecognizeGelu(), text("float[n,4] x", "float[n,4] y", body, _ERF))
    assert found.ops == {"Gelu": 1}
    assert found.node("Gelu").attributes.get("approximate") is None


_TANH = {"k": _F(0.044715), "f": _F(math.sqrt(2 / math.pi)), "one": _F(1), "three": _F(3), "sq": _F(2), **_HALVES}


@pytest.mark.parametrize(
    "argument",
    [
        "c = Pow(x, three) m = Mul(c, k) a = Add(x, m) t = Mul(a, f)",
        "q = Mul(x, x) c = Mul(q, x) m = Mul(k, c) a = Add(x, m) t = Mul(f, a)",
        "q = Pow(x, sq) m = Mul(q, k) o = Add(m, one) v = Mul(x, o) t = Mul(v, f)",
        "q = Mul(x, x) m = Mul(q, k) o = Add(one, m) v = Mul(x, f) t = Mul(v, o)",
        "u = Mul(x, k) w = Mul(x, u) o = Add(w, one) v = Mul(x, o) t = Mul(v, f)",
    ],
)
def test_spelling_of_gelu_with_tanh(run, text, argument):
    body = f"{argument} h = Tanh(t) s = Add(h, one) p = Mul(x, s) y = Mul(p, half)"
    found = run(RecognizeGelu(), text("float[n,4] x", "float[n,4] y", body, _TANH))
    assert found.ops == {"Gelu": 1}
    assert found.node("Gelu").attributes["approximate"].as_string() == "tanh"


_GELU = "a = Div(x, r) e = Erf(a) s = Add(e, one) p = Mul(x, s) y = Mul(p, half)"


def test_gelu_in_half_precision(run, text):
    weights = {name: array.astype(np.float16) for name, array in _ERF.items()}
    found = run(RecognizeGelu(), text("float16[n,4] x", "float16[n,4] y", _GELU, weights), compare=False)
    assert found.ops == {"Gelu": 1}


def test_gelu_needs_its_operator(run, text):
    found = run(RecognizeGelu(), text("float[n] x", "float[n] y", _GELU, _ERF, opset=19))
    assert (found.changes, found.reason("gelu-by-erf")) == (0, "opset")


def test_gelu_whose_inside_is_read_elsewhere_stays(run, text):
    found = run(RecognizeGelu(), text("float[n] x", "float[n] y, float[n] z", f"{_GELU} z = Neg(e)", _ERF))
    assert found.reason("gelu-by-erf") == "interior-used-elsewhere"


def test_gelu_with_another_constant_is_none(run, text):
    found = run(RecognizeGelu(), text("float[n] x", "float[n] y", _GELU, {**_ERF, "r": _F(1.5)}))
    assert found.changes == 0


_CENTRED = "m = ReduceMean(x, ax) d = Sub(x, m)"
_NORM = {"ax": np.array([-1]), "eps": _F(1e-5), "sq": _F(2), "root": _F(0.5), "one": _F(1), "neg": _F(-0.5)}


@pytest.mark.parametrize("square", ["q = Pow(d, sq)", "q = Mul(d, d)"])
@pytest.mark.parametrize(
    "divide",
    [
        "s = Sqrt(e) y = Div(d, s)",
        "s = Pow(e, root) y = Div(d, s)",
        "s = Sqrt(e) r = Reciprocal(s) y = Mul(d, r)",
        "s = Sqrt(e) r = Div(one, s) y = Mul(r, d)",
        "r = Pow(e, neg) y = Mul(d, r)",
    ],
)
def test_spelling_of_layer_norm(run, text, square, divide):
    body = f"{_CENTRED} {square} v = ReduceMean(q, ax) e = Add(v, eps) {divide}"
    found = run(RecognizeLayerNorm(), text("float[n,3,8] x", "float[n,3,8] y", body, _NORM))
    assert found.ops == {"LayerNormalization": 1}
    assert found.node("LayerNormalization").attributes["epsilon"].as_float() == pytest.approx(1e-5)


_LAYER_NORM = f"{_CENTRED} q = Pow(d, sq) v = ReduceMean(q, ax) e = Add(v, eps) s = Sqrt(e) n = Div(d, s)"


def test_scale_and_bias_are_taken_up(run, text, rng):
    body = f"{_LAYER_NORM} g = Mul(gamma, n) h = Add(g, beta) y = Mul(h, k)"
    weights = {**_NORM, "k": _F([2])} | {n: rng.normal(size=8).astype(_F) for n in ("gamma", "beta")}
    found = run(RecognizeLayerNorm(), text("float[n,3,8] x", "float[n,3,8] y", body, weights))
    assert found.ops == {"LayerNormalization": 1}
    node = found.node("LayerNormalization")
    np.testing.assert_allclose(node.inputs[1].const_value.numpy(), weights["gamma"] * 2, rtol=1e-6)
    np.testing.assert_allclose(node.inputs[2].const_value.numpy(), weights["beta"] * 2, rtol=1e-6)


def test_layer_norm_with_axes_as_attribute(run, text):
    body = _LAYER_NORM.replace("ReduceMean(x, ax)", "ReduceMean<axes=[2]>(x)").replace(
        "ReduceMean(q, ax)", "ReduceMean<axes=[-1]>(q)"
    )
    found = run(RecognizeLayerNorm(), text("float[n,3,8] x", "float[n,3,8] y", f"{body} y = Relu(n)", _NORM, opset=17))
    assert found.ops == {"LayerNormalization": 1, "Relu": 1}


@pytest.mark.parametrize(
    ("shape", "changed", "reason"),
    [
        ("n,3,8", {"ax": np.array([1])}, "not-last-axis"),
        ("n,3,8", {"ax": np.array([1, 2])}, "axes"),
        ("n,3,k", {}, "unknown-shape"),
        ("n,3,8", {"eps": _F([1e-5] * 8)}, "not-per-tensor"),
    ],
)
def test_other_norms_stay(run, text, shape, changed, reason):
    body = f"{_LAYER_NORM} y = Relu(n)"
    found = run(RecognizeLayerNorm(), text(f"float[{shape}] x", f"float[{shape}] y", body, {**_NORM, **changed}))
    assert (found.changes, found.reason("layer-norm")) == (0, reason)


def test_norm_whose_deviation_is_read_stays(run, text):
    body = f"{_LAYER_NORM} y = Relu(n)"
    found = run(RecognizeLayerNorm(), text("float[n,8] x", "float[n,8] y, float[n,1] s", body, _NORM))
    assert found.reason("layer-norm") == "graph-output"


def test_factor_that_varies_over_rows_is_not_taken_up(run, text, rng):
    body = f"{_LAYER_NORM} y = Mul(n, k)"
    weights = {**_NORM, "k": rng.normal(size=(3, 1)).astype(_F)}
    found = run(RecognizeLayerNorm(), text("float[n,3,8] x", "float[n,3,8] y", body, weights))
    assert found.ops == {"LayerNormalization": 1, "Mul": 1}
    assert found.reason("layer-norm-affine") == "not-per-channel"
