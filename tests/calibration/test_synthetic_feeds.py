"""Invented feeds: what the graph tells about its inputs is met, what it does not tell is said."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.calibration.readers import synthetic_feeds
from qcompiler.calibration.smooth import EDGE, unit
from qcompiler.engine import TensorInfo
from qcompiler.errors import CalibrationError

FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64
Array = np.ndarray
Shape = Sequence[int | str | None]


def model_of(
    nodes: Sequence[onnx.NodeProto], inputs: Mapping[str, tuple[int, Shape]], constants: Mapping[str, Array]
) -> tuple[ir.Model, list[TensorInfo]]:
    """Return a model whose only output is the last node's, and what its inputs are."""
    given = [helper.make_tensor_value_info(name, kind, list(shape)) for name, (kind, shape) in inputs.items()]
    out = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.UNDEFINED, None)
    weights = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(list(nodes), "g", given, [out], weights)
    model = ir.serde.deserialize_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    infos = [
        TensorInfo(name, np.dtype(helper.tensor_dtype_to_np_dtype(kind)), tuple(shape))
        for name, (kind, shape) in inputs.items()
    ]
    return model, infos


def node(op: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], output, **attributes)


def feeds_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, tuple[int, Shape]],
    constants: Mapping[str, Array],
    count: int = 1,
) -> tuple[list[dict[str, Array]], str]:
    model, infos = model_of(nodes, inputs, constants)
    source = synthetic_feeds(model, infos, count)
    assert source.synthetic is not None
    return list(source), source.synthetic


