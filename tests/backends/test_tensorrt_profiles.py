from pathlib import Path

import pytest

from qcompiler.backends.tensorrt.build import trtexec_line
from qcompiler.backends.tensorrt.profiles import settle_profiles, shape_text
from qcompiler.engine import ShapeRange
from qcompiler.errors import TargetError


def test_closed_inputs_need_no_profile() -> None:
    assert settle_profiles({"x": (1, 3, 8, 8)}, {}) == ({}, ())


def test_open_axes_get_the_sample_and_eight_times_it() -> None:
    found, notes = settle_profiles({"x": ("n", 3, None)}, {}, {"x": (4, 3, 10)})
    assert found == {"x": ShapeRange((1, 3, 1), (4, 3, 10), (32, 3, 80))}
    assert notes == ("x was built for the shapes 1x3x1..4x3x10..32x3x80; give --shapes x:... for others",)


def test_without_a_sample_the_batch_is_one() -> None:
    found, _ = settle_profiles({"x": (None, -1)}, {})
    assert found == {"x": ShapeRange((1, 1), (1, 64), (8, 512))}


def test_axes_of_one_name_get_one_range() -> None:
    given = {"ids": ShapeRange((2, 16), (2, 16), (4, 32))}
    found, notes = settle_profiles({"ids": ("batch", "time"), "mask": ("batch", "time")}, given)
    assert found["mask"] == given["ids"]
    assert len(notes) == 1


def test_a_sample_of_another_rank_is_not_used() -> None:
    found, _ = settle_profiles({"x": ("n", 3)}, {}, {"x": (4, 3, 10)})
    assert found["x"].best == (1, 3)


def test_ranges_that_do_not_fit_are_refused() -> None:
    dims = {"x": ("n", 3)}
    with pytest.raises(TargetError, match=r"shapes are given for 'y', but the model's inputs are x"):
        settle_profiles(dims, {"y": ShapeRange((1,), (1,), (1,))})
    with pytest.raises(TargetError, match=r"the shapes 1x4 of x do not fit: the model declares nx3"):
        settle_profiles(dims, {"x": ShapeRange((1, 4), (1, 4), (1, 4))})
    with pytest.raises(TargetError, match=r"do not fit: the model declares nx3"):
        settle_profiles(dims, {"x": ShapeRange((1,), (1,), (1,))})
    with pytest.raises(TargetError, match=r"expected least <= best <= most"):
        settle_profiles(dims, {"x": ShapeRange((4, 3), (2, 3), (8, 3))})


def test_shapes_are_written_as_they_are_given() -> None:
    assert shape_text(ShapeRange((1, 3), (8, 3), (8, 3))) == "1x3..8x3"
    assert shape_text(ShapeRange((2, 3), (2, 3), (2, 3))) == "2x3"


def test_the_command_is_quoted_for_a_shell() -> None:
    line = trtexec_line(Path("my model.onnx"), Path("m.plan"), {"x:0": ShapeRange((1, 3), (4, 3), (8, 3))})
    assert line == (
        "trtexec '--onnx=my model.onnx' --saveEngine=m.plan --skipInference "
        "'--minShapes='\"'\"'x:0'\"'\"':1x3' '--optShapes='\"'\"'x:0'\"'\"':4x3' '--maxShapes='\"'\"'x:0'\"'\"':8x3'"
    )
    assert trtexec_line(Path("m.onnx"), Path("m.plan")) == "trtexec --onnx=m.onnx --saveEngine=m.plan --skipInference"
    ids = {"a": ShapeRange((1, 2), (1, 2), (1, 4)), "b": ShapeRange((1,), (1,), (3,))}
    assert trtexec_line(Path("m.onnx"), Path("m.plan"), ids, "tensorrt_rtx") == (
        "tensorrt_rtx --onnx=m.onnx --saveEngine=m.plan --minShapes=a:1x2,b:1 --optShapes=a:1x2,b:1 "
        "--maxShapes=a:1x4,b:3"
    )
