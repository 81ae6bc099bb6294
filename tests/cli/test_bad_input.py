"""Bad input: exit code 2, one clear line on stderr, nothing written."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper


def refused(place: Any, outcome: Any, before: dict[str, bytes], *parts: str) -> None:
    """Assert that a call ended with one line that has all the parts, and that no file is new or changed."""
    assert outcome.code == 2, (outcome.code, outcome.stdout, outcome.stderr)
    assert outcome.stderr.startswith("error: "), outcome.stderr
    assert outcome.stderr.endswith("\n")
    assert outcome.stderr.count("\n") == 1, outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert "internal error" not in outcome.stderr
    assert [p for p in parts if p not in outcome.stderr] == [], outcome.stderr
    assert outcome.stdout == ""
    assert place.files() == before


def compile_refused(place: Any, call: Any, arguments: list[object], *parts: str) -> None:
    before = place.files()
    refused(place, call("compile", *arguments), before, *parts)


def basic(place: Any, *more: object) -> list[object]:
    return [place.model, "-o", place.output, "--calibration", place.feeds, *more]


# ---- the model ----------------------------------------------------------------------------------------------------


def test_truncated_model(place: Any, call: Any) -> None:
    place.model.write_bytes(place.model.read_bytes()[:5000])
    compile_refused(place, call, basic(place), "model.onnx", "truncated")


def test_empty_model(place: Any, call: Any) -> None:
    place.model.write_bytes(b"")
    compile_refused(place, call, basic(place), "model.onnx is empty")


def test_no_protobuf(place: Any, call: Any) -> None:
    place.model.write_text("this is no model\n" * 20)
    compile_refused(place, call, basic(place), "model.onnx is not an ONNX model")


def test_missing_model(place: Any, call: Any) -> None:
    place.model.unlink()
    compile_refused(place, call, basic(place), "cannot read", "model.onnx", "No such file")


def test_a_folder_as_model(place: Any, call: Any) -> None:
    compile_refused(place, call, [place.folder, "-o", place.output], "cannot read", "Is a directory")


def test_missing_external_data(place: Any, call: Any) -> None:
    onnx.save(onnx.load(place.model), place.model, save_as_external_data=True, location="w.bin", size_threshold=0)
    (place.folder / "w.bin").unlink()
    compile_refused(place, call, basic(place), "external data", "not found", "w.bin")


def test_unknown_operator_domain(place: Any, call: Any) -> None:
    model = onnx.load(place.model)
    model.graph.node[2].domain = "acme"
    model.opset_import.append(helper.make_opsetid("acme", 1))
    onnx.save(model, place.model)
    compile_refused(place, call, basic(place), "/first/Relu", "unknown operator domain 'acme'")


def test_unknown_operator(place: Any, call: Any) -> None:
    model = onnx.load(place.model)
    model.graph.node[2].op_type = "Rellu"
    onnx.save(model, place.model)
    compile_refused(place, call, basic(place), "/first/Relu", "Rellu")


# ---- calibration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
def test_calibration_that_is_not_finite(place: Any, call: Any, value: float, word: str) -> None:
    data = np.zeros((3, 4, 64), np.float32)
    data[2, 1, 5] = value
    place.save_feeds(x=data)
    compile_refused(place, call, basic(place), "sample 2", "'x'", word)


def test_wrong_input_name(place: Any, call: Any) -> None:
    place.save_feeds(pixels=np.zeros((8, 64), np.float32))
    compile_refused(place, call, basic(place), "no input 'pixels'", "x")


def test_wrong_shape(place: Any, call: Any) -> None:
    place.save_feeds(x=np.zeros((8, 63), np.float32))
    compile_refused(place, call, basic(place), "'x'", "63", "64")


def test_wrong_rank(place: Any, call: Any) -> None:
    place.save_feeds(x=np.zeros((2, 2, 2, 64), np.float32))
    compile_refused(place, call, basic(place), "'x'", "[2, 2, 2, 64]")


def test_wrong_type(place: Any, call: Any) -> None:
    place.save_feeds(x=np.full((8, 64), "a"))
    compile_refused(place, call, basic(place), "'x'", "float32")


def test_missing_input(place: Any, call: Any) -> None:
    (place.folder / "feeds.py").write_text("def feeds():\n    return [{}]\n")
    compile_refused(
        place,
        call,
        [place.model, "-o", place.output, "--calibration", f"{place.folder}/feeds.py:feeds"],
        "'x' is missing",
    )


def test_empty_calibration(place: Any, call: Any) -> None:
    place.save_feeds(x=np.zeros((0, 4, 64), np.float32))
    compile_refused(place, call, basic(place), "empty")


def test_empty_folder(place: Any, call: Any) -> None:
    (place.folder / "data").mkdir()
    compile_refused(
        place, call, [place.model, "-o", place.output, "--calibration", place.folder / "data"], "data holds neither"
    )


def test_missing_calibration(place: Any, call: Any) -> None:
    place.feeds.unlink()
    compile_refused(place, call, basic(place), "feeds.npz", "no such file")


def test_damaged_calibration(place: Any, call: Any) -> None:
    place.feeds.write_bytes(place.feeds.read_bytes()[:900])
    compile_refused(place, call, basic(place), "cannot read", "feeds.npz")


def test_a_calibration_function_that_fails(place: Any, call: Any) -> None:
    file = place.folder / "feeds.py"
    file.write_text("def feeds():\n    raise RuntimeError('no\\nluck')\n")
    compile_refused(
        place, call, [place.model, "-o", place.output, "--calibration", f"{file}:feeds"], "RuntimeError: no luck"
    )
    compile_refused(place, call, [place.model, "-o", place.output, "--calibration", f"{file}:f"], "no function 'f'")


def test_two_sources(place: Any, call: Any) -> None:
    compile_refused(place, call, basic(place, "--random-calibration", 2), "give one of")


# ---- options ------------------------------------------------------------------------------------------------------


def metric_file(place: Any, body: str = "return 1.0") -> str:
    file = place.folder / "metric.py"
    file.write_text(f"def f(outputs, feeds):\n    {body}\n")
    return f"{file}:f"


OPTIONS: dict[str, tuple[Callable[[Any], list[object]], list[str]]] = {
    "target": (lambda p: ["--target", "abacus"], ["unknown target 'abacus'", "host", "ort-x86"]),
    "recipe": (lambda p: ["--recipe", "int3"], ["unknown recipe 'int3'", "int8-dynamic"]),
    "recipe file": (lambda p: ["--recipe", p.folder / "none.toml"], ["unknown recipe", "none.toml"]),
    "budget": (lambda p: ["--budget", "fast"], ["cannot read the budget 'fast'", "sqnr>=30"]),
    "budget number": (lambda p: ["--budget", "sqnr>=3.0.0"], ["cannot read the budget"]),
    "drop without metric": (lambda p: ["--budget", "drop<=1pt"], ["a drop budget needs a metric"]),
    "metric without data": (lambda p: ["--metric", metric_file(p)], ["needs evaluation data"]),
    "metric form": (lambda p: ["--metric", "accuracy"], ["cannot read the metric 'accuracy'"]),
    "metric file": (lambda p: ["--metric", "no.py:f", "--evaluation", p.feeds], ["no.py:f", "no such file"]),
    "metric name": (
        lambda p: ["--metric", metric_file(p).replace(":f", ":g"), "--evaluation", p.feeds],
        ["no function 'g'"],
    ),
    "failing metric": (
        lambda p: ["--metric", metric_file(p, "return 1 / 0"), "--evaluation", p.feeds],
        ["metric", "ZeroDivisionError"],
    ),
    "metric value": (
        lambda p: ["--metric", metric_file(p, "return float('nan')"), "--evaluation", p.feeds],
        ["gives nan", "finite"],
    ),
    "evaluation": (lambda p: ["--metric", metric_file(p), "--evaluation", "no.npz"], ["no.npz", "no such file"]),
    "shape form": (lambda p: ["--shapes", "1x3"], ["cannot read the shape '1x3'"]),
    "shape input": (lambda p: ["--shapes", "z:1x3"], ["z"]),
    "shape rank": (lambda p: ["--shapes", "x:1x3x4"], ["x"]),
    "shape twice": (lambda p: ["--shapes", "x:1x64,x:2x64"], ["'x' twice"]),
    "sqnr": (lambda p: ["--min-sqnr", "nan"], ["--min-sqnr is nan"]),
    "opset": (lambda p: ["--opset", "7"], ["opset is 7", "expected"]),
    "missing decisions": (
        lambda p: ["--decisions", p.folder / "no.json"],
        ["cannot read the decisions record", "no.json"],
    ),
    "missing override": (lambda p: ["--override", p.folder / "no.toml"], ["cannot read the overrides", "no.toml"]),
    "dump over a file": (lambda p: ["--dump", p.model / "dump"], ["model.onnx is a file"]),
    "report folder": (lambda p: ["--report", p.folder], ["it is a folder"]),
    "report nowhere": (lambda p: ["--report", p.folder / "no" / "r.json"], ["does not exist"]),
    "report is output": (lambda p: ["--report", p.output], ["the same file"]),
    "report is decisions": (lambda p: ["--report", p.folder / "out.decisions.json"], ["the same file"]),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_option(place: Any, call: Any, name: str) -> None:
    options, parts = OPTIONS[name]
    arguments = basic(place, *options(place))  # may write a file of its own first
    compile_refused(place, call, arguments, *parts)


OVERRIDES = {
    'x = "': ["overrides"],
    "[[override]]\nform = 'float'\n": ["lacks 'match'"],
    "[[override]]\nmatch = '*'\nform = 'int3'\n": ["'int3'", "expected one of"],
    "[[override]]\nmatch = '*'\nforms = 'float'\n": ["unknown key 'forms'"],
    "[[override]]\nmatch = '/none/*'\nform = 'float'\n": ["'/none/*' matches no group", "/second/MatMul"],
    "colour = 'red'\n": ["unknown key 'colour'"],
    "override = 3\n": ["override"],
    "[[override]]\nmatch = 3\n": ["match"],
    "[[override]]\nmatch = '*'\nestimator = 'guess'\n": ["guess"],
}


@pytest.mark.parametrize("text", OVERRIDES)
def test_bad_override(place: Any, call: Any, text: str) -> None:
    file = place.folder / "overrides.toml"
    file.write_text(text)
    compile_refused(place, call, basic(place, "--override", file), *OVERRIDES[text])


RECORDS = {
    "": ["not a decisions record"],
    "{": ["not a decisions record"],
    "[]": ["not a decisions record"],
    "{}": ["lacks 'version'"],
    json.dumps({"version": 99}): ["version 99"],
    json.dumps({"version": 1, "colour": 1}): ["colour"],
    json.dumps({"version": 2, "forms": []}): ["forms"],
    json.dumps({"version": 2, "forms": {"/first/MatMul": "int3"}}): ["unknown form 'int3'"],
    json.dumps({"version": 2, "forms": {"/third/MatMul": "dynamic"}}): ["another model", "/third/MatMul"],
}


@pytest.mark.parametrize("text", RECORDS)
def test_corrupt_decisions(place: Any, call: Any, text: str) -> None:
    file = place.folder / "record.json"
    file.write_text(text)
    compile_refused(
        place, call, basic(place, "--decisions", file), "record.json" if "form" not in text else "", *RECORDS[text]
    )


def test_decisions_that_are_no_text(place: Any, call: Any) -> None:
    file = place.folder / "record.json"
    file.write_bytes(bytes(range(256)))
    compile_refused(place, call, basic(place, "--decisions", file), "record.json", "not a decisions record")


# ---- the output ---------------------------------------------------------------------------------------------------


def test_output_in_a_missing_folder(place: Any, call: Any) -> None:
    compile_refused(
        place, call, [place.model, "-o", place.folder / "no" / "out.onnx"], "cannot write", "does not exist"
    )


def test_output_that_is_a_folder(place: Any, call: Any) -> None:
    compile_refused(place, call, [place.model, "-o", place.folder], "cannot write", "it is a folder")
    compile_refused(place, call, [place.model, "-o", "."], "it is a folder")


def test_output_under_a_file(place: Any, call: Any) -> None:
    compile_refused(place, call, [place.model, "-o", place.model / "out.onnx"], "is not a folder")


def test_output_over_the_model(place: Any, call: Any) -> None:
    compile_refused(place, call, [place.model, "-o", place.model], "the model is the same file")


def test_a_folder_in_the_place_of_the_decisions_record(place: Any, call: Any) -> None:
    (place.folder / "out.decisions.json").mkdir()
    compile_refused(place, call, basic(place), "out.decisions.json", "it is a folder")


def test_nothing_is_left_if_writing_fails_half_way(place: Any, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up when the model is renamed into place: neither report nor record nor a part of them stays."""

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qcompiler.ir.serialize.os.replace", full)
    arguments = basic(place, "--no-guard", "--report", place.folder / "r.json")
    compile_refused(place, call, arguments, "cannot write", "out.onnx", "No space left on device")


