"""The torch functions against the onnx package's own cases of each operator: all of them."""

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch", reason="the torch functions need torch")

from qcompiler.backends.triton.executor import Executor  # noqa: E402
from qcompiler.backends.triton.operators import TORCH_OPERATORS  # noqa: E402
from qcompiler.backends.triton.program import build_program  # noqa: E402
from qcompiler.backends.triton.tensors import to_numpy  # noqa: E402
from qcompiler.backends.triton.torch_ops.catalog import FUNCTIONS  # noqa: E402
from tests.triton.node_cases import Case, cases  # noqa: E402

CASES = list(cases())
_UNIT = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Distance of neighbours at 1."""


def test_the_list_of_names_is_that_of_the_functions() -> None:
    assert sorted(TORCH_OPERATORS) == sorted(FUNCTIONS)


def test_most_cases_of_the_package_run() -> None:
    assert sum(not why for _, why in CASES) > 1300


def _differs(case: Case) -> str:
    found = Executor(build_program(ir.from_proto(case.model))).run(case.feeds)
    for name, wanted in case.wanted.items():
        made = to_numpy(found[name])
        if made.dtype != wanted.dtype or made.shape != wanted.shape:
            return f"{case.name}: {made.dtype}{made.shape} for {wanted.dtype}{wanted.shape}"
        unit = _UNIT.get(wanted.dtype.name, 0.0)
        close = np.allclose(
            made.astype(np.float64), wanted.astype(np.float64), rtol=max(case.rtol, 4 * unit),
            atol=max(case.atol, 1e-5, unit / 2), equal_nan=True,
        )  # fmt: skip
        if not close:
            return f"{case.name}: {name} differs"
    return ""


@pytest.mark.parametrize("letter", sorted({case.name[5] for case, why in CASES if not why}))
def test_cases(letter: str) -> None:
    with np.errstate(all="ignore"):
        wrong = [_differs(case) for case, why in CASES if not why and case.name[5] == letter]
    assert [text for text in wrong if text] == []
