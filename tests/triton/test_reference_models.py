"""Reference models on the CPU references: every step against NumPy and ONNX Runtime, and the task's metric."""

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the executor needs torch")

from qcompiler.backends.tensorrt.backend import PlainOrtEngine  # noqa: E402
from qcompiler.backends.triton.engine import TritonEngine  # noqa: E402
from qcompiler.backends.triton.executor import Executor  # noqa: E402
from qcompiler.backends.triton.kernel_calls import kernel_call, output_names  # noqa: E402
from qcompiler.backends.triton.program import KERNEL, Step, build_program  # noqa: E402
from qcompiler.backends.triton.tensors import to_numpy, to_torch  # noqa: E402
from qcompiler.kernels.catalog import reference_of  # noqa: E402
from qcompiler.kernels.epilogue.contract import PIECEWISE  # noqa: E402
from tests.triton import reference_models as references  # noqa: E402
from tests.triton.reference_models import FOLDER, HEAVY, LIGHT, SWEEP, Built  # noqa: E402

pytestmark = pytest.mark.skipif(not (FOLDER / "load.py").is_file(), reason="the reference models are not here")
MODELS = LIGHT + (HEAVY if os.environ.get(SWEEP) == "all" else ())
POINTS = 0.002
"""What a metric of the executor may differ from ONNX Runtime's on the same graph."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Let torch sum floats in one order, however many processors there are and whatever ran before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def built(name: str) -> Built:
    return references.build(name)


@pytest.mark.parametrize("name", MODELS)
def test_planned_fusions_are_kernels(name: str) -> None:
    proof = built(name).made.report.proof
    missed = {miss.kind: miss.reason for miss in proof.missed}
    # The quantized model brings a Softmax between Q/DQ of its own.
    assert missed == ({"Softmax": "no-kernel"} if name == "resnet8_cifar10_int8" else {})
    assert len(proof.fused) == proof.planned - len(missed)
    assert proof.planned >= 6


@pytest.mark.parametrize("name", MODELS)
def test_steps_are_within_one_of_onnx_runtime(name: str) -> None:
    found = built(name)
    gaps = references.steps_module().compare_steps(found.made.model, found.twin, found.subject.evals[:1])
    assert [g for g in gaps if g.more] == []
    assert sum(g.one for g in gaps) <= 1e-3 * sum(g.values for g in gaps)
    for gap in gaps:
        # An average is exact here and a sum of floats there, which breaks a tie either way: a few of every hundred.
        ties = 0.02 if "pool" in gap.step.lower() else 0.0
        assert gap.one <= max(1, (1e-3 + ties) * gap.values), gap


@pytest.mark.parametrize("name", MODELS)
def test_the_metric_is_onnx_runtimes(name: str) -> None:
    """Within 0.2 points, or as far as ONNX Runtime's own metric moves when its inputs move by a millionth."""
    found = built(name)
    ours = found.metric(TritonEngine("cpu").load(found.made.model))
    theirs = found.metric(PlainOrtEngine().load(found.twin))
    nudged: list[dict[str, float]] = []
    if ours != pytest.approx(theirs, abs=POINTS + 1e-9):
        nudge = references.steps_module().nudged
        nudged = [found.metric(nudge(found.twin, factor)) for factor in (1 - 1e-6, 1 + 1e-6)]
    for key, value in theirs.items():
        moved = max((abs(other[key] - value) for other in nudged), default=0.0)
        assert ours[key] == pytest.approx(value, abs=POINTS + moved + 1e-9), key


@pytest.mark.parametrize("name", ["mnist_cnn_opset8", "resnet8_cifar10", "resnet8_cifar10_int8"])
def test_integer_steps_are_numpys_bit_for_bit(name: str) -> None:
    found = built(name)
    executor = Executor(build_program(found.made.model))
    feed = {n: a[:1] for n, a in found.subject.evals[0].items()}
    values = {n: to_torch(a) for n, a in feed.items()}
    prepared = executor.prepare({n: tuple(v.shape) for n, v in values.items()})
    values |= prepared.constants
    prepared.views.clear()
    compared = 0
    for step in prepared.plan.steps:
        executor.execute(step, values, prepared)
        compared += _is_numpys(step, executor, values)
    assert compared >= 4


def _is_numpys(step: Step, executor: Executor, values: dict[str, torch.Tensor]) -> bool:
    """Check a step with an exact result against its kernel's NumPy reference; return whether it is such."""
    if step.kind != KERNEL or step.attributes.get("activation", "none") not in PIECEWISE:
        return False
    if step.operator not in ("int8_matmul", "int8_conv", "pointwise"):
        return False
    known = {**executor.weights, **values}
    inputs = {a: known[n].contiguous() for a, n in zip(step.arguments, step.inputs, strict=True)}
    outputs = {output_names(step)[0]: values[step.outputs[0]].contiguous()}
    call = kernel_call(step, inputs, outputs)
    assert call is not None
    given = {n: to_numpy(t) if isinstance(t, torch.Tensor) else t for n, t in call.tensors.items() if n != "out"}
    wanted = reference_of(call.contract.name).reference(given, call.options)["out"]
    np.testing.assert_array_equal(to_numpy(call.tensors["out"]), wanted, err_msg=step.name)
    return True


INTERPRETED = """
import sys
import numpy as np
from qcompiler.backends.triton.engine import TritonEngine
feed = dict(np.load(sys.argv[2]))
runs = [TritonEngine(device).load(sys.argv[1]).run(feed) for device in ("cpu", "interpreter")]
for name, wanted in runs[0].items():
    print(float(np.abs(wanted - runs[1][name]).max() / np.ptp(wanted)))
"""


@pytest.mark.parametrize("name", ["resnet8_cifar10", "vit_cifar10"])
def test_the_real_kernels_give_the_same_interpreted(name: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="interpreting needs triton")
    found = built(name)
    found.made.save(tmp_path / "m.qc")
    np.savez(tmp_path / "feed.npz", **{n: a[:1] for n, a in found.subject.evals[0].items()})
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, str(tmp_path / "m.qc"), str(tmp_path / "feed.npz")],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Only what a device computes by functions of its own (erf, exp) may fall to the other side of a tie.
    assert [float(line) for line in done.stdout.split()] == pytest.approx([0.0], abs=2 / 255)
