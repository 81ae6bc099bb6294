import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompiler.errors import CalibrationError, ModelError, PassError
from qcompiler.ir.phase import Phase
from qcompiler.ir.text import parse_text, print_model
from qcompiler.pipeline.instruments.dump import DumpInstrument
from qcompiler.pipeline.instruments.numerics import NumericsInstrument
from qcompiler.pipeline.instruments.replay import RecordedRanges, ReplayInstrument
from qcompiler.pipeline.instruments.timing import TimeInstrument
from qcompiler.pipeline.instruments.verify import VerifyInstrument
from qcompiler.pipeline.instruments.weights import WEIGHTS_FILE, WeightStore
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.replay import load_case, replay
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.plan import GroupChoice, QuantPlan
from qcompiler.quant.spec import QuantSource
from tests.pipeline.sample_passes import REGISTRY, TARGET, FixedRanges, chain_feeds, chain_state, engine

TEXT = "drop-identity,many,scale-factors{factor=1.5,only=e},plan-nothing"


def wide_model() -> ir.Model:
    """Return a model with weights large enough to go to the weights file, two of them equal."""
    model = parse_text('<ir_version: 10, opset_import: ["" : 21]> wide (float[N,32] x) => (float[N,32] y) '
                       "{ a = Relu (x) y = Identity (a) }")  # fmt: skip
    array = np.arange(1024, dtype=np.float32).reshape(32, 32)
    for name, values in (("v", array), ("w", array.copy()), ("u", array + 1)):
        model.graph.register_initializer(
            ir.Value(name=name, const_value=ir.Tensor(values, name=name), type=ir.TensorType(ir.DataType.FLOAT),
                     shape=ir.Shape((32, 32)))
        )  # fmt: skip
    return model


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


# ---- dump ---------------------------------------------------------------------------------------------------------


def test_a_dump_holds_the_stages_that_changed(tmp_path: Path) -> None:
    state = chain_state()
    Pipeline.parse(TEXT, REGISTRY).run(state, (DumpInstrument(tmp_path),))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "000-input.ir",
        "000-input.onnx",
        "001-drop-identity.diff",
        "001-drop-identity.ir",
        "001-drop-identity.onnx",
        "001-drop-identity.remarks.json",
        "003-scale-factors.diff",
        "003-scale-factors.ir",
        "003-scale-factors.onnx",
        "003-scale-factors.rules.json",
        "pipeline.json",
        WEIGHTS_FILE,
    ]
    assert (tmp_path / "003-scale-factors.ir").read_text() == print_model(state.model)
    index = json.loads((tmp_path / "pipeline.json").read_text())
    assert index["pipeline"] == TEXT
    assert index["target"] == "sample"
    assert [(s["stage"], s["phase"], s["changed"], s["nodes"]) for s in index["stages"]] == [
        ("000-input", "FLOAT", True, 8),
        ("001-drop-identity", "FLOAT", True, 6),
        ("002-many", "FLOAT", False, 6),
        ("003-scale-factors", "FLOAT", True, 6),
        ("004-plan-nothing", "PLANNED", False, 6),
    ]
    assert index["stages"][1]["ops"] == {"MatMul": 1, "Mul": 3, "Relu": 1, "Sigmoid": 1}
    remarks = json.loads((tmp_path / "001-drop-identity.remarks.json").read_text())
    assert [(r["node"], r["reason"], r["done"]) for r in remarks] == [
        ("Identity_1", "removed", True),
        ("Identity_5", "removed", True),
    ]


def test_a_diff_is_that_of_the_texts(tmp_path: Path) -> None:
    Pipeline.parse("drop-identity", REGISTRY).run(chain_state(), (DumpInstrument(tmp_path),))
    lines = (tmp_path / "001-drop-identity.diff").read_text().splitlines()
    assert lines[:2] == ["--- 000-input", "+++ 001-drop-identity"]
    assert next(line for line in lines if line.startswith("-  ")).startswith("-  Identity_1: ")
    assert sum(line.startswith("+  ") for line in lines) == 2


def test_every_stage_loads_and_runs_from_the_shared_weights(tmp_path: Path) -> None:
    feeds = {"x": np.full((2, 4), 0.01, np.float32)}
    state = chain_state()
    Pipeline.parse(TEXT, REGISTRY).run(state, (DumpInstrument(tmp_path),))
    wanted = engine().load(state.model).run(feeds)["y"]
    assert np.array_equal(engine().load(tmp_path / "003-scale-factors.onnx").run(feeds)["y"], wanted)
    assert not np.array_equal(engine().load(tmp_path / "000-input.onnx").run(feeds)["y"], wanted)


