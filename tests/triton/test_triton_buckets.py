"""Buckets: few plans for many lengths, and the same results."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx import parser

torch = pytest.importorskip("torch", reason="the executor needs torch")

from qcompiler.backends.triton.buckets import Buckets, parse_buckets  # noqa: E402
from qcompiler.backends.triton.engine import BUCKETS, TritonEngine  # noqa: E402
from qcompiler.backends.triton.program import Port  # noqa: E402
from qcompiler.errors import CalibrationError, ModelError, TargetError  # noqa: E402
from tests.triton import models  # noqa: E402
from tests.triton.test_triton_attention import attention  # noqa: E402
from tests.triton.test_triton_attention import feeds as attention_feeds  # noqa: E402


def test_rows_come_back_as_they_are_without_buckets() -> None:
    made = models.compiled(models.mlp_block(), models.feeds(4, 2, 5, 32))
    plain = TritonEngine("cpu").load(made.model)
    padded = TritonEngine("cpu", "n=4,8 t=6,12").load(made.model)
    for rows, tokens in ((1, 1), (2, 5), (3, 6), (5, 7), (8, 12)):
        feed = models.feeds(1, rows, tokens, 32)[0]
        found = padded.run(feed)["y"]
        assert found.shape == (rows, tokens, 16)
        np.testing.assert_array_equal(found, plain.run(feed)["y"])
    assert len(plain.executor.plans) == 5
    assert sorted(dict(key)["x"] for key in padded.executor.plans) == [(4, 6, 32), (8, 12, 32)]


def test_lengths_beyond_the_last_bucket_run_as_they_are() -> None:
    made = models.compiled(models.mlp_block(), models.feeds(4, 2, 5, 32))
    runner = TritonEngine("cpu", "n=2").load(made.model)
    feed = models.feeds(1, 3, 4, 32)[0]
    assert runner.run(feed)["y"].shape == (3, 4, 16)
    assert [dict(key)["x"] for key in runner.executor.plans] == [(3, 4, 32)]


def test_tensors_come_back_as_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    made = models.compiled(models.mlp_block(), models.feeds(4, 2, 5, 32))
    monkeypatch.setenv(BUCKETS, "n=8")
    found = TritonEngine("cpu").load(made.model).run({"x": torch.ones(3, 2, 32)})["y"]
    assert isinstance(found, torch.Tensor)
    assert found.shape == (3, 2, 16)
    assert found.is_contiguous()


def test_batches_of_attentions_are_independent() -> None:
    made = models.compiled(attention(), attention_feeds())
    feed = attention_feeds(3, 7, 1)[0]
    found = TritonEngine("cpu", "n=4").load(made.model).run(feed)["y"]
    np.testing.assert_array_equal(found, TritonEngine("cpu").load(made.model).run(feed)["y"])


def test_what_cannot_be_cut_back_is_refused() -> None:
    body = "g (float[n, 4] x) => (float[m] y) { y = Flatten <axis = 0> (x) }"
    text = f'<ir_version: 10, opset_import: ["" : 21]> {body}'
    model = ir.from_proto(parser.parse_model(text))
    with pytest.raises(ModelError, match=r"output y has the shape .* nobody knows where to cut it"):
        TritonEngine("cpu", "n=8").load(model)
    with pytest.raises(ModelError, match="no input has an axis 'time'; expected some of n"):
        TritonEngine("cpu", "time=8").load(model)
    assert TritonEngine("cpu").load(model).buckets == Buckets()


def test_one_axis_has_one_length() -> None:
    ports = [Port("a", "float32", ("n", 2)), Port("b", "float32", ("n",))]
    buckets = Buckets({"n": (4,)})
    filled, true = buckets.fill({"a": torch.ones(3, 2), "b": torch.ones(3)}, ports)
    assert [tuple(t.shape) for t in filled.values()] == [(4, 2), (4,)]
    assert filled["a"][3].tolist() == [0.0, 0.0]
    assert true == {"n": 3}
    with pytest.raises(CalibrationError, match="axis n has the lengths 3 and 2 in one feed"):
        buckets.fill({"a": torch.ones(3, 2), "b": torch.ones(2)}, ports)


@pytest.mark.parametrize("text", ["batch", "batch=", "=4", "n=4,x", "n=0", "n=4 n=8"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(TargetError, match="expected an axis and lengths, such as"):
        parse_buckets(text)


def test_lengths_are_sorted() -> None:
    assert parse_buckets("n=32,1,8 time=64") == Buckets({"n": (1, 8, 32), "time": (64,)})
    assert parse_buckets("") == Buckets()
