"""Several graphs in one build: shared weights are quantized alike and stored once, and nothing else changes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.external_data_helper import ExternalDataInfo

import qcompiler
from qcompiler.agreement import Decided, agree, find_shared
from qcompiler.backends.backend import Backend, Written
from qcompiler.backends.catalog import open_backend
from qcompiler.backends.triton.artifact import load_artifact
from qcompiler.compilation import Compilation
from qcompiler.compiled_set import CompiledSet
from qcompiler.engine import Array, Feeds
from qcompiler.options import Options
from qcompiler.together import compile_set
from tests.search.machine import InventedMachine
from tests.together.models import EMBEDDING, LINKS, SHARED, calibration, sources

NAMES = ("encoder", "decoder", "decoder_with_past")


def build(**changes: object) -> CompiledSet:
    given: dict[str, object] = {"guard": False, "calibration": calibration(), "links": LINKS, **changes}
    return qcompiler.compile_together(sources(), **given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plain() -> CompiledSet:
    return build()


def run(path: Path | bytes, feed: Feeds) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    source = path if isinstance(path, bytes) else str(path)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feed))  # type: ignore[no-any-return]


def feed_of(name: str) -> Feeds:
    random = np.random.default_rng(9)
    hidden = random.standard_normal((2, 7, 64)).astype(np.float32)
    if name == "decoder":
        return {"tokens": np.arange(10).reshape(2, 5), "encoder_hidden_states": hidden}
    if name == "encoder":
        return {"tokens": np.arange(14).reshape(2, 7)}
    return {"next_token": np.array([[3], [4]]), "past_key_values.0.key": hidden, "past_key_values.0.value": hidden}


def external(path: Path) -> Iterator[tuple[str, ExternalDataInfo, onnx.TensorProto]]:
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield tensor.name, ExternalDataInfo(tensor), tensor


def test_a_weight_is_found_by_its_contents_whatever_its_name_and_also_where_it_lay_transposed(plain: CompiledSet):
    found = {row.names["decoder"]: row for row in plain.weights if "decoder_with_past" in row.names}
    assert sorted(found) == sorted(SHARED)
    assert found["query"].names == {"decoder": "query", "decoder_with_past": "onnx::MatMul_query"}
    assert all(set(row.stored.values()) == {"int8 per axis 1"} for row in found.values())
    assert plain.report.deviations == ()


def test_each_distinct_tensor_is_stored_once_and_the_report_says_what_that_saves(plain: CompiledSet, tmp_path: Path):
    plain.save(tmp_path / "out")
    (weights,) = (tmp_path / "out").glob("*.bin")
    alone = 0
    for name in NAMES:
        plain[name].save(tmp_path / f"{name}.onnx")
        alone += (tmp_path / f"{name}.onnx").stat().st_size
    together = weights.stat().st_size + sum((tmp_path / "out" / f"{name}.onnx").stat().st_size for name in NAMES)
    report = plain.report
    assert report.alone == {name: (tmp_path / f"{name}.onnx").stat().st_size for name in NAMES}
    assert (report.together, report.saved) == (together, alone - together)
    # The embedding three times, and query, out and head twice, in int8.
    once = 2 * EMBEDDING.nbytes + 64 * 64 * 2 + 64 * 96
    assert once * 0.9 < report.saved < once * 1.1
    rows = {tuple(row.names): row for row in report.stored if row.nbytes == EMBEDDING.nbytes}
    assert rows[NAMES].names == {
        "encoder": ("shared.weight",), "decoder": ("embed",), "decoder_with_past": ("onnx::Gather_9",)
    }  # fmt: skip
    assert sum(row.nbytes for row in report.stored if row.kind == "int8") == 64 * 64 * 2 + 64 * 96


def test_the_files_load_in_onnxruntime_and_the_checker_and_give_what_the_graphs_give_alone(
    plain: CompiledSet, tmp_path: Path
):
    written = plain.save(tmp_path / "out")
    assert {p.name for p in written.files} == {p.name for p in (tmp_path / "out").iterdir()}
    for name in NAMES:
        path = tmp_path / "out" / f"{name}.onnx"
        onnx.checker.check_model(str(path), full_check=True)
        alone = run(plain[name].to_bytes(), feed_of(name))
        for wanted, got in zip(alone, run(path, feed_of(name)), strict=True):
            np.testing.assert_array_equal(got, wanted)
        loaded = qcompiler.load(path, threads=1).run(feed_of(name))
        np.testing.assert_array_equal(next(iter(loaded.values())), alone[0])


def test_a_graph_is_the_same_as_compiled_alone_with_the_same_decisions(plain: CompiledSet):
    for name in ("encoder",):
        alone = qcompiler.compile(
            sources()[name], calibration=calibration()[name], decisions=plain[name].decisions, guard=False
        )
        assert alone.to_bytes() == plain[name].to_bytes()


def test_large_tensors_lie_where_files_are_mapped_and_small_ones_stay_in_the_graph(tmp_path: Path):
    rows = np.random.default_rng(0).standard_normal((4096, 80)).astype(np.float32)
    graphs = {}
    for name in ("a", "b"):
        nodes = [
            onnx.helper.make_node("Gather", ["table", "i"], ["x"]),
            onnx.helper.make_node("MatMul", ["x", f"w{name}"], ["m"]),
            onnx.helper.make_node("Add", ["m", "c"], ["y"]),
        ]
        weights = {
            "table": rows, f"w{name}": rows[: 80 * 4].reshape(80, -1) + ord(name), "c": rows[0, :1].copy(),
        }  # fmt: skip
        graph = onnx.helper.make_graph(
            nodes, name, [onnx.helper.make_tensor_value_info("i", onnx.TensorProto.INT64, ["n"])],
            [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 320])],
            [onnx.numpy_helper.from_array(w, n) for n, w in weights.items()],
        )  # fmt: skip
        graphs[name] = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    made = qcompiler.compile_together(graphs, guard=False)
    made.save(tmp_path / "out")
    places = {}
    for name in graphs:
        for key, info, tensor in external(tmp_path / "out" / f"{name}.onnx"):
            places[name, key] = info.offset
            assert info.length == np.prod(tensor.dims) * (1 if key.endswith(":q") else 4) >= 1024
            assert info.offset % (65536 if info.length >= 1 << 20 else 4096 if info.length >= 65536 else 64) == 0
        graph = onnx.load(tmp_path / "out" / f"{name}.onnx", load_external_data=False).graph
        inside = [t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
        assert all(onnx.numpy_helper.to_array(t).nbytes < 1024 for t in inside)
    assert places["a", "table"] == places["b", "table"]
    assert places["a", "wa:q"] != places["b", "wb:q"]


def test_the_record_repeats_the_build_byte_for_byte(plain: CompiledSet, tmp_path: Path):
    plain.save(tmp_path / "first")
    again = build(decisions=tmp_path / "first" / "decisions.json")
    again.save(tmp_path / "second")
    first = {p.name: p.read_bytes() for p in (tmp_path / "first").iterdir()}
    assert first == {p.name: p.read_bytes() for p in (tmp_path / "second").iterdir()}
    assert sorted(json.loads(first["decisions.json"])["graphs"]) == sorted(NAMES)


def test_saving_over_an_older_build_leaves_its_own_files_only(plain: CompiledSet, tmp_path: Path):
    older = qcompiler.compile_together(dict.fromkeys(("encoder", "other"), sources()["encoder"]), guard=False)
    older.save(tmp_path / "out")
    (old,) = (tmp_path / "out").glob("weights-*.bin")
    plain.save(tmp_path / "out")
    # The older build's other graph is still there, so its weights stay.
    assert old.exists()
    np.testing.assert_array_equal(
        run(tmp_path / "out" / "other.onnx", feed_of("encoder"))[0],
        run(older["other"].to_bytes(), feed_of("encoder"))[0],
    )
    older.save(tmp_path / "again")
    (tmp_path / "again" / "other.onnx").unlink()
    plain.save(tmp_path / "again")
    assert [p.name for p in (tmp_path / "again").glob("*.bin")] == [plain.layout.name]
    assert not list((tmp_path / "out").glob(".*"))


def test_a_write_that_breaks_leaves_the_older_build_whole(
    plain: CompiledSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    older = qcompiler.compile_together(dict.fromkeys(NAMES, sources()["encoder"]), guard=False)
    older.save(tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def full(self: object) -> Iterator[bytes]:
        yield b"begun"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qcompiler.weights_file.WeightsFile.chunks", full)
    with pytest.raises(qcompiler.ModelError, match="No space left on device"):
        plain.save(tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    with pytest.raises(qcompiler.ModelError, match="No space left on device"):
        plain.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def decided(machines: dict[str, InventedMachine], min_sqnr: dict[str, float] | None = None) -> CompiledSet:
    """Compile plain and cached decoder with the guard, timed by machines that are made up."""
    feeds = complete_feeds()
    options = {
        name: Options(calibration=feeds[name], stopwatch=machines[name], min_sqnr=(min_sqnr or {}).get(name))
        for name in machines
    }
    return compile_set({name: sources()[name] for name in machines}, options)


def complete_feeds() -> dict[str, list[Feeds]]:
    random = np.random.default_rng(5)
    found: dict[str, list[Feeds]] = {"decoder": [], "decoder_with_past": []}
    for given, other in zip(calibration()["decoder"], calibration()["decoder_with_past"], strict=True):
        cache = random.standard_normal((2, 7, 64)).astype(np.float32)
        found["decoder"].append({**given, "encoder_hidden_states": cache})
        found["decoder_with_past"].append(
            {**other, "past_key_values.0.key": cache, "past_key_values.0.value": cache[::-1].copy()}
        )
    return found


def slow_at_out(microseconds: float) -> dict[str, InventedMachine]:
    return {
        "decoder": InventedMachine(),
        "decoder_with_past": InventedMachine(lambda name: name == "/out/MatMul", slow_us=microseconds),
    }


def test_a_graph_takes_the_others_form_where_it_stays_faster_than_float_and_close_enough():
    made = decided(slow_at_out(235.0))
    assert made["decoder"].decisions.forms["/out/MatMul"] != "float"
    assert made["decoder_with_past"].decisions.forms["/out/MatMul"] != "float"
    why = made["decoder_with_past"].decisions.why["/out/MatMul"]
    assert "as another graph of the build has this weight (alone it was float)" in why
    assert made["decoder_with_past"].decisions.figures["agreement"]["taken"] == 1
    assert made["decoder_with_past"].report.speedup > 1.0  # type: ignore[operator]
    assert made.report.deviations == ()


def test_a_graph_that_would_be_slower_than_float_deviates_and_the_report_says_why_and_what_that_costs():
    made = decided(slow_at_out(50000.0))
    assert "/out/MatMul" not in made["decoder_with_past"].decisions.forms
    assert made["decoder_with_past"].report.speedup >= 1.0  # type: ignore[operator]
    (row,) = made.report.deviations
    assert row.names == {"decoder": "out", "decoder_with_past": "onnx::MatMul_out"}
    assert row.stored == {"decoder": "int8 per axis 1", "decoder_with_past": "float"}
    assert row.extra_bytes == 64 * 64 * 4
    assert "on integers this graph is slower than float: 0.0" in row.why["decoder_with_past"]


def test_a_graph_that_would_lose_much_of_its_speed_deviates():
    made = decided(slow_at_out(310.0))
    assert "/out/MatMul" not in made["decoder_with_past"].decisions.forms
    (row,) = made.report.deviations
    assert "on integers this graph runs at 0.87x of the speed" in row.why["decoder_with_past"]


def test_the_figures_of_a_choice_that_was_refused_are_not_reported():
    compiled = slow_at_out(50000.0)
    compilations = {}
    for name, machine in compiled.items():
        compilations[name] = Compilation(
            sources()[name], Options(calibration=complete_feeds()[name], stopwatch=machine, min_sqnr=0.0)
        )
        compilations[name].prepare()
    shared = find_shared(compilations)
    decided = {name: Decided(c, *c.decide(frozenset())) for name, c in compilations.items()}
    agree(decided, shared)
    refused = decided["decoder_with_past"]
    assert "slower than float" in refused.refused["/out/MatMul"]
    assert refused.forms.get("/out/MatMul", "float") == "float"
    assert refused.figures == {}
    figures = compilations["decoder_with_past"].decider.figures["agreement"]
    assert figures == {"offered": 1, "taken": 0}


def test_a_graph_that_would_miss_its_accuracy_bound_deviates():
    machines = {"decoder": InventedMachine(), "decoder_with_past": InventedMachine()}
    made = decided(machines, {"decoder_with_past": 60.0})
    whys = [row.why["decoder_with_past"] for row in made.report.deviations]
    assert whys
    assert all("on integers this graph misses its accuracy bound" in why for why in whys)
    assert made["decoder_with_past"].report.quality.worst >= 60.0  # type: ignore[union-attr]


def test_the_record_repeats_what_was_agreed_without_a_clock():
    made = decided(slow_at_out(235.0))
    again = qcompiler.compile_together(
        {name: sources()[name] for name in made}, calibration=complete_feeds(), decisions=made.decisions  # type: ignore[arg-type]
    )  # fmt: skip
    assert {n: again[n].to_bytes() for n in again} == {n: made[n].to_bytes() for n in made}
    assert again.decisions.to_json() == made.decisions.to_json()
    assert again.weights == made.weights


def test_activations_that_read_shared_weights_are_not_smoothed():
    from qcompiler.calibration.statistics import Statistics
    from qcompiler.smoother import choose_alphas, smoothable_channels

    spiky = [
        {**feed, "encoder_hidden_states": feed["encoder_hidden_states"] * np.where(np.arange(64) == 3, 300, 1)}
        for feed in complete_feeds()["decoder"]
    ]
    spiky = [{n: a.astype(np.float32) if a.dtype.kind == "f" else a for n, a in feed.items()} for feed in spiky]
    compilation = Compilation(sources()["decoder"], Options(calibration=spiky))
    compilation.prepare()
    assert isinstance(compilation.data.statistics, Statistics)
    channels = smoothable_channels(compilation.workshop, compilation.data.statistics)
    assert "encoder_hidden_states" in choose_alphas(compilation.workshop, channels)
    assert "encoder_hidden_states" not in choose_alphas(compilation.workshop, channels, frozenset({"/key/MatMul"}))


@pytest.mark.parametrize("target", ["tensorrt-sm89", "openvino", "ort-arm"])
def test_targets_that_nothing_is_timed_for_share_weights_as_well(target: str, tmp_path: Path):
    pair = {name: sources()[name] for name in ("decoder", "decoder_with_past")}
    made = qcompiler.compile_together(pair, target=target, calibration=complete_feeds(), guard=False)
    made.save(tmp_path / "out")
    assert made.report.saved > EMBEDDING.nbytes // 2
    for name in pair:
        onnx.checker.check_model(str(tmp_path / "out" / f"{name}.onnx"))


def test_dumps_lie_in_a_folder_per_graph_and_progress_names_the_graph(tmp_path: Path):
    lines: list[str] = []
    build(dump=tmp_path / "dump", progress=lines.append)
    assert sorted(p.name for p in (tmp_path / "dump").iterdir()) == sorted(NAMES)
    assert all((tmp_path / "dump" / name / "pipeline.json").is_file() for name in NAMES)
    assert {line.split("]")[0] for line in lines} == {f"[{name}" for name in NAMES}
    assert "[decoder] canonicalize" in lines


def test_a_set_of_one_graph_is_that_graph(tmp_path: Path):
    feeds = calibration()["encoder"]
    made = qcompiler.compile_together({"encoder": sources()["encoder"]}, calibration={"encoder": feeds}, guard=False)
    alone = qcompiler.compile(sources()["encoder"], calibration=feeds, guard=False)
    assert made["encoder"].to_bytes() == alone.to_bytes()
    assert made.weights == ()
    assert made.report.stored == ()


def test_replaced_options_do_not_reach_other_graphs():
    pinned = {"decoder": [*complete_feeds()["decoder"]]}
    options = Options(calibration=pinned["decoder"], guard=False)
    pair = {"decoder": options, "decoder_with_past": replace(options, calibration=None)}
    made = compile_set({name: sources()[name] for name in pair}, pair)
    assert not any("no calibration data" in w for w in made["decoder"].report.warnings)
    assert any("no calibration data" in w for w in made["decoder_with_past"].report.warnings)


def test_an_engines_own_files_hold_their_own_weights(plain: CompiledSet, tmp_path: Path):
    text = r"files is 'plan', but encoder was compiled for ort-.*, which is written as onnx; give files='onnx'"
    with pytest.raises(qcompiler.TargetError, match=text):
        plain.save(tmp_path / "out", files="plan")
    assert not (tmp_path / "out").exists()
    with pytest.raises(qcompiler.TargetError, match="files is 'bin'; expected one of onnx, xml, plan, qc"):
        plain.save(tmp_path / "out", files="bin")


def two(target: str) -> CompiledSet:
    pair = {name: sources()[name] for name in ("decoder", "decoder_with_past")}
    return qcompiler.compile_together(pair, target=target, calibration=complete_feeds(), guard=False)


def test_a_set_for_triton_is_written_as_artifacts_and_as_nothing_else(tmp_path: Path):
    made = two("triton-sm90")
    for kind in ("onnx", "xml", "plan"):
        with pytest.raises(
            qcompiler.TargetError, match=f"files is '{kind}', but decoder was compiled for triton-sm90, "
        ):
            made.save(tmp_path / "out", files=kind)
    assert not (tmp_path / "out").exists()
    written = made.save(tmp_path / "out")
    assert [p.name for p in written.files] == ["decoder.qc", "decoder_with_past.qc", "decisions.json"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in written.files)
    for name in made:
        artifact = load_artifact(tmp_path / "out" / f"{name}.qc")
        assert artifact.sm == 90
        assert [p.name for p in artifact.program.inputs] == [str(v.name) for v in made[name].model.graph.inputs]
    assert made.save(tmp_path / "out", files="qc").files == written.files  # replaces its own


def test_a_failure_in_the_second_engine_file_says_so_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = two("openvino")

    def save(backend: Backend, model: object, path: Path) -> Written:
        path.with_suffix(".bin").write_bytes(b"half")
        if path.stem == "decoder_with_past":
            raise qcompiler.ModelError(f"cannot write {path}: No space left on device")
        path.write_bytes(b"<net/>")
        return Written((path, path.with_suffix(".bin")))

    monkeypatch.setattr(type(open_backend(made["decoder"].target)), "save", save)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "decoder.xml").write_bytes(b"mine")
    text = f"^cannot write {tmp_path / 'old' / 'decoder_with_past.xml'}: No space left on device$"
    with pytest.raises(qcompiler.ModelError, match=text):
        made.save(tmp_path / "old", files="xml")
    assert [(p.name, p.read_bytes()) for p in (tmp_path / "old").iterdir()] == [("decoder.xml", b"mine")]
    with pytest.raises(qcompiler.ModelError, match="No space left on device"):
        made.save(tmp_path / "new", files="xml")
    assert not (tmp_path / "new").exists()


def test_the_command_that_is_left_to_do_names_the_files_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = two("tensorrt-sm89")
    monkeypatch.setattr("qcompiler.backends.tensorrt.probe.Prober.builds", lambda prober, sm: False)
    written = made.save(tmp_path / "it's", files="plan")
    assert [p.name for p in written.files] == ["decoder.plan.onnx", "decoder_with_past.plan.onnx", "decisions.json"]
    assert all(p.is_file() for p in written.files)
    words = [word for line in written.note.splitlines()[1:] for word in shlex.split(line.partition("that GPU: ")[2])]
    place = tmp_path / "it's"
    assert f"--onnx={place / 'decoder.plan.onnx'}" in words
    assert f"--saveEngine={place / 'decoder_with_past.plan'}" in words


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "it is empty"), ("a/b", "it holds /"), ("a\\b", r"it holds \\"), ("C:a", "it holds :"),
        ("a=b", "it holds ="),
        ("past_*", r"it holds \*"), ("a\0b", "it holds a control character"),
        ("a\nb", "it holds a control character"),
        ("a\u2028b", "it holds a control character"), ("a\ud800", "it holds a control character"),
        (".a", "begins or ends with a dot or a space"), ("a.", "ends with a dot"), ("..", "begins or ends with a dot"),
        ("a ", "begins or ends with a dot or a space"), (" a", "begins or ends with a dot or a space"),
        ("NUL", "Windows reserves it for a device"), ("con.past", "Windows reserves it"), ("Lpt1", "Windows reserves"),
        (7, "expected a text, found int"), (None, "expected a text, found NoneType"), ("é" * 101, "longer than 200"),
    ],
)  # fmt: skip
def test_a_name_that_no_file_or_option_can_have_is_one_error(name: str, why: str):
    with pytest.raises(qcompiler.ModelError, match=f"cannot be the name of a graph: .*{why}.*; files are named after"):
        qcompiler.compile_together({name: sources()["encoder"]}, guard=False)


def test_names_that_files_can_have_are_taken(tmp_path: Path):
    names = ("decoder with past", "console", "com10", "模型.v2", "a-b_c+d")
    made = qcompiler.compile_together(dict.fromkeys(names, sources()["encoder"]), guard=False, target="ort-x86")
    made.save(tmp_path / "out")
    assert {p.stem for p in (tmp_path / "out").glob("*.onnx")} == set(names)
    with pytest.raises(qcompiler.ModelError, match="names that differ in case only"):  # é as one sign and as two
        qcompiler.compile_together(dict.fromkeys(("\u00e9", "e\u0301"), sources()["encoder"]), guard=False)


def test_bad_names_and_tables_are_one_error():
    encoder = sources()["encoder"]
    with pytest.raises(qcompiler.ModelError, match="names that differ in case only: a, A"):
        qcompiler.compile_together({"a": encoder, "A": encoder}, guard=False)
    with pytest.raises(qcompiler.ModelError, match="no model is given"):
        qcompiler.compile_together({}, guard=False)
    with pytest.raises(qcompiler.ModelError, match="calibration is given for 'b', which is no graph of this build: a"):
        qcompiler.compile_together({"a": encoder}, calibration={"b": []}, guard=False)
    with pytest.raises(qcompiler.ModelError, match="b: the model is empty"):
        qcompiler.compile_together({"a": encoder, "b": b""}, guard=False)
    with pytest.raises(qcompiler.BudgetError, match="a: a metric needs evaluation data"):
        qcompiler.compile_together({"a": encoder}, metric=lambda outputs, feeds: 0.0)