def test_a_dump_is_deterministic_and_replaces_an_older_one(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    second.mkdir()
    (second / "notes.txt").write_text("mine")
    Pipeline.parse("many,many,drop-identity", REGISTRY).run(
        chain_state(), (DumpInstrument(second, times=(times := TimeInstrument())), times)
    )
    assert (second / "times.json").is_file()
    for folder in (first, second):
        Pipeline.parse(TEXT, REGISTRY).run(chain_state(), (DumpInstrument(folder),))
    found = files(second)
    assert found.pop("notes.txt") == b"mine"
    assert found == files(first)


def test_figures_of_other_instruments_are_shown(tmp_path: Path) -> None:
    ticks = iter((0.0, 0.5, 1.0, 1.25))
    times = TimeInstrument(lambda: next(ticks))
    numerics = NumericsInstrument(engine(), chain_feeds(), strict=False)
    pipeline = Pipeline.parse("drop-identity,scale-factors{factor=1.5,only=e}", REGISTRY)
    pipeline.run(chain_state(), (DumpInstrument(tmp_path, times, numerics), numerics, times))
    assert json.loads((tmp_path / "times.json").read_text()) == {"001-drop-identity": 0.5, "002-scale-factors": 0.25}
    stages = json.loads((tmp_path / "pipeline.json").read_text())["stages"]
    assert stages[1]["numerics"]["sqnr_db"] == {"y": "inf"}
    assert stages[2]["numerics"]["sqnr_db"]["y"] == pytest.approx(numerics.results[1].sqnr_db["y"])
    assert [v["value"] for v in stages[2]["numerics"]["violations"]] == ["e"]


def test_a_failed_pass_is_dumped_as_it_left_the_graph(tmp_path: Path) -> None:
    with pytest.raises(PassError):
        Pipeline.parse("drop-identity,break-graph", REGISTRY).run(
            chain_state(), (DumpInstrument(tmp_path), VerifyInstrument())
        )
    stages = json.loads((tmp_path / "pipeline.json").read_text())["stages"]
    assert [s["stage"] for s in stages] == ["000-input", "001-drop-identity", "002-break-graph"]
    assert "MatMul_0" in stages[2]["error"]
    assert "error" not in stages[1]
    assert (tmp_path / "002-break-graph.ir").read_text().count("  MatMul_0: ") == 2


def test_several_pipelines_are_numbered_through(tmp_path: Path) -> None:
    dump = DumpInstrument(tmp_path)
    Pipeline.parse("drop-identity", REGISTRY).run(chain_state(), (dump,))
    state = chain_state()
    state.plan = QuantPlan({"MatMul_0": GroupChoice("static")})
    Pipeline.parse("drop-identity,plan-nothing", REGISTRY).run(state, (dump,))
    index = json.loads((tmp_path / "pipeline.json").read_text())
    assert [s["stage"] for s in index["stages"]] == [
        "000-input", "001-drop-identity", "002-input", "003-drop-identity", "004-plan-nothing"
    ]  # fmt: skip
    assert index["pipeline"] == "drop-identity,drop-identity,plan-nothing"
    assert QuantPlan.from_json((tmp_path / "002-input.plan.json").read_text()) == state.plan
    assert not (tmp_path / "004-plan-nothing.plan.json").exists()


def test_a_folder_that_cannot_be_made_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"cannot write .*file/dump/pipeline.json: "):
        Pipeline.parse("many", REGISTRY).run(chain_state(), (DumpInstrument(tmp_path / "file" / "dump"),))


# ---- weights ------------------------------------------------------------------------------------------------------


def test_equal_tensors_are_stored_once(tmp_path: Path) -> None:
    model = wide_model()
    store = WeightStore(tmp_path)
    for name in ("one.onnx", "two.onnx"):
        store.save(model, name)
    assert (tmp_path / WEIGHTS_FILE).stat().st_size == 2 * 4096
    proto = onnx.load(tmp_path / "two.onnx", load_external_data=False)
    places = {i.name: {e.key: e.value for e in i.external_data} for i in proto.graph.initializer}
    assert places["v"] == places["w"] == {"location": WEIGHTS_FILE, "offset": "0", "length": "4096"}
    assert places["u"]["offset"] == "4096"
    loaded = onnx.load(tmp_path / "two.onnx")
    for initializer in loaded.graph.initializer:
        value = model.graph.initializers[initializer.name].const_value
        assert value is not None
        assert np.array_equal(onnx.numpy_helper.to_array(initializer), value.numpy())
    assert isinstance(model.graph.initializers["v"].const_value, ir.Tensor), "the model itself is left as it is"


