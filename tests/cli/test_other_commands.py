"""``opt``, ``bench``, the lists, ``demo``, progress and the summary's parts."""

import io
import json
import re
from pathlib import Path
from typing import Any

import onnx
import pytest
from rich.console import Console

from qcompiler import __version__
from qcompiler.cli_options import parse_shape_ranges, parse_shapes
from qcompiler.cli_progress import progress_lines
from qcompiler.cli_show import float_reasons, size_text
from qcompiler.engine import ShapeRange
from qcompiler.errors import ModelError
from qcompiler.report.report import GroupReport

FULL = "canonicalize,plan-quantization{matmul=static-float},insert-qdq,fuse-qdq,lower-onnxruntime"

BROKEN = '''
from dataclasses import dataclass
import onnx_ir as ir
from qcompiler.pipeline.base import Pass

@dataclass(frozen=True)
class SpoilBias(Pass):
    """Multiply the bias of a Gemm, which no pass may."""

    factor: float = 1.0
    crash: bool = False

    def run(self, state):
        if self.crash:
            raise RuntimeError("broken on purpose")
        changes = 0
        for node in list(state.model.graph):
            if node.op_type in ("Gemm", "Add") and state.allow("spoil-bias", node):
                bias = node.inputs[-1]
                new = ir.tensor(bias.const_value.numpy() * self.factor, name=bias.name + "_spoilt")
                value = ir.Value(name=new.name, const_value=new, type=bias.type, shape=bias.shape)
                state.model.graph.register_initializer(value)
                node.replace_input_with(len(node.inputs) - 1, value)
                changes += 1
        return changes
'''


@pytest.fixture
def broken(place: Any) -> Path:
    file: Path = place.folder / "broken.py"
    file.write_text(BROKEN)
    return file


# ---- opt ----------------------------------------------------------------------------------------------------------


def test_opt_runs_a_pipeline(place: Any, call: Any) -> None:
    done = call("opt", place.model, "--passes", FULL, "--calibration", place.feeds, "-o", place.output, "--numerics")
    assert (done.code, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()[1:6]] == FULL.split(",")
    assert "MatMulIntegerToFloat" in {n.op_type for n in onnx.load(place.output).graph.node}
    assert sorted(place.files()) == ["feeds.npz", "model.onnx", "out.onnx"]


def test_opt_prints_the_graph(place: Any, call: Any) -> None:
    done = call("opt", place.model, "--passes", "canonicalize", "--print")
    assert done.code == 0
    assert "Gemm" in done.stdout
    assert "/first/Add" in done.stdout
    assert call("opt", place.model, "--passes", "canonicalize", "--print").stdout == done.stdout


def test_opt_without_statistics_plans_dynamic_forms_only(place: Any, call: Any) -> None:
    done = call("opt", place.model, "--passes", "canonicalize,plan-quantization,insert-qdq", "--print")
    assert done.code == 0
    assert "DynamicQuantizeLinear" in done.stdout


def test_opt_dumps(place: Any, call: Any) -> None:
    dump = place.folder / "dump"
    done = call("opt", place.model, "--passes", FULL, "--calibration", place.feeds, "--dump", dump)
    assert done.code == 0
    assert json.loads((dump / "pipeline.json").read_text())["pipeline"] == FULL
    assert "insert-qdq" in call("inspect", dump).stdout


def test_bisect_names_the_pass_and_the_node(place: Any, call: Any, broken: Path) -> None:
    passes = "canonicalize,spoil-bias{factor=2.0},remove-unused"
    common = ("opt", place.model, "--passes", passes, "--pass-file", broken, "--calibration", place.feeds, "--bisect")
    for bound in ("contract", "60"):
        done = call(*common, bound)
        assert (done.code, done.stderr) == (1, "")
        assert done.stdout.startswith("pass 2 (spoil-bias{factor=2.0})")
        assert "rule spoil-bias, application 1 of 1" in done.stdout
        assert "/first/Add" in done.stdout
    done = call("opt", place.model, "--passes", "canonicalize", "--calibration", place.feeds, "--bisect", "contract")
    assert (done.code, done.stdout) == (0, "every pass holds its contract\n")