class TestBatchNormalization:
    KERNEL, MEAN, DEVIATION = 3, np.array([90.0, 120.0, 140.0]), 45.0

    def real(self, layout: str) -> Array:
        """Pictures of known mean and deviation, as if they were the training data: [64, 3, 32, 32]."""
        generator = np.random.default_rng(7)
        info = TensorInfo("x", np.dtype(np.float32), (64, 3, 32, 32))
        drawn = unit(generator, info, (64, 3, 32, 32)) * self.DEVIATION + self.MEAN.reshape(1, 3, 1, 1)
        return drawn if layout == "NCHW" else drawn.transpose(0, 2, 3, 1)

    @staticmethod
    def outputs(x: Array, weight: Array, bias: Array) -> Array:
        """Return what a Conv gives, [places, outputs]."""
        windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(2, 3))
        return np.einsum("nchwij,ocij->nhwo", windows, weight).reshape(-1, len(weight)) + bias

    @pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
    @pytest.mark.parametrize("added", [False, True], ids=["bias in Conv", "bias added"])
    def test_the_data_behind_the_statistics_is_found_again(self, layout: str, added: bool) -> None:
        generator = np.random.default_rng(1)
        weight = generator.standard_normal((16, 3, 3, 3)).astype(np.float32)
        bias = generator.standard_normal(16).astype(np.float32)
        seen = self.outputs(self.real("NCHW"), weight, bias)
        constants = {
            "w": weight, "b": bias.reshape(-1, 1, 1) if added else bias, "one": np.ones(16, np.float32),
            "zero": np.zeros(16, np.float32), "mean": seen.mean(axis=0).astype(np.float32),
            "variance": seen.var(axis=0).astype(np.float32),
        }  # fmt: skip
        nodes = [] if layout == "NCHW" else [node("Transpose", "x", "t", perm=[0, 3, 1, 2])]
        source = "x" if layout == "NCHW" else "t"
        nodes += (
            [node("Conv", f"{source} w", "c"), node("Add", "c b", "d")]
            if added
            else [node("Conv", f"{source} w b", "d")]
        )
        nodes.append(node("BatchNormalization", "d one zero mean variance", "bn"))
        shape = (None, 3, 32, 32) if layout == "NCHW" else (None, 32, 32, 3)
        feeds, text = feeds_of(nodes, {"x": (FLOAT, shape)}, constants, count=64)
        assert text == "x: smooth random pictures (1/f) that meet the mean and variance of BatchNormalization 'bn'"
        drawn = np.concatenate([f["x"] for f in feeds])
        drawn = drawn if layout == "NCHW" else drawn.transpose(0, 3, 1, 2)
        # 64 pictures of which each has its own brightness and contrast: their mean is known to a sixteenth of the
        # deviation, and both the fit and the check draw; their deviation to about a tenth.
        np.testing.assert_allclose(drawn.mean(axis=(0, 2, 3)), self.MEAN, atol=self.DEVIATION / 4)
        np.testing.assert_allclose(drawn.std(axis=(0, 2, 3)), self.DEVIATION, rtol=0.2)
        again = self.outputs(drawn, weight, bias)
        np.testing.assert_allclose(again.mean(axis=0), seen.mean(axis=0), atol=np.abs(seen.std(axis=0)).max() / 4)
        np.testing.assert_allclose(again.std(axis=0), seen.std(axis=0), rtol=0.3)

    def test_the_constants_in_front_are_undone(self) -> None:
        one, zero = np.ones(2, np.float32), np.zeros(2, np.float32)
        mean, variance = np.array([3, -1], np.float32), np.array([4, 0.25], np.float32)
        constants = {
            "one": one,
            "zero": zero,
            "mean": mean,
            "variance": variance,
            "by": np.float32([2]),
            "off": np.float32([7]),
        }
        nodes = [
            node("Sub", "x off", "s"),
            node("Div", "s by", "d"),
            node("BatchNormalization", "d one zero mean variance", "bn"),
        ]
        feeds, _ = feeds_of(nodes, {"x": (FLOAT, (4096, 2))}, constants)
        seen = (feeds[0]["x"] - 7) / 2
        # The standard error of a mean of 4096 is a sixty-fourth of the deviation, that of the deviation smaller.
        np.testing.assert_allclose(seen.mean(axis=0), mean, atol=2 * 4 / 64)
        np.testing.assert_allclose(seen.std(axis=0), np.sqrt(variance), rtol=4 / 64)

    def test_features_in_front_of_a_gemm(self) -> None:
        generator = np.random.default_rng(0)
        weight = generator.standard_normal((32, 5)).astype(np.float32)
        constants = {
            "w": weight, "b": np.zeros(32, np.float32),
            "one": np.ones(32, np.float32), "zero": np.zeros(32, np.float32),
            "mean": weight @ np.float32([1, 2, 3, 4, 5]), "variance": 9 * np.square(weight).sum(axis=1),
        }  # fmt: skip
        nodes = [node("Gemm", "x w b", "g", transB=1), node("BatchNormalization", "g one zero mean variance", "bn")]
        feeds, _ = feeds_of(nodes, {"x": (FLOAT, (4096, None))}, constants)
        assert feeds[0]["x"].shape == (4096, 5)  # the weights tell the open axis
        # The ridge pulls the means by about a hundredth: 0.1 against 32 equations of the variance of the weights.
        np.testing.assert_allclose(feeds[0]["x"].mean(axis=0), [1, 2, 3, 4, 5], atol=0.3)
        np.testing.assert_allclose(feeds[0]["x"].std(axis=0), 3, rtol=0.1)

    def test_a_scale_that_nothing_tells_is_said(self) -> None:
        constants = {"w": np.ones((2, 3, 1, 1), np.float32)}
        feeds, text = feeds_of([node("Conv", "x w", "y")], {"x": (FLOAT, ("n", 3, "h", "w"))}, constants)
        assert text == "x: smooth random pictures (1/f) of mean 0 and standard deviation 1 (nothing tells the scale)"
        assert feeds[0]["x"].shape == (1, 3, 224, 224)
        assert np.abs(feeds[0]["x"]).max() <= EDGE


