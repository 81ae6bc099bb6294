"""torch.onnx in memory, and data loaders as calibration data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qcompiler
from qcompiler.errors import CalibrationError, ModelError
from qcompiler.ir.reader import read_model
from qcompiler.ir.serialize import to_bytes
from qcompiler.options import Options

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed, which torch.onnx needs")
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own


def network() -> Any:
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.AvgPool2d(8)]
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(8, 4)).eval()


class Pair(torch.nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(16, 32)

    def forward(self, left: Any, right: Any) -> Any:
        return self.first(left) + right


EXAMPLE = (torch.zeros(4, 3, 8, 8),)
STATIC = Options(recipe="int8-static", guard=False)


def images(count: int = 40) -> Any:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def export(module: Any, example: tuple[Any, ...]) -> Any:
    return torch.onnx.export(module, example, dynamo=True, verbose=False)


def test_a_program_in_memory_is_the_model_of_its_file(tmp_path: Path) -> None:
    program = export(network(), EXAMPLE)
    before = to_bytes(program.model)
    program.save(tmp_path / "m.onnx")
    feeds = [{program.model.graph.inputs[0].name: b.numpy()} for b in images().split(4)]
    from_memory = qcompiler.compile(program, recipe="int8-static", calibration=feeds, guard=False)
    from_file = qcompiler.compile(tmp_path / "m.onnx", recipe="int8-static", calibration=feeds, guard=False)
    assert from_memory.to_bytes() == from_file.to_bytes()
    assert {f for name, f in from_memory.decisions.forms.items() if "conv" in name.lower()} == {"static"}
    assert to_bytes(program.model) == before


def test_statistics_are_of_a_program_as_well() -> None:
    program = export(network(), EXAMPLE)
    loader = torch.utils.data.DataLoader(images(), batch_size=4)
    statistics = qcompiler.calibrate(program, loader)
    made = qcompiler.compile(program, recipe="int8-static", calibration=statistics, guard=False)
    assert {f for name, f in made.decisions.forms.items() if "conv" in name.lower()} == {"static"}


@pytest.mark.parametrize("kind", ["tensor", "pair with label", "dict with label", "list of tensors"])
def test_batches_of_every_kind_are_the_same_data(kind: str) -> None:
    from torch.utils.data import DataLoader, TensorDataset

    data = images()
    labels = torch.arange(len(data))
    source: Any = {
        "tensor": lambda: DataLoader(data, batch_size=4),
        "pair with label": lambda: DataLoader(TensorDataset(data, labels), batch_size=4),
        "dict with label": lambda: DataLoader(
            [{"input": x, "y": y} for x, y in zip(data, labels, strict=True)], batch_size=4
        ),
        "list of tensors": lambda: list(data.split(4)),
    }[kind]()
    from qcompiler.doors.torch import compile_module

    module = network()
    made = compile_module(module, EXAMPLE, source, STATIC, input_names=["input"])
    plain = [{"input": b.numpy()} for b in data.split(4)]
    expected = qcompiler.compile(
        torch.onnx.export(network(), EXAMPLE, input_names=["input"], dynamo=True, verbose=False),
        recipe="int8-static", calibration=plain, guard=False,
    )  # fmt: skip
    assert made.to_bytes() == expected.to_bytes()


def test_inputs_by_name_and_open_batches() -> None:
    from qcompiler.doors.torch import compile_module

    batch = torch.export.Dim("batch")
    example = {"left": torch.zeros(4, 16), "right": torch.zeros(4, 32)}
    data = [(torch.randn(n, 16), torch.randn(n, 32), torch.zeros(n)) for n in (4, 7, 4, 2, 5, 3)]
    shapes = {"left": {0: batch}, "right": {0: batch}}
    made = compile_module(Pair(), example, data, STATIC, dynamic_shapes=shapes)
    assert [v.name for v in made.model.graph.inputs] == ["left", "right"]
    assert not made.model.graph.inputs[0].shape.is_static()
    (found,) = made.session(threads=1).run(None, {"left": data[1][0].numpy(), "right": data[1][1].numpy()})
    assert found.shape == (7, 32)


PLAIN = Options(target="ort-x86", guard=False)


@pytest.mark.parametrize("fails", [False, True])
def test_every_part_of_a_module_keeps_its_mode(fails: bool) -> None:
    from qcompiler.doors.torch import compile_module

    module = network().train()
    module[1].eval()  # a BatchNorm that is frozen for fine-tuning
    modes = [part.training for part in module.modules()]
    assert sorted(set(modes)) == [False, True]
    statistics = module[1].running_mean.clone()
    if fails:
        with pytest.raises(ModelError):
            compile_module(module, (torch.zeros(4, 5, 8, 8),))
    else:
        made = compile_module(module, EXAMPLE, options=PLAIN)
        assert not [n for n in made.model.graph if n.op_type == "BatchNormalization" and len(n.outputs) > 1]
    assert [part.training for part in module.modules()] == modes
    assert torch.equal(module[1].running_mean, statistics)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_tensor_alone_is_the_first_input(rows: int) -> None:
    from qcompiler.doors.torch import compile_module

    example = torch.zeros(rows, 3, 8, 8)
    made = compile_module(network(), example, options=PLAIN)
    assert [v.shape.numpy() for v in made.model.graph.inputs] == [(rows, 3, 8, 8)]
    assert made.to_bytes() == compile_module(network(), (example,), options=PLAIN).to_bytes()


class Refuses(torch.nn.Module):  # type: ignore[misc, name-defined]
    def forward(self, x: Any) -> Any:
        raise ValueError("\n\x1b[31mno such thing\x1b[0m\nmore of it")


def test_a_reason_is_one_plain_line() -> None:
    from qcompiler.doors.torch import compile_module

    for module, example, reason in (
        (Refuses(), torch.zeros(1), "torch.onnx cannot export Refuses: ValueError: no such thing"),
        (network(), torch.zeros(4, 5, 8, 8), "torch.onnx cannot export Sequential: RuntimeError: "),
    ):
        with pytest.raises(ModelError) as caught:
            compile_module(module, (example,))
        text = str(caught.value)
        assert text.startswith(reason)
        assert text.isprintable()  # neither colours nor line breaks
    assert "5" in text, "the number of channels that does not fit"


def test_what_is_wrong_is_said() -> None:
    from qcompiler.doors.torch import compile_module

    with pytest.raises(ModelError, match=r"cannot export a dict: expected a torch\.nn\.Module"):
        compile_module({}, EXAMPLE)
    with pytest.raises(ModelError, match=r"torch\.onnx cannot export Sequential: "):
        compile_module(network(), (torch.zeros(4, 5, 8, 8),))
    with pytest.raises(CalibrationError, match=r"shape \[3, 3, 8, 8\], expected \[4, 3, 8, 8\]"):
        compile_module(network(), EXAMPLE, torch.utils.data.DataLoader(images(43), batch_size=4), STATIC)


def test_the_reader_knows_a_program_without_importing_torch(tmp_path: Path) -> None:
    code = (
        "import sys, onnx, onnx_ir, types\n"
        "from qcompiler.ir.reader import read_model\n"
        "P = type('ONNXProgram', (), {'__module__': 'torch.onnx'})\n"
        "p = P(); p.model = onnx_ir.Model(onnx_ir.Graph([], [], nodes=[], opset_imports={'': 21}), ir_version=10)\n"
        "assert read_model(p) is not p.model\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "False\n"


def test_weights_of_a_program_are_those_of_the_module_and_not_copied() -> None:
    module = network()
    program = export(module, EXAMPLE)
    held = [v.const_value for v in read_model(program).graph.initializers.values() if v.const_value is not None]
    weight = module[-1].weight.detach().numpy()
    assert any(np.shares_memory(t.numpy(), weight) for t in held if t.dtype.is_floating_point())
