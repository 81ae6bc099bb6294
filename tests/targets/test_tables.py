"""Tables of targets that this machine need not be: what they say, and what is emitted for them, number by number."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

import qcompiler
from qcompiler.compiled import CompiledModel
from qcompiler.engine import Array, Feeds
from qcompiler.errors import TargetError
from qcompiler.quant.saturation import pair_saturated_matmul, pairs_fit, saturation_share, summed_columns
from qcompiler.targets.target import load_target
from tests.families import FAMILIES, source
from tests.synthetic import feeds_of, model, normal, qdq_cnn

INT8, UINT8, INT32 = onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT32
ELSEWHERE = ("ort-x86-avx2", "ort-arm", "ort-tensorrt")
RECIPES = {"ort-tensorrt": "int8-static", "ort-cuda": "int4-weights"}


@functools.cache
def built(target: str, family: str = "residual", recipe: str = "") -> CompiledModel:
    recipe = recipe or RECIPES.get(target, "int8")
    feeds = FAMILIES[family].feeds()
    return qcompiler.compile(source(family), calibration=feeds, target=target, recipe=recipe, guard=False)


def emitted(made: CompiledModel) -> onnx.ModelProto:
    return onnx.load_from_string(made.to_bytes())


def constants(proto: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def nodes(proto: onnx.ModelProto, *types: str) -> list[onnx.NodeProto]:
    return [n for n in proto.graph.node if n.op_type in types]


def session(
    blob: bytes, level: str = "ENABLE_ALL", config: dict[str, str] | None = None, path: Path | None = None
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_{level}")
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    if path is not None:
        options.optimized_model_filepath = str(path)
    return ort.InferenceSession(blob, options, providers=["CPUExecutionProvider"])


def optimized(blob: bytes, path: Path, level: str = "ENABLE_ALL", **config: str) -> onnx.ModelProto:
    session(blob, level, {f"session.{k}": v for k, v in config.items()}, path)
    return onnx.load(path)


def decibels(wanted: Array, found: Array) -> float:
    error = float(np.square(wanted.astype(np.float64) - found).sum())
    return float(10 * np.log10(np.square(wanted.astype(np.float64)).sum() / error))


def sqnr(made: CompiledModel, given: bytes, feed: Feeds) -> float:
    wanted, found = (session(b).run(None, feed)[0] for b in (given, made.to_bytes()))
    return decibels(wanted, found)


def crowded() -> onnx.ModelProto:
    """Two products and a convolution of whose weights neighbours have one sign: with 8 bits every pair saturates."""
    rows = np.abs(normal(1, 64, 64, fan=64)) + np.float32(0.5)
    weights = {"w1": rows, "w2": -rows, "wc": np.ones((8, 8, 3, 3), np.float32)}
    body = """
    /m1: a = MatMul(x, w1)
    /t: t = Tanh(a)
    /m2: y = MatMul(t, w2)
    /c: c = Conv<pads=[1,1,1,1]>(i, wc)
    /r: z = Relu(c)
    """
    shapes = {"x": (4, 64), "i": (1, 8, 8, 8)}
    return model(body, shapes, {"y": (4, 64), "z": (1, 8, 8, 8)}, weights)


@functools.cache
def crowded_for(target: str) -> CompiledModel:
    feeds = feeds_of({"x": (4, 64), "i": (1, 8, 8, 8)})
    return qcompiler.compile(crowded(), calibration=feeds, target=target, guard=False)


def weights_of(made: CompiledModel) -> list[tuple[str, Array]]:
    """Return (operator, int8 weight) of every integer product and convolution."""
    proto = emitted(made)
    known, found = constants(proto), []
    feeding = {n.output[0]: n.input[0] for n in nodes(proto, "DequantizeLinear")}
    for node in nodes(proto, "Conv", "MatMul", "Gemm", "MatMulIntegerToFloat"):
        name = feeding.get(node.input[1], node.input[1])
        if name in known and known[name].dtype == np.int8:
            found.append(("Conv" if node.op_type == "Conv" else "MatMul", known[name]))
    return found


# ---- what the tables say -------------------------------------------------------------------------------------------


def test_the_table_without_vnni_differs_from_that_with_it_in_nothing_but_the_range_of_weights() -> None:
    base, table = load_target("ort-x86"), load_target("ort-x86-avx2")
    assert table.rows == base.rows
    assert table.traps == base.traps
    assert (table.processor, table.requires) == ("x86_64", ("avx2", "no-vnni"))
    assert (table.activation, table.weight, table.engine) == ("uint8", "int8", "onnxruntime")
    assert (base.weight_bits, table.weight_bits) == (8, 8)
    assert (base.pair_safe, table.pair_safe) == (False, True)


def test_the_table_for_arm_has_signed_activations_with_a_zero_point() -> None:
    base, table = load_target("ort-x86"), load_target("ort-arm")
    assert (table.processor, table.requires) == ("aarch64", ())
    assert (table.activation, table.symmetric, table.weight, table.weight_bits) == ("int8", False, "int8", 8)
    assert [r for r in table.rows if r.type != ("Sigmoid",)] == [r for r in base.rows if r.type != ("Sigmoid",)]
    sigmoid = table.row("Sigmoid")
    assert sigmoid is not None
    assert sigmoid.fixed_output == (2.0**-8, -128)


def test_the_table_for_tensorrt_inside_onnx_runtime_is_that_of_tensorrt_in_float32() -> None:
    base, table = load_target("tensorrt"), load_target("ort-tensorrt")
    assert table.rows == base.rows
    assert (table.activation, table.symmetric, table.bias) == ("int8", True, "float")
    assert (table.float_type, table.opset, table.max_opset) == ("float32", 21, 21)
    assert table.schemes == ("int8",)


@pytest.mark.parametrize(("target", "scheme"), [("ort-tensorrt", "fp8"), ("ort-cuda", "fp8")])
def test_a_scheme_that_a_table_lacks_names_a_target_that_has_it(target: str, scheme: str) -> None:
    with pytest.raises(TargetError, match=rf"target {target} has no scheme '{scheme}': .*tensorrt"):
        load_target(target, scheme)


def test_the_cuda_provider_stores_weights_and_computes_in_float16() -> None:
    table = load_target("ort-cuda")
    assert table.schemes == ("int4-weights", "int8-weights")
    assert (table.float_type, table.block, table.blocks) == ("float16", 32, (16,))
    assert {t for row in table.rows for t in row.type} == {"MatMul", "Gemm"}
    assert all(row.forms == ("weight-only",) for row in table.rows)
    assert [table.with_scheme(s).weight for s in table.schemes] == ["int4", "int8"]


def test_static_integers_on_the_cuda_provider_are_refused_with_the_reason() -> None:
    with pytest.raises(TargetError, match="has no scheme 'int8': the CUDA provider has no kernels for 8-bit integers"):
        qcompiler.compile(source("residual"), calibration=FAMILIES["residual"].feeds(), target="ort-cuda", guard=False)


@pytest.mark.parametrize("target", [*ELSEWHERE, "ort-cuda"])
def test_nothing_is_timed_for_a_target_that_is_elsewhere_and_the_report_says_so(target: str) -> None:
    report = built(target).report.to_dict()
    assert report["speedup"] is None
    assert [w for w in report["warnings"] if target in w and "nothing was timed" in w]


# ---- x86 without VNNI ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["residual", "transformer"])
def test_no_activation_can_saturate_what_is_emitted_for_avx2(family: str) -> None:
    found = weights_of(built("ort-x86-avx2", family))
    assert len(found) == {"residual": 3, "transformer": 6}[family]
    for op_type, weight in found:
        assert pairs_fit(summed_columns(weight, op_type)).all()
        assert np.abs(weight.astype(int)).max() >= 63  # the range is used


def test_crowded_weights_saturate_with_8_bits_and_not_as_emitted_for_avx2() -> None:
    rng = np.random.default_rng(0)
    wide, narrow = weights_of(crowded_for("ort-x86")), weights_of(crowded_for("ort-x86-avx2"))
    assert [op for op, _ in wide] == [op for op, _ in narrow]
    assert len(wide) == 3
    for (op_type, eight), (_, seven) in zip(wide, narrow, strict=True):
        loud, safe = summed_columns(eight, op_type), summed_columns(seven, op_type)
        x = rng.integers(128, 256, (5, loud.shape[0])).astype(np.uint8)
        assert not pairs_fit(loud).any()
        assert saturation_share(x, loud) > 0.5
        assert (pair_saturated_matmul(x, loud) != x.astype(int) @ loud.astype(int)).all()
        assert saturation_share(x, safe) == 0
        np.testing.assert_array_equal(pair_saturated_matmul(x, safe), x.astype(int) @ safe.astype(int))


def test_the_model_for_avx2_runs_as_close_to_float_as_7_bits_allow() -> None:
    for family, least in (("residual", 34), ("transformer", 32)):
        feed = FAMILIES[family].feeds()[0]
        eight, seven = (sqnr(built(t, family), source(family), feed) for t in ("ort-x86", "ort-x86-avx2"))
        assert seven > least
        assert -1 < eight - seven < 12  # one bit of the weights is 6 dB; activations keep theirs


def test_most_of_what_7_bits_would_cost_is_kept() -> None:
    feed = FAMILIES["residual"].feeds()[0]
    eight, safe, seven = (sqnr(built(t), source("residual"), feed) for t in ("ort-x86", "ort-x86-avx2", "ort-generic"))
    assert eight - seven > 4  # seen: 45.7, 44.0 and 37.5 dB over all feeds
    assert eight - safe < (eight - seven) / 2


def test_a_depthwise_convolution_keeps_8_bits_for_avx2() -> None:
    weights = {"w1": np.ones((8, 1, 3, 3), np.float32), "w2": np.ones((16, 1, 3, 3), np.float32)}
    body = """
    /c1: a = Conv<group=8, pads=[1,1,1,1]>(x, w1)
    /c2: c = Conv<group=8, pads=[1,1,1,1]>(a, w2)
    /r: y = Relu(c)
    """
    net = model(body, {"x": (1, 8, 8, 8)}, {"y": (1, 16, 8, 8)}, weights)
    made = qcompiler.compile(net, calibration=feeds_of({"x": (1, 8, 8, 8)}), target="ort-x86-avx2", guard=False)
    assert [int(w.max()) for _, w in weights_of(made)] == [127, 64]  # two filters per channel are added in pairs


@pytest.mark.parametrize(("weight", "kept"), [(100, False), (50, True)])
def test_an_imported_weight_stays_as_it_is_where_no_pair_saturates(weight: int, kept: bool) -> None:
    proto = qdq_cnn(np.uint8)
    for tensor in proto.graph.initializer:
        if tensor.name in ("w1", "w2"):
            tensor.CopyFrom(numpy_helper.from_array(np.full((8, 8, 3, 3), weight, np.int8), tensor.name))
    feeds = FAMILIES["qdq uint8"].feeds()
    made = qcompiler.compile(proto, calibration=feeds, target="ort-x86-avx2", guard=False)
    assert [int(w.max()) for _, w in weights_of(made)] == [weight if kept else 64] * 2


def test_activations_for_avx2_are_unsigned() -> None:
    proto = emitted(built("ort-x86-avx2"))
    known = constants(proto)
    zeros = {known[n.input[2]].dtype for n in nodes(proto, "QuantizeLinear")}
    assert zeros == {np.dtype(np.uint8)}


# ---- ARM -----------------------------------------------------------------------------------------------------------


def test_activations_for_arm_are_signed_and_use_their_zero_point() -> None:
    proto = emitted(built("ort-arm"))
    known = constants(proto)
    zeros = [known[n.input[2]] for n in nodes(proto, "QuantizeLinear")]
    assert zeros
    assert {z.dtype for z in zeros} == {np.dtype(np.int8)}
    assert {int(z) for z in zeros} >= {-128}  # behind a Relu, which is gone
    assert not nodes(proto, "Relu")
    weights = weights_of(built("ort-arm"))
    assert max(int(np.abs(w.astype(int)).max()) for _, w in weights) == 127


def test_signed_activations_represent_the_same_numbers_as_unsigned_ones() -> None:
    feed = FAMILIES["residual"].feeds()[0]
    signed, unsigned = (session(built(t).to_bytes(), "DISABLE_ALL").run(None, feed)[0] for t in ("ort-arm", "ort-x86"))
    np.testing.assert_allclose(signed, unsigned, atol=1e-6 * float(np.abs(unsigned).max()))


def test_the_engine_as_on_arm_fuses_all_that_is_planned(tmp_path: Path) -> None:
    # The option that makes x86 treat signed activations as ARM does; seen to give the same graph as 1.31 for aarch64.
    found = optimized(built("ort-arm").to_bytes(), tmp_path / "o.onnx", qdqisint8allowed="1")
    kinds = Counter(n.op_type for n in found.graph.node)
    assert (kinds["QLinearConv"], kinds["QLinearAdd"], kinds["QLinearGlobalAveragePool"]) == (3, 1, 1)
    assert kinds["Conv"] + kinds["FusedConv"] + kinds["Add"] == 0


def test_a_sigmoid_for_arm_starts_at_the_lowest_integer() -> None:
    weights = {"w1": normal(1, 16, 16, 3, 3, fan=144), "w2": normal(2, 16, 16, 3, 3, fan=144)}
    body = """
    /c1: a = Conv<pads=[1,1,1,1]>(x, w1)
    /s: b = Sigmoid(a)
    /c2: c = Conv<pads=[1,1,1,1]>(b, w2)
    /r: y = Relu(c)
    """
    net = model(body, {"x": (1, 16, 8, 8)}, {"y": (1, 16, 8, 8)}, weights)
    feeds = feeds_of({"x": (1, 16, 8, 8)})
    made = qcompiler.compile(net, calibration=feeds, target="ort-arm", guard=False)
    known = constants(emitted(made))
    assert (known["b:scale"], known["b:zero_point"]) == (2.0**-8, -128)
    assert sqnr(made, net.SerializeToString(), feeds[0]) > 30


@pytest.mark.parametrize("target", ["ort-x86-avx2", "ort-arm"])
@pytest.mark.parametrize("family", ["residual", "transformer", "qdq int8"])
def test_every_fusion_for_a_processor_that_is_elsewhere_is_proven_here(target: str, family: str) -> None:
    proof = built(target, family).report.to_dict()["proof"]
    assert proof["missed"] == []
    assert proof["planned"] == proof["fused"] == FAMILIES[family].planned


# ---- TensorRT inside ONNX Runtime -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["residual", "transformer"])
def test_what_is_emitted_for_tensorrt_is_signed_symmetric_and_has_float_biases(family: str) -> None:
    proto = emitted(built("ort-tensorrt", family))
    known = constants(proto)
    pairs = nodes(proto, "QuantizeLinear", "DequantizeLinear")
    assert len(nodes(proto, "QuantizeLinear")) >= 2
    for node in pairs:
        assert known[node.input[2]].dtype == np.int8
        assert not known[node.input[2]].any()
    assert not [n for n in pairs if n.input[0] in known and known[n.input[0]].dtype != np.int8]
    assert {(o.domain, o.version) for o in proto.opset_import} == {("", 21)}
    assert sqnr(built("ort-tensorrt", family), source(family), FAMILIES[family].feeds()[0]) > 30


def test_options_keep_onnx_runtime_from_quantizing_biases_in_front_of_the_provider(tmp_path: Path) -> None:
    def stored(**config: str) -> list[np.dtype]:
        found = optimized(built("ort-tensorrt").to_bytes(), tmp_path / "o.onnx", "ENABLE_BASIC", **config)
        known = constants(found)
        return [known[n.input[0]].dtype for n in nodes(found, "DequantizeLinear") if n.input[0] in known]

    assert np.dtype(np.int32) in stored()
    assert stored(disable_quant_qdq="1") == []  # the weights are float again
    kept = stored(disable_quant_qdq="1", disable_qdq_constant_folding="1")
    assert set(kept) == {np.dtype(np.int8)}
    assert len(kept) == len(weights_of(built("ort-tensorrt")))


# ---- the CUDA provider ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("recipe", "bits", "least"), [("int4-weights", 4, 15), ("int8-weights", 8, 35)])
def test_products_become_matmulnbits_and_nothing_else_is_quantized(recipe: str, bits: int, least: float) -> None:
    made = built("ort-cuda", "transformer", recipe)
    proto = emitted(made)
    found = nodes(proto, "MatMulNBits")
    assert len(found) == 6
    for node in found:
        values = {a.name: a.i for a in node.attribute}
        assert node.domain == "com.microsoft"
        assert (values["bits"], values["block_size"]) == (bits, 32)
        packed, scales = (constants(proto)[node.input[i]] for i in (1, 2))
        assert packed.dtype == np.uint8
        assert packed.shape == (values["N"], values["K"] // 32, 32 * bits // 8)
        assert scales.size == values["N"] * values["K"] // 32
        assert scales.dtype == np.float16  # floats are float16 there, and activations are not to be rounded to 8 bits
        assert "accuracy_level" not in values
    assert not nodes(proto, "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
    assert sqnr(made, source("transformer"), FAMILIES["transformer"].feeds()[0]) > least


def test_convolutions_stay_float_on_the_cuda_provider() -> None:
    proto = emitted(built("ort-cuda"))
    assert len(nodes(proto, "Conv", "FusedConv")) == 3
    assert not nodes(proto, "QuantizeLinear", "DequantizeLinear", "QLinearConv")