def test_an_unexpected_error_is_one_line_too(place: Any, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise LookupError("first\nsecond")

    monkeypatch.setattr("qcompiler.compilation.import_model", lambda *_, **__: broken())
    outcome = call("compile", *basic(place))
    assert outcome.code == 2
    assert outcome.stderr.startswith("error: internal error: LookupError: first second; please report it")
    assert outcome.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "text"), [(MemoryError(), "out of memory"), (OSError(28, "No space left on device"), "No space left")]
)
def test_errors_of_the_system(
    place: Any, call: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("qcompiler.compilation.import_model", broken)
    compile_refused(place, call, basic(place), text)


def test_an_interrupt_ends_with_130(place: Any, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qcompiler.compilation.import_model", interrupted)
    before = place.files()
    outcome = call("compile", *basic(place))
    assert (outcome.code, outcome.stderr) == (130, "interrupted\n")
    assert place.files() == before


# ---- wrong usage, other commands ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["compile"],
        ["compile", "model.onnx"],
        ["compile", "model.onnx", "-o", "out.onnx", "--emit", "code"],
        ["compile", "model.onnx", "-o", "out.onnx", "--random-calibration", "0"],
        ["compile", "model.onnx", "-o", "out.onnx", "--min-sqnr", "much"],
        ["compile", "model.onnx", "-o", "out.onnx", "--colour"],
        ["paint"],
        ["bench", "model.onnx"],
    ],
)
def test_wrong_usage(call: Any, arguments: list[str]) -> None:
    outcome = call(*arguments)
    assert outcome.code == 2
    assert outcome.stderr.startswith("Usage: ")
    assert "Traceback" not in outcome.stderr