def test_numerics_refuse_a_broken_pass(place: Any, call: Any, broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)
    passes = "canonicalize,spoil-bias{factor=2.0}"
    done = call("opt", place.model, "--passes", passes, "--pass-file", broken, "--random-calibration", 2, "--numerics")
    assert done.code == 2
    assert "pass 2 (spoil-bias{factor=2.0}) breaks its contract Exact()" in done.stderr
    assert call("opt", place.model, "--passes", passes, "--pass-file", broken).code == 0


def test_a_failed_pass_is_replayed(place: Any, call: Any, broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)
    passes = "canonicalize,spoil-bias{crash=true}"
    done = call("opt", place.model, "--passes", passes, "--pass-file", broken, "-o", place.output)
    assert done.code == 2
    assert done.stderr == (
        "error: pass 2 (spoil-bias{crash=true}) failed: RuntimeError: broken on purpose; "
        "run it again with: qcompiler opt --replay model.qcreplay\n"
    )
    assert not place.output.exists()
    again = call("opt", "--replay", "model.qcreplay", "--pass-file", broken)
    assert again.code == 2
    assert "RuntimeError: broken on purpose" in again.stderr
    broken.write_text(BROKEN.replace("if self.crash", "if False"))
    mended = call("opt", "--replay", "model.qcreplay", "--pass-file", broken, "-o", place.output)
    assert (mended.code, mended.stderr) == (0, "")
    assert place.output.is_file()


def test_a_pass_file_without_passes(place: Any, call: Any, broken: Path) -> None:
    broken.write_text("x = 1\n")
    done = call("opt", place.model, "--passes", "a", "--pass-file", broken)
    assert (done.code, "defines no pass" in done.stderr) == (2, True)
    broken.write_text("x = \n")
    done = call("opt", place.model, "--passes", "a", "--pass-file", broken)
    assert (done.code, "SyntaxError" in done.stderr) == (2, True)


# ---- bench, lists, demo -------------------------------------------------------------------------------------------


def test_bench_compares_time_and_outputs(place: Any, call: Any) -> None:
    done = call("bench", place.model, place.model, "--feeds", place.feeds, "--seconds", 0.05)
    assert (done.code, done.stderr) == (0, "")
    assert re.search(r"^A / B +\d+\.\d{3} +\d+\.\d{3}", done.stdout, re.MULTILINE)
    assert re.search(r"^\d+ interleaved rounds, threads 1$", done.stdout, re.MULTILINE)
    assert done.stdout.endswith("y: equal\n")


def test_bench_makes_data_of_the_given_shape(place: Any, call: Any) -> None:
    done = call("bench", place.model, place.model, "--shapes", "x:5x64", "--seconds", 0.05)
    assert done.code == 0
    assert "random data" in done.stdout
    assert call("bench", place.model, place.model, "--shapes", "x:5x63", "--seconds", 0.05).code == 2


def test_the_lists_name_everything(call: Any) -> None:
    from qcompiler.passes.catalog import DEFAULT_PIPELINE, shipped_passes
    from qcompiler.patterns.catalog import all_rules
    from qcompiler.pipeline.pipeline import Pipeline
    from qcompiler.targets.target import target_names

    passes, patterns, targets = (call(command).stdout for command in ("passes", "patterns", "targets"))
    assert [n for n in shipped_passes().names() if n not in passes] == []
    assert [r.name for r in all_rules() if r.name not in patterns] == []
    assert [n for n in target_names() if n not in targets] == []
    assert str(Pipeline.parse(DEFAULT_PIPELINE, shipped_passes())) == DEFAULT_PIPELINE


def test_every_pass_file_is_in_the_catalog() -> None:
    """A pass that is forgotten there cannot be run from a pipeline string."""
    from qcompiler.passes import catalog, rewrite
    from qcompiler.passes.catalog import PASSES
    from qcompiler.pipeline.base import Pass

    folder = Path(catalog.__file__).parent
    stems = {f.stem for f in folder.glob("*.py") if "(Pass)" in f.read_text() or "(RewritePass)" in f.read_text()}
    assert {cls.__module__.rpartition(".")[2] for cls in PASSES} == stems - {Path(rewrite.__file__).stem}
    assert all(issubclass(cls, Pass) and cls.__doc__ for cls in PASSES)
    assert len({cls.name() for cls in PASSES}) == len(PASSES)


