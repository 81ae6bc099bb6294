"""Hugging Face Optimum: its documented flow with our quantizer writes the bytes of ``qcompiler compile``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qcompiler.errors import CalibrationError, PassError
from tests.doors.demo import BATCH, NAMES, Reference, compile_by_command

pytest.importorskip("optimum.onnxruntime", reason="optimum-onnx is not installed")
pytest.importorskip("datasets", reason="datasets is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # Optimum's and torch's own


def folder_of(reference: Reference, folder: Path) -> Path:
    """Return a folder as Optimum exports one: the model, its weights, its configuration."""
    from transformers import GPT2Config, ResNetConfig

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(reference.model, folder)
    for weights in reference.model.parent.glob("*.weights"):
        shutil.copy(weights, folder)
    (ResNetConfig() if "resnet" in reference.model.name else GPT2Config()).save_pretrained(folder)
    return folder


def rows_of(reference: Reference) -> Any:
    from datasets import Dataset

    columns = reference.rows
    count = len(next(iter(columns.values())))
    rows = [{name: c[i].tolist() for name, c in columns.items()} for i in range(count)]
    return Dataset.from_list([{**row, "label": 0} for row in rows])


def quantizer_of(folder: Path, file_name: str | None = None) -> Any:
    from qcompiler.doors.optimum import QCompilerQuantizer

    return QCompilerQuantizer.from_pretrained(folder, file_name=file_name)


@pytest.mark.parametrize("name", NAMES)
def test_fit_and_quantize_write_the_bytes_of_the_command(name: str, tmp_path: Path) -> None:
    from optimum.onnxruntime import AutoCalibrationConfig, AutoQuantizationConfig, ORTConfig

    reference = compile_by_command(name, tmp_path / "ref")
    quantizer = quantizer_of(folder_of(reference, tmp_path / "model"))
    data = quantizer.clean_calibration_dataset(rows_of(reference))
    assert "label" not in data.column_names
    config = AutoQuantizationConfig.avx512_vnni(is_static=True, per_channel=True)
    ranges = quantizer.fit(
        dataset=data,
        calibration_config=AutoCalibrationConfig.minmax(data),
        operators_to_quantize=config.operators_to_quantize,
        batch_size=BATCH[name],
    )
    out = quantizer.quantize(
        save_dir=tmp_path / "out",
        calibration_tensors_range=ranges,
        quantization_config=config,
        decisions=reference.decisions,
        guard=False,
    )
    assert out == tmp_path / "out"
    assert (out / f"{name}_quantized.onnx").read_bytes() == reference.compiled.read_bytes()
    files = {f.name for f in out.iterdir()}
    assert files == {
        f"{name}_quantized.onnx", f"{name}_quantized.decisions.json", f"{name}_quantized.report.json",
        "config.json", "ort_config.json",
    }  # fmt: skip
    assert ORTConfig.from_pretrained(out).quantization.is_static is True


def test_the_result_loads_as_optimum_s_model(tmp_path: Path) -> None:
    import torch
    from optimum.onnxruntime import ORTModelForCustomTasks

    import qcompiler

    reference = compile_by_command("digits_resnet", tmp_path / "ref")
    quantizer = quantizer_of(folder_of(reference, tmp_path / "model"))
    out = quantizer.quantize(save_dir=tmp_path / "out", calibration_tensors_range=str(reference.data), guard=False)
    loaded = ORTModelForCustomTasks.from_pretrained(out, file_name="digits_resnet_quantized.onnx")
    images = reference.rows["image"][:4]
    found = loaded(image=torch.from_numpy(images))["logits"].numpy()
    expected = qcompiler.load(reference.model, threads=1).run({"image": images})["logits"]
    assert np.array_equal(found.argmax(1), expected.argmax(1))
    assert not np.array_equal(found, expected)  # it is quantized


def test_a_model_of_optimum_s_is_taken_as_well(tmp_path: Path) -> None:
    from optimum.onnxruntime import ORTModelForCustomTasks

    reference = compile_by_command("digits_resnet", tmp_path / "ref")
    model = ORTModelForCustomTasks.from_pretrained(folder_of(reference, tmp_path / "m"), file_name="digits_resnet.onnx")
    quantizer = quantizer_of(model)  # type: ignore[arg-type]
    quantizer.quantize(save_dir=tmp_path / "out", calibration_tensors_range=str(reference.data), guard=False)
    assert (tmp_path / "out/digits_resnet_quantized.onnx").read_bytes() == reference.compiled.read_bytes()


def test_several_files_of_a_folder_are_quantized_by_name(tmp_path: Path) -> None:
    reference = compile_by_command("digits_resnet", tmp_path / "ref")
    folder = folder_of(reference, tmp_path / "model")
    for name in ("encoder_model.onnx", "decoder_model.onnx"):
        shutil.copy(reference.model, folder / name)
    (folder / "digits_resnet.onnx").unlink()
    with pytest.raises(RuntimeError, match="too many ONNX model files"):
        quantizer_of(folder)
    for name in ("encoder_model", "decoder_model"):
        quantizer = quantizer_of(folder, f"{name}.onnx")
        quantizer.quantize(save_dir=tmp_path / "out", calibration_tensors_range=str(reference.data), guard=False)
        assert (tmp_path / f"out/{name}_quantized.onnx").read_bytes() == reference.compiled.read_bytes()


def test_feeds_may_come_as_dicts_and_in_parts(tmp_path: Path) -> None:
    reference = compile_by_command("digits_resnet", tmp_path / "ref")
    images = reference.rows["image"]
    feeds = [{"image": images[i : i + 32]} for i in range(0, len(images), 32)]
    quantizer = quantizer_of(folder_of(reference, tmp_path / "model"))
    quantizer.partial_fit(feeds[:2])
    quantizer.partial_fit(feeds[2:])
    quantizer.quantize(save_dir=tmp_path / "list", file_suffix=None, guard=False)
    assert (tmp_path / "list/digits_resnet.onnx").read_bytes() == reference.compiled.read_bytes()
    rows = rows_of(reference)
    quantizer = quantizer_of(tmp_path / "model")
    quantizer.partial_fit(rows.select(range(64)), batch_size=32)
    with pytest.raises(CalibrationError, match="batch_size is 1, before it was 32"):
        quantizer.partial_fit(rows)
    quantizer.partial_fit(rows.select(range(64, len(rows))), batch_size=32)
    quantizer.quantize(save_dir=tmp_path / "rows", guard=False)
    assert (tmp_path / "rows/digits_resnet_quantized.onnx").read_bytes() == reference.compiled.read_bytes()


def test_dynamic_quantization_needs_no_data_and_excluded_nodes_stay_float(tmp_path: Path) -> None:
    from optimum.onnxruntime import AutoQuantizationConfig

    reference = compile_by_command("code_lm", tmp_path / "ref")
    folder = folder_of(reference, tmp_path / "model")
    config = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=False)
    first = quantizer_of(folder).quantize(save_dir=tmp_path / "a", quantization_config=config, guard=False)
    forms = json.loads((first / "code_lm_quantized.decisions.json").read_text())["forms"]
    assert set(forms.values()) == {"dynamic"}
    nodes = onnx.load(reference.model, load_external_data=False).graph.node
    others = [next(n.name for n in nodes if n.op_type == op) for op in ("LayerNormalization", "Softmax", "Reshape")
              if any(n.op_type == op and n.name for n in nodes)]  # fmt: skip
    assert others
    assert not set(others) & set(forms)  # they are in no group: Optimum's preprocessors name such nodes
    config.nodes_to_exclude = [sorted(forms)[0], *others]
    second = quantizer_of(folder).quantize(save_dir=tmp_path / "b", quantization_config=config, guard=False)
    left = json.loads((second / "code_lm_quantized.decisions.json").read_text())["forms"]
    assert set(forms) - set(left) == {config.nodes_to_exclude[0]}
    onnx.checker.check_model(second / "code_lm_quantized.onnx")
    config.nodes_to_exclude = [sorted(forms)[0] + "x"]
    with pytest.raises(PassError, match=f"nodes_to_exclude names '{sorted(forms)[0]}x', which no node is; there are: "):
        quantizer_of(folder).quantize(save_dir=tmp_path / "c", quantization_config=config, guard=False)


def test_nodes_that_a_preprocessor_of_optimum_excludes_stay_float(tmp_path: Path) -> None:
    from optimum.onnxruntime import AutoQuantizationConfig
    from optimum.onnxruntime.preprocessors import QuantizationPreprocessor
    from optimum.onnxruntime.preprocessors.passes import ExcludeLayerNormNodes, ExcludeNodeAfter

    nodes = [onnx.helper.make_node("ReduceMean", ["x"], ["m"], name="mean", axes=[-1]),
             onnx.helper.make_node("Sub", ["x", "m"], ["s"], name="sub"),
             onnx.helper.make_node("MatMul", ["s", "w"], ["p"], name="first"),
             onnx.helper.make_node("Tanh", ["p"], ["t"], name="tanh"),
             onnx.helper.make_node("MatMul", ["t", "w"], ["y"], name="second")]  # fmt: skip
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", 64]) for n in "xy")
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], [onnx.numpy_helper.from_array(weight, "w")])
    folder = tmp_path / "model"
    folder.mkdir()
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8),
              folder / "model.onnx")  # fmt: skip
    reference = compile_by_command("digits_resnet", tmp_path / "ref")
    shutil.copy(folder_of(reference, tmp_path / "demo") / "config.json", folder)
    preprocessor = QuantizationPreprocessor()
    preprocessor.register_pass(ExcludeLayerNormNodes())
    preprocessor.register_pass(ExcludeNodeAfter("ReduceMean", "Sub"))
    preprocessor.register_pass(ExcludeNodeAfter("Tanh", "MatMul"))
    assert preprocessor.collect(folder / "model.onnx")[1] == {"sub", "second"}
    config = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=False)
    out = quantizer_of(folder).quantize(config, tmp_path / "out", preprocessor=preprocessor, guard=False)
    assert json.loads((out / "model_quantized.decisions.json").read_text())["forms"] == {"first": "dynamic"}


def test_what_cannot_be_honoured_is_refused(tmp_path: Path) -> None:
    from optimum.onnxruntime import AutoQuantizationConfig

    reference = compile_by_command("digits_resnet", tmp_path / "ref")
    quantizer = quantizer_of(folder_of(reference, tmp_path / "model"))
    config = AutoQuantizationConfig.avx512_vnni(is_static=True, nodes_to_quantize=["conv1"])
    with pytest.raises(PassError, match="nodes_to_quantize names 'conv1'; exclude the others instead"):
        quantizer.quantize(save_dir=tmp_path / "out", quantization_config=config)
    with pytest.raises(PassError, match="quantize needs save_dir"):
        quantizer.quantize()
    with pytest.raises(CalibrationError, match="there is no calibration data: call fit"):
        quantizer.compute_ranges()
