"""``qcompiler compile`` from end to end on a small model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from qcompiler.search.quality import sqnr_db


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


def strict(text: str) -> Any:
    """Read JSON without the extensions that Python alone understands."""

    def no(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=no)


def test_without_guard_the_recipe_decides_and_bytes_repeat(place: Any, call: Any) -> None:
    first, second = place.folder / "a.onnx", place.folder / "b.onnx"
    for output in (first, second):
        done = call("compile", place.model, "-o", output, "--calibration", place.feeds, "--no-guard")
        assert (done.code, done.stderr) == (0, "")
    assert first.read_bytes() == second.read_bytes()
    records = [(place.folder / f"{n}.decisions.json").read_text() for n in "ab"]
    assert records[0] == records[1]
    assert set(strict(records[0])["forms"].values()) == {"dynamic"}
    assert len(first.read_bytes()) < 0.5 * len(place.model.read_bytes())
    x = np.load(place.feeds)["x"][:32]
    wanted, found = (session(p).run(["y"], {"x": x})[0] for p in (place.model, first))
    assert sqnr_db(wanted, found) > 25


def test_decisions_repeat_the_bytes(place: Any, call: Any) -> None:
    done = call("compile", place.model, "-o", place.output, "--calibration", place.feeds)
    assert (done.code, done.stderr) == (0, "")
    record = place.folder / "out.decisions.json"
    again = place.folder / "again.onnx"
    done = call("compile", place.model, "-o", again, "--calibration", place.feeds, "--decisions", record)
    assert (done.code, done.stderr) == (0, "")
    assert again.read_bytes() == place.output.read_bytes()
    assert strict((place.folder / "again.decisions.json").read_text()) == strict(record.read_text())
    # The record may be the one that is replaced.
    before = record.read_bytes()
    done = call("compile", place.model, "-o", place.output, "--calibration", place.feeds, "--decisions", record)
    assert (done.code, record.read_bytes()) == (0, before)


def test_decisions_of_other_weights_are_told(place: Any, call: Any) -> None:
    done = call("compile", place.model, "-o", place.output, "--calibration", place.feeds, "--no-guard", "-q")
    assert (done.code, done.stdout, done.stderr) == (0, "", "")
    model = onnx.load(place.model)
    model.graph.initializer[1].raw_data = np.zeros(64, np.float32).tobytes()
    onnx.save(model, place.model)
    record = place.folder / "out.decisions.json"
    done = call("compile", place.model, "-o", place.output, "--calibration", place.feeds, "--decisions", record, "-q")
    assert done.code == 0
    assert "the decisions record was made for a model of digest" in done.stderr


def test_a_saved_model_runs_without_the_compiler(place: Any, call: Any) -> None:
    assert call("compile", place.model, "-o", place.output, "--calibration", place.feeds, "--no-guard").code == 0
    code = (
        "import sys; sys.modules['qcompiler'] = None\n"
        "import numpy, onnxruntime\n"
        f"s = onnxruntime.InferenceSession({str(place.output)!r}, providers=['CPUExecutionProvider'])\n"
        "print(s.run(['y'], {'x': numpy.ones((3, 64), numpy.float32)})[0].shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=place.folder)
    assert done.stdout == "(3, 16)\n"


def test_a_process_compiles(place: Any) -> None:
    command = [
        sys.executable,
        "-m",
        "qcompiler",
        "compile",
        place.model,
        "-o",
        place.output,
        "--no-guard",
        "--calibration",
    ]
    done = subprocess.run([*command, place.feeds], capture_output=True, text=True, check=True, cwd=place.folder)
    assert done.stderr == ""
    assert "2 planned, 2 fused, 0 missed" in done.stdout
    assert f"wrote {place.output}" in done.stdout


def test_the_summary_and_the_report(place: Any, call: Any) -> None:
    report = place.folder / "report.json"
    done = call("compile", place.model, "-o", place.output, "--calibration", place.feeds, "--report", report)
    assert done.code == 0
    data = strict(report.read_text())
    assert {"proof", "sqnr_db", "bytes_before", "bytes_after", "speedup", "integer_share", "passes"} <= set(data)
    assert data["bytes_after"] == len(place.output.read_bytes())
    assert data["bytes_before"] == len(place.model.read_bytes())
    assert list(data["sqnr_db"]) == ["y"]
    head, *_ = done.stdout.splitlines()
    assert head == f"{place.model} -> {place.output}"
    for part in ("target", "speed", "size", "integers", "accuracy  y:", "fusions", "groups"):
        assert part in done.stdout
    assert done.stdout.rstrip().endswith(f"wrote {report}")
    floats = [g for g in data["groups"] if g["form"] == "float"]
    assert all(g["why"] for g in data["groups"])
    assert bool(floats) == ("  float" in done.stdout)


def test_without_data_only_dynamic_forms(place: Any, call: Any) -> None:
    done = call("compile", place.model, "-o", place.output, "--no-guard")
    assert done.code == 0
    assert "warning: no calibration data" in done.stdout
    assert "accuracy  not measured" in done.stdout
    assert operators(place.output) & {"DynamicQuantizeLinear", "DynamicQuantizeMatMul"}


def test_random_data_on_request_only(place: Any, call: Any) -> None:
    done = call("compile", place.model, "-o", place.output, "--random-calibration", 3, "--no-guard", "--quiet")
    assert (done.code, done.stdout) == (0, "")
    assert done.stderr.startswith("warning: calibrated with random data")


def test_forced_forms_of_the_output(place: Any, call: Any) -> None:
    made = {}
    for emit in ("qdq", "qoperator"):
        arguments = ("--recipe", "int8-static", "--emit", emit, "--no-guard", "--calibration", place.feeds)
        assert call("compile", place.model, "-o", place.output, *arguments).code == 0
        made[emit] = operators(place.output)
    assert "DequantizeLinear" in made["qdq"]
    assert not made["qdq"] & {"MatMulIntegerToFloat", "QGemm", "DynamicQuantizeMatMul"}
    assert made["qoperator"] & {"MatMulIntegerToFloat", "QGemm", "DynamicQuantizeMatMul"}


def test_opset_of_the_output(place: Any, call: Any) -> None:
    arguments = ("--no-guard", "--calibration", place.feeds, "--recipe", "int8-static", "--opset")
    versions = []
    for wanted in (17, 22):
        done = call("compile", place.model, "-o", place.output, *arguments, wanted)
        assert (done.code, done.stderr) == (0, "")
        versions += [o.version for o in onnx.load(place.output).opset_import if not o.domain]
        session(place.output)
    assert versions == [17, 22]


def test_an_override_pins_a_group(place: Any, call: Any) -> None:
    file = place.folder / "o.toml"
    file.write_text('[[override]]\nmatch = "/second/*"\nform = "float"\n')
    report = place.folder / "r.json"
    arguments = ("--override", file, "--no-guard", "--calibration", place.feeds, "--report", report)
    assert call("compile", place.model, "-o", place.output, *arguments).code == 0
    forms = {g["group"]: g["form"] for g in strict(report.read_text())["groups"]}
    assert sorted(forms.values()) == ["dynamic", "float"]
    assert forms["/second/MatMul"] == "float"


def test_shapes_close_axes(place: Any, call: Any) -> None:
    done = call(
        "compile", place.model, "-o", place.output, "--shapes", "x:8x64", "--no-guard", "--calibration", place.feeds
    )
    assert done.code == 0
    assert session(place.output).get_inputs()[0].shape == [8, 64]


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_metric_is_measured(place: Any, call: Any, calibrated: bool) -> None:
    """The share of rows whose arg-max is that of the float model; a budget on it holds with and without calibration."""
    wanted = session(place.model).run(["y"], {"x": np.load(place.feeds)["x"]})[0].argmax(-1)
    np.save(place.folder / "wanted.npy", wanted)
    (place.folder / "score.py").write_text(
        "from pathlib import Path\nimport numpy as np\n"
        "WANTED = np.load(Path(__file__).parent / 'wanted.npy')\n"
        "def top1(outputs, feeds):\n"
        "    found = np.concatenate([o['y'] for o in outputs]).argmax(-1)\n"
        "    assert len(found) == sum(len(f['x']) for f in feeds)\n"
        "    return (found == WANTED).mean()\n"
    )
    report = place.folder / "r.json"
    arguments = ["--metric", f"{place.folder}/score.py:top1", "--evaluation", place.feeds, "--budget", "drop<=0.1pt"]
    arguments += ["--calibration", place.feeds] if calibrated else []
    done = call("compile", place.model, "-o", place.output, *arguments, "--report", report)
    assert (done.code, done.stderr) == (0, "")
    assert strict(report.read_text())["metric"] >= 0.999
    assert "metric" in done.stdout


def test_a_dump_can_be_inspected(place: Any, call: Any) -> None:
    dump = place.folder / "new" / "dump"
    arguments = ("--dump", dump, "--no-guard", "--calibration", place.feeds)
    assert call("compile", place.model, "-o", place.output, *arguments).code == 0
    shown = call("inspect", dump)
    assert shown.code == 0
    for name in ("canonicalize", "plan-quantization", "insert-qdq", "fuse-qdq", "lower-onnxruntime"):
        assert name in shown.stdout
    assert "MatMul" in call("inspect", dump, "--stage", 0).stdout
    assert "+" in call("inspect", dump, "--diff", 7).stdout
    assert call("inspect", dump, "--stage", 99).code == 2


def test_an_existing_output_is_replaced(place: Any, call: Any) -> None:
    place.output.write_bytes(b"old")
    assert call("compile", place.model, "-o", place.output, "--calibration", place.feeds, "--no-guard").code == 0
    assert operators(place.output)
    assert sorted(place.files()) == ["feeds.npz", "model.onnx", "out.decisions.json", "out.onnx"]


def test_external_weights_from_another_folder(place: Any, call: Any) -> None:
    plain = place.folder / "plain.onnx"
    assert call("compile", place.model, "-o", plain, "--calibration", place.feeds, "--no-guard").code == 0
    onnx.save(onnx.load(place.model), place.model, save_as_external_data=True, location="w.bin", size_threshold=0)
    done = call("compile", place.model, "-o", place.output, "--calibration", place.feeds, "--no-guard")
    assert (done.code, done.stderr) == (0, "")
    assert place.output.read_bytes() == plain.read_bytes()