class TestPictures:
    INFO = TensorInfo("x", np.dtype(np.float32), (1, 3, 64, 64))

    def test_the_spectrum_falls_with_the_frequency(self) -> None:
        drawn = np.concatenate([unit(np.random.default_rng(i), self.INFO, (1, 3, 64, 64)) for i in range(32)])
        power = np.square(np.abs(np.fft.fft(drawn, axis=3))).mean(axis=(0, 1, 2))
        # An amplitude of 1/f in the plane is a power of about 1/f along a line; saturation whitens it a little.
        slope = np.polyfit(np.log(np.arange(2, 17)), np.log(power[2:17]), 1)[0]
        assert -1.6 < slope < -0.8
        assert 0.8 < drawn.std() < 1.2

    def test_the_channels_move_together(self) -> None:
        drawn = unit(np.random.default_rng(3), self.INFO, (1, 3, 64, 64))[0].reshape(3, -1)
        assert np.corrcoef(drawn)[np.triu_indices(3, 1)].min() > 0.6

    def test_normalization_in_the_graph_is_undone(self) -> None:
        constants = {
            "scale": np.float32(58), "mean": np.float32([123, 117, 104]).reshape(1, 3, 1, 1),
            "w": np.ones((2, 3, 1, 1), np.float32),
        }  # fmt: skip
        nodes = [node("Sub", "x mean", "s"), node("Div", "s scale", "d"), node("Conv", "d w", "y")]
        feeds, text = feeds_of(nodes, {"x": (FLOAT, (1, 3, 32, 32))}, constants, count=64)
        assert text == "x: smooth random pictures (1/f), normalized behind the constants of the graph"
        drawn = np.concatenate([f["x"] for f in feeds])
        np.testing.assert_allclose(drawn.mean(axis=(0, 2, 3)), [123, 117, 104], atol=58 / 4)
        np.testing.assert_allclose(drawn.std(axis=(0, 2, 3)), 58, rtol=0.2)

    @pytest.mark.parametrize(("kind", "low", "high"), [(TensorProto.UINT8, 1, 255), (TensorProto.INT8, -127, 127)])
    def test_bytes_are_pixels(self, kind: int, low: int, high: int) -> None:
        nodes = [node("Cast", "x", "y", to=FLOAT)]
        feeds, text = feeds_of(nodes, {"x": (kind, (1, 32, 32, 3))}, {}, count=16)
        assert text == "x: smooth random pictures (1/f)"
        drawn = np.stack([f["x"] for f in feeds])
        assert (int(drawn.min()), int(drawn.max())) == (low, high)  # saturated at both ends

    def test_the_range_of_a_quantizer_is_filled(self) -> None:
        constants = {"s": np.float32(0.5), "z": np.uint8(100)}
        feeds, text = feeds_of(
            [node("QuantizeLinear", "x s z", "y")], {"x": (FLOAT, (1, 3, 32, 32))}, constants, count=16
        )
        drawn = np.stack([f["x"] for f in feeds])
        assert text == "x: smooth random pictures (1/f) over the range of the QuantizeLinear, -50 to 77.5"
        assert (drawn.min(), drawn.max()) == (-50, 77.5)