def test_details(call: Any) -> None:
    assert "default dynamic" in call("passes", "plan-quantization").stdout
    assert "QLinearConv needs a quantized output" in call("targets", "ort-x86").stdout
    assert "where" in call("patterns", "pad-by-nothing").stdout
    assert call("--version").stdout == f"qcompiler {__version__}\n"


@pytest.mark.parametrize("command", ["compile", "opt", "inspect", "bench", "targets", "passes", "patterns", "demo"])
def test_every_command_has_help_with_examples(call: Any, command: str) -> None:
    done = call(command, "--help")
    assert done.code == 0
    assert "Examples:" in done.stdout
    assert f"  qcompiler {command}" in done.stdout


def test_demo(place: Any, call: Any) -> None:
    """The smallest demo model, in full: it compiles, and its metric is within the point that the demo allows."""
    folder = place.folder / "demo"
    done = call("demo", "--output", folder, "--only", "digits_resnet")
    assert (done.code, done.stderr) == (0, "")
    report = json.loads((folder / "digits_resnet.report.json").read_text())
    assert report["metric"] > 0.9696 - 0.01
    assert "top-1" in done.stdout
    assert "0.9696" in done.stdout
    assert f"{len(report['proof']['kernels'])}/{report['proof']['planned']}" in done.stdout
    assert str(folder / "digits_resnet.dump") in done.stdout.replace("\n", "")
    assert call("inspect", folder / "digits_resnet.dump").code == 0


# ---- parts --------------------------------------------------------------------------------------------------------


def test_shapes_are_read() -> None:
    assert parse_shapes(["x:1x3x224x224"]) == {"x": (1, 3, 224, 224)}
    assert parse_shapes(["input:0:1x-1", "b:2,c:3x4"]) == {"input:0": (1, -1), "b": (2,), "c": (3, 4)}
    assert parse_shapes(None) == {}


def test_ranges_of_shapes_are_read() -> None:
    both = parse_shape_ranges(["x:1x3x224x224..8x3x224x224", "m:0:2,b:1x5..2x5..4x5"])
    assert both == {
        "x": ShapeRange((1, 3, 224, 224), (8, 3, 224, 224), (8, 3, 224, 224)),
        "m:0": (2,),
        "b": ShapeRange((1, 5), (2, 5), (4, 5)),
    }
    assert both["x"].fixed == (-1, 3, 224, 224)  # type: ignore[union-attr]
    for text in ("x:8x3..1x3", "x:1..1x2", "x:1..2..3..4", "x", "x:1..a"):
        with pytest.raises(ModelError, match=r"cannot read the shape|does not grow"):
            parse_shape_ranges([text])
    with pytest.raises(ModelError, match="names input 'x' twice"):
        parse_shape_ranges(["x:1", "x:1..2"])


def test_progress_shows_steps_on_a_terminal_only() -> None:
    shown = io.StringIO()
    with progress_lines(False, Console(file=shown, force_terminal=True, width=100)) as progress:
        assert progress is not None
        for line in ("import", "calibrate 1/2", "calibrate 2/2", "measure [a/b] forms"):
            progress(line)
    finished = re.findall(r"\d+\.\d s  ([^\x1b\n]+)", shown.getvalue())
    assert [line.strip() for line in finished] == ["import", "calibrate 2/2", "measure [a/b] forms"]
    silent = io.StringIO()
    for quiet, console in ((True, Console(file=silent, force_terminal=True)), (False, Console(file=silent))):
        with progress_lines(quiet, console) as nothing:
            assert nothing is None
    assert silent.getvalue() == ""


def test_reasons_are_grouped_without_their_figures() -> None:
    groups = [
        GroupReport("/a", "MatMul", "float", "float: measured float 3 us, static 4 us"),
        GroupReport("/b", "MatMul", "float", "float: measured float 30.5 us, static 41 us"),
        GroupReport("/c", "Conv", "static", "static: by recipe"),
        GroupReport("/d", "Add", "float", "float: not-float32: the output is int64"),
    ]
    assert float_reasons(groups) == [
        ("measured float 3 us, static 4 us; the others likewise", 2, "/a, /b"),
        ("not-float32: the output is int64", 1, "/d"),
    ]


def test_sizes_have_a_unit() -> None:
    assert size_text(2_500_000, 625_000) == "2.50 MB -> 0.62 MB (25%)"
    assert size_text(4_000, 1_000) == "4.00 kB -> 1.00 kB (25%)"