# ---- replay -------------------------------------------------------------------------------------------------------


def test_a_failed_pass_is_replayed_from_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "case"
    state = chain_state()
    state.statistics = FixedRanges()
    state.plan = QuantPlan({"MatMul_0": GroupChoice("static", "measured")})
    state.forms = {"MatMul_0": "dynamic"}
    state.imported = {"a": QuantSource("fixed", scale=(0.5,), zero_point=(3,))}
    recorder = ReplayInstrument(folder)
    with pytest.raises(PassError, match=r"pass 3 \(ask-range\{fail=true\}\) failed: RuntimeError: asked to fail"):
        Pipeline.parse("drop-identity,plan-nothing,ask-range{fail=true}", REGISTRY).run(state, (recorder,))
    assert recorder.written
    assert isinstance(state.statistics, FixedRanges)

    case = load_case(folder)
    assert (case.text, case.error, case.version_changes()) == ("ask-range{fail=true}", "asked to fail", ())
    assert (case.state.phase, case.state.plan, case.state.target) == (Phase.PLANNED, state.plan, TARGET)
    assert (case.state.forms, case.state.imported) == (state.forms, state.imported)
    expected = chain_state()
    Pipeline.parse("drop-identity", REGISTRY).run(expected)
    assert print_model(case.state.model) == print_model(expected.model)
    with pytest.raises(PassError, match=r"pass 1 \(ask-range\{fail=true\}\) failed: RuntimeError: asked to fail"):
        replay(folder, REGISTRY)


def test_a_replay_answers_ranges_from_the_record(tmp_path: Path) -> None:
    state = chain_state()
    state.statistics = FixedRanges()
    with pytest.raises(PassError):
        Pipeline.parse("ask-range{fail=true}", REGISTRY).run(state, (ReplayInstrument(tmp_path),))
    case = load_case(tmp_path)
    assert case.state.statistics is not None
    assert case.state.statistics.range("a", "min-max") == (-1.5, 0.1)
    with pytest.raises(CalibrationError, match="the recorded run never asked for the range of a"):
        case.state.statistics.range("a", "percentile")


def test_a_failure_found_by_an_instrument_is_found_again(tmp_path: Path) -> None:
    with pytest.raises(PassError):
        Pipeline.parse("many,break-graph", REGISTRY).run(
            chain_state(), (ReplayInstrument(tmp_path), VerifyInstrument())
        )
    _, changes = replay(tmp_path, REGISTRY)
    assert changes == 1
    with pytest.raises(PassError, match=r"break-graph\) failed: .*MatMul_0"):
        replay(tmp_path, REGISTRY, (VerifyInstrument(),))


def test_nothing_is_left_without_a_failure(tmp_path: Path) -> None:
    state = chain_state()
    state.statistics = FixedRanges()
    Pipeline.parse("many,ask-range", REGISTRY).run(state, (ReplayInstrument(tmp_path / "case"),))
    assert not (tmp_path / "case").exists()
    assert [r.text for r in state.remarks] == ["-1.5 to 0.1"]
    assert isinstance(state.statistics, FixedRanges)


def test_a_folder_that_is_no_case_says_so(tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"is not a replay folder: expected case.json in it"):
        load_case(tmp_path)
    (tmp_path / "case.json").write_text("{}")
    with pytest.raises(PassError, match="is a damaged replay folder: KeyError: 'format'"):
        load_case(tmp_path)
    (tmp_path / "case.json").write_text('{"format": 99}')
    with pytest.raises(PassError, match="has replay format 99, this qcompiler reads 1"):
        load_case(tmp_path)


def test_a_recorder_repeats_refusals() -> None:
    class Refuses:
        def observed(self, name: str) -> bool:
            return False

        def range(self, name: str, estimator: str = "min-max", spec: object = None) -> tuple[float, float]:
            raise CalibrationError(f"{name} was never observed")

    recorder = RecordedRanges(Refuses())
    again = RecordedRanges(None, recorder.seen, recorder.ranges)
    for source in (recorder, again):
        assert source.observed("q") is False
        with pytest.raises(CalibrationError, match=r"^q was never observed$"):
            source.range("q", "min-max")


def test_a_case_keeps_a_state_without_statistics(tmp_path: Path) -> None:
    with pytest.raises(PassError):
        Pipeline.parse("ask-range", REGISTRY).run(chain_state(), (ReplayInstrument(tmp_path),))
    state: CompileState = load_case(tmp_path).state
    assert state.statistics is None