OTHERS: dict[str, tuple[Callable[[Any], list[object]], list[str]]] = {
    "opt without passes": (lambda p: ["opt", p.model], ["--passes"]),
    "opt unknown pass": (lambda p: ["opt", p.model, "--passes", "canonicalise"], ["did you mean canonicalize?"]),
    "opt bad order": (lambda p: ["opt", p.model, "--passes", "fuse-qdq"], ["pass 1 (fuse-qdq) needs phase QDQ"]),
    "opt bad pipeline": (lambda p: ["opt", p.model, "--passes", "canonicalize{"], ["expected an option"]),
    "opt bisect without feeds": (
        lambda p: ["opt", p.model, "--passes", "canonicalize", "--bisect", "30"],
        ["need feeds", "--calibration"],
    ),
    "opt bad bound": (lambda p: ["opt", p.model, "--passes", "canonicalize", "--bisect", "x"], ["--bisect is 'x'"]),
    "opt pass file": (lambda p: ["opt", p.model, "--passes", "a", "--pass-file", "no.py"], ["no.py", "no such file"]),
    "opt replay": (lambda p: ["opt", "--replay", p.folder], ["is not a replay folder"]),
    "opt replay and model": (lambda p: ["opt", p.model, "--replay", p.folder], ["--replay runs what its folder holds"]),
    "opt output": (lambda p: ["opt", p.model, "--passes", "", "-o", p.folder], ["it is a folder"]),
    "inspect": (lambda p: ["inspect", p.folder], ["is not a dump"]),
    "bench missing": (lambda p: ["bench", p.model, p.folder / "no.onnx"], ["no.onnx", "no such file"]),
    "bench feeds": (lambda p: ["bench", p.model, p.model, "--feeds", "no.npz"], ["no.npz", "no such file"]),
    "bench seconds": (lambda p: ["bench", p.model, p.model, "--seconds", "-1"], ["--seconds is -1"]),
    "bench shapes": (lambda p: ["bench", p.model, p.model, "--shapes", "z:1"], ["'z'", "x"]),
    "targets": (lambda p: ["targets", "abacus"], ["unknown target 'abacus'"]),
    "passes": (lambda p: ["passes", "fold"], ["unknown pass 'fold'"]),
    "patterns": (lambda p: ["patterns", "nothing-like-it"], ["unknown pattern"]),
    "demo": (lambda p: ["demo", "--only", "resnet99"], ["no demo model is named 'resnet99'", "digits_resnet"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_bad_input_of_other_commands(place: Any, call: Any, name: str) -> None:
    arguments, parts = OTHERS[name]
    before = place.files()
    refused(place, call(*arguments(place)), before, *parts)


def test_demo_outside_a_checkout(place: Any, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)
    monkeypatch.setattr("qcompiler.cli_demo.__file__", str(place.folder / "site" / "qcompiler" / "cli_demo.py"))
    refused(place, call("demo"), place.files(), "the demo models are not here")


# ---- as a process -------------------------------------------------------------------------------------------------


def process(place: Any, *arguments: object, debug: bool = False) -> Any:
    env = {**os.environ, "QCOMPILER_DEBUG": "1" if debug else ""}
    command = [sys.executable, "-m", "qcompiler", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=place.folder)


def test_a_process_ends_with_one_line(place: Any) -> None:
    place.save_feeds(x=np.full((8, 64), np.nan, np.float32))
    before = place.files()
    done = process(place, "compile", *basic(place))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: sample 0, input 'x': the data holds NaN; remove or mend that sample\n"
    assert place.files() == before


def test_debug_shows_the_traceback(place: Any) -> None:
    done = process(place, "compile", place.model, "-o", place.output, "--target", "abacus", debug=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "TargetError: unknown target 'abacus'" in done.stderr


def test_an_interrupted_process_ends_with_130(place: Any) -> None:
    """The calibration function raises what Ctrl-C raises, in a real process."""
    file = place.folder / "feeds.py"
    file.write_text(
        "import os, signal\n"
        "def feeds():\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    yield {}\n"
    )
    before = place.files()
    done = process(place, "compile", place.model, "-o", place.output, "--calibration", f"{file}:feeds")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
    assert {n: b for n, b in place.files().items() if "__pycache__" not in n} == before
