"""random_feeds: arrays of the right type and shape for every kind of input."""

import numpy as np
import pytest

from qcompiler.calibration.readers import random_feeds
from qcompiler.engine import TensorInfo


@pytest.mark.parametrize("kind", ["float32", "float16", "int64", "uint8", "bool"])
@pytest.mark.parametrize(("shape", "made"), [((), ()), ((0, 3), (0, 3)), (("n", None, 2), (1, 1, 2))])
def test_shapes_and_types(kind, shape, made):
    (feed,) = random_feeds([TensorInfo("x", np.dtype(kind), shape)], 1)
    assert isinstance(feed["x"], np.ndarray)
    assert (feed["x"].dtype, feed["x"].shape) == (np.dtype(kind), made)


def test_a_seed_gives_the_same_feeds():
    info = [TensorInfo("x", np.dtype(np.float32), (2, 3))]
    first, second, other = (random_feeds(info, 2, seed) for seed in (4, 4, 5))
    assert all(np.array_equal(a["x"], b["x"]) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[0]["x"], other[0]["x"])