class TestNumbers:
    def test_tokens_stay_in_the_table_they_look_up(self) -> None:
        nodes = [node("Cast", "ids", "c", to=TensorProto.INT32), node("Identity", "c", "i"), node("Gather", "t i", "y")]
        feeds, text = feeds_of(nodes, {"ids": (INT, ("batch", "time"))}, {"t": np.zeros((11, 2), np.float32)}, count=16)
        drawn = np.concatenate([f["ids"] for f in feeds])
        assert text == "ids: random rows of a table of 11"
        assert drawn.shape == (16, 64)
        assert set(np.unique(drawn)) == set(range(11))

    def test_the_inputs_of_a_transformer(self) -> None:
        nodes = [
            node("Gather", "words input_ids", "a"), node("Gather", "types token_type_ids", "b"),
            node("Gather", "places position_ids", "c"), node("Sum", "a b c", "d"),
            node("Cast", "attention_mask", "e", to=FLOAT), node("ReduceMax", "e", "f"), node("Mul", "d f", "g"),
        ]  # fmt: skip
        names = ("input_ids", "token_type_ids", "position_ids", "attention_mask")
        tables = {"words": np.zeros((9, 2), "f"), "types": np.zeros((2, 2), "f"), "places": np.zeros((20, 2), "f")}
        (feed,), _ = feeds_of(nodes, dict.fromkeys(names, (INT, ("batch", "sequence"))), tables)
        assert {a.shape for a in feed.values()} == {(1, 20)}  # no longer than there are positions
        assert feed["position_ids"].tolist() == [list(range(20))]
        assert np.unique(feed["attention_mask"]).tolist() == [1]
        assert np.unique(feed["token_type_ids"]).tolist() == [0]
        assert int(feed["input_ids"].max()) < 9

    def test_what_is_compared_with_constants_takes_them(self) -> None:
        nodes = [node("Equal", "rate k", "a"), node("Equal", "rate j", "b"), node("Or", "a b", "y")]
        constants = {"k": np.int64(16000), "j": np.int64(8000)}
        feeds, text = feeds_of(nodes, {"rate": (INT, ())}, constants, count=16)
        assert {int(f["rate"]) for f in feeds} == {8000, 16000}
        assert text == "rate: one of 8000, 16000, which the graph compares it with"

    def test_booleans_are_mixed_and_other_integers_small(self) -> None:
        nodes = [node("Cast", "flag", "a", to=INT), node("Add", "a n", "y")]
        feeds, _ = feeds_of(nodes, {"flag": (TensorProto.BOOL, (64,)), "n": (INT, (64,))}, {})
        assert 0 < feeds[0]["flag"].sum() < 64
        assert np.unique(feeds[0]["n"]).tolist() == [0, 1]


class TestOpenAxes:
    def shapes(self, **inputs: tuple[int, Shape]) -> dict[str, tuple[int, ...]]:
        nodes = [node("Shape", name, f"s_{name}") for name in inputs]
        (feed,), _ = feeds_of(nodes, inputs, {})
        return {name: array.shape for name, array in feed.items()}

    def test_a_cache_and_the_sequence_add_up(self) -> None:
        assert self.shapes(
            input_ids=(INT, ("batch", "sequence_length")),
            attention_mask=(INT, ("batch", "past_sequence_length + sequence_length")),
            past=(FLOAT, ("batch", 2, "past_sequence_length", 4)),
        ) == {"input_ids": (1, 64), "attention_mask": (1, 80), "past": (1, 2, 16, 4)}
        assert self.shapes(
            input_ids=(INT, ("batch", "sequence_length")),
            attention_mask=(INT, ("batch", "total_sequence_length")),
            past=(FLOAT, ("batch", 2, "past_sequence_length", 4)),
        ) == {"input_ids": (1, 64), "attention_mask": (1, 80), "past": (1, 2, 16, 4)}

    def test_a_signal_and_a_state_with_its_batch_further_in(self) -> None:
        assert self.shapes(input=(FLOAT, (None, None)), state=(FLOAT, (2, None, 128))) == {
            "input": (1, 512),
            "state": (2, 1, 128),
        }

    def test_an_input_of_unknown_rank_is_an_error(self) -> None:
        model, _ = model_of([node("Identity", "x", "y")], {"x": (FLOAT, (1,))}, {})
        with pytest.raises(CalibrationError, match="cannot make random data for input 'x'"):
            synthetic_feeds(model, [TensorInfo("x", np.dtype(np.float32), None)], 1)


def test_feeds_repeat_by_seed_and_carry_their_mark_through_a_split() -> None:
    model, infos = model_of([node("Identity", "x", "y")], {"x": (FLOAT, (1, 3, 16, 16))}, {})
    first, again = (synthetic_feeds(model, infos, 4, seed=3) for _ in range(2))
    other = synthetic_feeds(model, infos, 4, seed=4)
    assert [f["x"].tobytes() for f in first] == [f["x"].tobytes() for f in again] == [f["x"].tobytes() for f in first]
    assert len({f["x"].tobytes() for f in (*first, *other)}) == 8
    assert first.identity == again.identity != other.identity
    assert len(first) == 4
    split = first.split()
    assert split.ranges.synthetic == split.held_out.synthetic == first.synthetic
