"""`qcompiler.calibrate`: its file, when that is used again, and what compiling makes of its statistics."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner

import qcompiler
from qcompiler.calibration import feed_source
from qcompiler.calibration.qcal import load_qcal, read_qcal
from qcompiler.calibration.source_options import SourceOptions
from qcompiler.calibration.statistics import Parts
from qcompiler.calibrator import Calibration, CalibrationOptions, calibrate_model, journal_path
from qcompiler.cli import app
from qcompiler.engine import Feeds
from qcompiler.errors import CalibrationError
from tests import loops, synthetic
from tests.calibration.sharing import Copying, NotingEngine, as_bytes

F = np.float32
OPTIONS = CalibrationOptions(executor="inline")


def mlp(seed: int = 0) -> onnx.ModelProto:
    """Return x float32 [n, 16] to y [n, 16]."""
    weights = {"w0": synthetic.normal(seed, 16, 32, fan=16), "w1": synthetic.normal(seed + 1, 32, 16, fan=32)}
    lines = "h = MatMul(x, w0)\n r = Relu(h)\n y = MatMul(r, w1)"
    return synthetic.model(lines, {"x": ("n", 16)}, {"y": ("n", 16)}, weights)


def rows(count: int = 20) -> list[dict[str, Any]]:
    """Return feeds whose first number is their index / 64, as `NotingEngine` reads it."""
    made = synthetic.feeds_of({"x": (4, 16)}, count)
    for index, feed in enumerate(made):
        feed["x"][0, 0] = index / 64
    return made


class Place:
    """A folder with data in a file, and calibrations of it whose runs are counted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "s.qcal"
        self.save(rows())

    def save(self, feeds: list[dict[str, Any]]) -> None:
        np.savez(self.folder / "data.npz", x=np.concatenate([f["x"] for f in feeds]))

    def run(self, model: Any = None, **options: Any) -> tuple[Calibration, int]:
        """Return what calibrating gave, and how many feeds ran."""
        engine = options.pop("engine", None) or NotingEngine()
        made = replace(OPTIONS, output=self.output, **options)
        done = calibrate_model(model or mlp(), str(self.folder / "data.npz"), made, engine)
        return done, len(engine.indices)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


class TestStatistics:
    def test_ranges_are_those_of_numpy(self) -> None:
        weights = {i.name: numpy_helper.to_array(i) for i in mlp().graph.initializer}
        found = qcompiler.calibrate(mlp(), rows())
        x = np.concatenate([f["x"] for f in rows()])
        h = x @ weights["w0"]
        assert found.feeds == 20
        assert found.range("x") == (float(x.min()), float(x.max()))
        # Sums of 16 products in another order.
        bound = 16 * 2.0**-23 * float(np.abs(h).max())
        assert found.range("r") == pytest.approx((0.0, float(h.max())), abs=bound)
        assert found.tensors["x"].mean_square == pytest.approx(float(np.square(x, dtype=np.float64).mean()), rel=2**-20)

    def test_they_do_not_depend_on_executor_and_memory(self, tmp_path: Path) -> None:
        whole = as_bytes(qcompiler.calibrate(mlp(), rows()), tmp_path)
        with ThreadPoolExecutor(2) as own:
            for options in ({"executor": "inline"}, {"executor": own, "memory": 1}, {"executor": Copying()}):
                found = qcompiler.calibrate(mlp(), rows(), **options)  # type: ignore[arg-type]
                assert as_bytes(found, tmp_path) == whole

    def test_what_they_are_of_is_in_them(self, tmp_path: Path) -> None:
        found = qcompiler.calibrate(mlp(), rows(), output=tmp_path / "s.qcal")
        assert set(found.about) == {"graph", "data", "observed", "engine", "threads", "statistics"}
        assert found.about["engine"].startswith("onnxruntime ")
        assert read_qcal(tmp_path / "s.qcal").about == found.about
        other = qcompiler.calibrate(mlp(1), rows()[::-1])
        assert {k for k in found.about if found.about[k] != other.about[k]} == {"graph", "data"}

    def test_loops_and_branches(self) -> None:
        """The inner Loop makes three iterations in each of three of the outer one, on rows [3, 64]."""
        deep, flat = (qcompiler.calibrate(loops.nested_loops(), loops.nested_feeds(4, deep=d)) for d in (True, False))
        assert (deep.tensors["q"].executions, deep.tensors["q"].count) == (4, 4 * 9 * 3 * 64)
        assert (deep.tensors["m"].executions, deep.tensors["m"].count) == (4, 4 * 3 * 3 * 64)
        assert [deep.observed(n) for n in ("q", "vn")] == [True, False]
        assert [flat.observed(n) for n in ("q", "vn")] == [False, True]

    def test_chosen_ranges_are_in_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "s.qcal"
        found = qcompiler.calibrate(mlp(), rows(), estimators=["min-max", "percentile:99"], output=path)
        ranges = load_qcal(path).ranges
        assert set(ranges["x"]) == {"min-max", "percentile:99"}
        assert ranges["x"]["percentile:99"] == found.range("x", "percentile:99")

    def test_an_unknown_estimator_is_named_before_the_work(self) -> None:
        read: list[Feeds] = []
        with pytest.raises(CalibrationError, match="guess"):
            qcompiler.calibrate(mlp(), (read.append(f) or f for f in rows()), estimators=["guess"])  # type: ignore[func-returns-value]
        assert read == []

    def test_parts(self) -> None:
        found = qcompiler.calibrate(mlp(), rows(), parts={"x": Parts(-1)})
        low, high = found.ranges("x")
        x = np.concatenate([f["x"] for f in rows()])
        assert (low.tolist(), high.tolist()) == (x.min(0).tolist(), x.max(0).tolist())


class TestIterators:
    def test_they_are_read_once_and_never_stored(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(feed_source, "Spool", None)
        monkeypatch.setattr("qcompiler.calibration.readers.Spool", None)
        read: list[int] = []
        behind: list[int] = []

        def source() -> Iterator[Feeds]:
            for index, feed in enumerate(rows()):
                read.append(index)
                yield feed

        def progress(done: int, total: int | None) -> None:
            behind.append(len(read) - done)

        found = qcompiler.calibrate(mlp(), source(), executor="inline", progress=progress)
        assert read == list(range(20))
        assert set(behind) == {0}  # what is read is done before more is read
        assert as_bytes(found, tmp_path) == as_bytes(qcompiler.calibrate(mlp(), rows()), tmp_path)

    @pytest.mark.parametrize("form", ["mappings", "tuples", "arrays"])
    def test_they_may_give_what_lists_may(self, form: str, tmp_path: Path) -> None:
        made: dict[str, list[Any]] = {
            "mappings": list(rows()), "tuples": [(f["x"],) for f in rows()], "arrays": [f["x"] for f in rows()],
        }  # fmt: skip
        whole = as_bytes(qcompiler.calibrate(mlp(), rows()), tmp_path)
        for source in (made[form], iter(made[form]), lambda: iter(made[form])):
            assert as_bytes(qcompiler.calibrate(mlp(), source), tmp_path) == whole

    def test_the_limit_holds_for_them_too(self) -> None:
        sources = SourceOptions(limit=7)
        read: list[Feeds] = []
        found = qcompiler.calibrate(
            mlp(),
            (read.append(f) or f for f in rows()),
            sources=sources,
            executor="inline",  # type: ignore[func-returns-value]
        )
        assert found.feeds == len(read) == 7

    def test_a_feed_that_does_not_fit_is_named(self) -> None:
        bad = [*rows(3), {"x": np.ones((4, 15), F)}]
        text = r"^sample 3, input 'x': shape \[4, 15\], expected \['n', 16\]$"
        for source in (bad, iter(bad)):
            with pytest.raises(CalibrationError, match=text):
                qcompiler.calibrate(mlp(), source)

    def test_nothing_is_an_error(self) -> None:
        for source in ([], iter([])):
            with pytest.raises(CalibrationError, match="empty"):
                qcompiler.calibrate(mlp(), source)


class TestReuse:
    def test_nothing_runs_while_nothing_has_changed(self, place: Place) -> None:
        first, ran = place.run()
        written = place.output.read_bytes()
        assert (first.reused, ran > 0) == (False, True)
        second, again = place.run()
        assert (second.reused, again) == (True, 0)
        assert place.output.read_bytes() == written
        assert as_bytes(second.statistics, place.folder) == as_bytes(first.statistics, place.folder)

    def test_ranges_for_people_are_those_of_the_estimators_that_are_wanted_now(self, place: Place) -> None:
        place.run(estimators=("min-max",))
        whole = load_qcal(place.output)
        done, ran = place.run(estimators=("percentile:99", "min-max"))
        assert (done.reused, ran) == (True, 0)
        again = load_qcal(place.output)
        assert {e for by in again.ranges.values() for e in by} == {"percentile:99", "min-max"}
        assert again.ranges["x"]["percentile:99"] == done.statistics.range("x", "percentile:99")
        assert as_bytes(again.statistics, place.folder) == as_bytes(whole.statistics, place.folder)
        written = place.output.read_bytes()
        place.run(estimators=("min-max", "percentile:99"))
        assert place.output.read_bytes() == written

    def test_new_weights_are_calibrated(self, place: Place) -> None:
        place.run()
        done, ran = place.run(mlp(5))
        assert (done.reused, ran > 0) == (False, True)
        assert read_qcal(place.output).about == done.statistics.about

    def test_new_data_is_calibrated(self, place: Place) -> None:
        place.run()
        place.save(rows()[:12])
        done, _ = place.run()
        assert not done.reused
        assert read_qcal(place.output).range("x") == done.statistics.range("x")

    def test_other_observed_values_are_calibrated(self, place: Place) -> None:
        place.run()
        done, _ = place.run(parts={"x": Parts(1)})
        assert not done.reused
        assert place.run(parts={"x": Parts(1)})[0].reused
        assert not place.run(parts={"x": Parts(1, 4)})[0].reused
        assert not place.run()[0].reused

    def test_another_engine_is_calibrated(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        place.run()
        assert not place.run(threads=2)[0].reused
        assert place.run(threads=2)[0].reused
        monkeypatch.setattr(NotingEngine, "version", "99")
        done, _ = place.run(threads=2)
        assert not done.reused
        assert done.statistics.about["engine"] == "onnxruntime 99"

    def test_data_without_identity_is_calibrated_each_time(self, tmp_path: Path) -> None:
        options = replace(OPTIONS, output=tmp_path / "s.qcal")
        for _ in range(2):
            engine = NotingEngine()
            assert not calibrate_model(mlp(), rows(), options, engine).reused
            assert engine.indices == list(range(20))

    def test_a_damaged_file_is_replaced(self, place: Place) -> None:
        place.run()
        whole = place.output.read_bytes()
        for bad in (b"", whole[: len(whole) // 2], b"text"):
            place.output.write_bytes(bad)
            assert not place.run()[0].reused
            assert place.output.read_bytes() == whole

    def test_a_run_that_stopped_early_does_not_stand_in_for_a_whole_one(self, place: Place) -> None:
        place.save([{"x": np.full((32, 16), 0.5, F)}] * 40)
        early, _ = place.run(until_stable=0.01)
        assert early.stopped
        done, _ = place.run()
        assert not done.reused
        assert done.statistics.feeds > early.statistics.feeds


class TestResume:
    def interrupt(self, folder: Path, at: int = 13, **options: Any) -> None:
        def source() -> Iterator[Feeds]:
            yield from rows()[:at]
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            qcompiler.calibrate(mlp(), source(), output=folder / "s.qcal", **options)

    @pytest.mark.parametrize("executor", ["inline", "threads:3"])
    def test_the_file_is_that_of_an_undisturbed_run(self, executor: str, tmp_path: Path) -> None:
        output, journal = tmp_path / "s.qcal", journal_path(tmp_path / "s.qcal")
        qcompiler.calibrate(mlp(), rows(), output=output)
        whole = output.read_bytes()
        output.unlink()
        self.interrupt(tmp_path, executor=executor)
        assert journal.exists()
        assert not output.exists()
        engine = NotingEngine()
        done = calibrate_model(mlp(), rows(), replace(OPTIONS, output=output, resume=True), engine)
        assert output.read_bytes() == whole
        assert done.statistics.feeds == 20
        assert 7 <= len(engine.indices) < 20
        assert not journal.exists()

    def test_without_resuming_all_feeds_run(self, tmp_path: Path) -> None:
        self.interrupt(tmp_path, executor="inline")
        engine = NotingEngine()
        calibrate_model(mlp(), rows(), replace(OPTIONS, output=tmp_path / "s.qcal"), engine)
        assert engine.indices == list(range(20))
        assert not journal_path(tmp_path / "s.qcal").exists()

    def test_nothing_to_resume_is_a_run_from_the_start(self, tmp_path: Path) -> None:
        found = qcompiler.calibrate(mlp(), rows(), output=tmp_path / "s.qcal", resume=True)
        assert found.feeds == 20

    def test_another_model_is_an_error(self, tmp_path: Path) -> None:
        self.interrupt(tmp_path, executor="inline")
        text = r"^cannot resume from .*s\.qcal\.partial: the model changed: .*; run without resuming$"
        with pytest.raises(CalibrationError, match=text):
            qcompiler.calibrate(mlp(5), rows(), output=tmp_path / "s.qcal", resume=True)
        assert journal_path(tmp_path / "s.qcal").exists()

    def test_other_data_is_an_error(self, tmp_path: Path) -> None:
        self.interrupt(tmp_path, executor="inline")
        changed = rows()
        changed[2]["x"] = changed[2]["x"] + F(1)
        with pytest.raises(CalibrationError, match="sample 2 is not the one that the interrupted run saw"):
            qcompiler.calibrate(mlp(), changed, output=tmp_path / "s.qcal", resume=True)

    def test_other_options_are_an_error(self, tmp_path: Path) -> None:
        self.interrupt(tmp_path, executor="inline")
        with pytest.raises(CalibrationError, match="other tensors are wanted"):
            qcompiler.calibrate(mlp(), rows(), output=tmp_path / "s.qcal", resume=True, parts={"x": Parts(1)})

    def test_a_damaged_state_is_an_error(self, tmp_path: Path) -> None:
        journal_path(tmp_path / "s.qcal").write_bytes(b"nothing")
        with pytest.raises(CalibrationError, match=r"s\.qcal\.partial"):
            qcompiler.calibrate(mlp(), rows(), output=tmp_path / "s.qcal", resume=True)

    def test_resuming_needs_an_output(self) -> None:
        with pytest.raises(CalibrationError, match="resuming needs the output that the interrupted run was to write"):
            qcompiler.calibrate(mlp(), rows(), resume=True)


class TestCompiling:
    """Compiling sets every fifth feed aside, so its statistics are those of the four others."""

    FEEDS = synthetic.image_feeds(10)
    KEPT = tuple(f for i, f in enumerate(FEEDS) if i % 5 != 4)

    def test_statistics_give_what_their_feeds_give(self, tmp_path: Path) -> None:
        model = synthetic.regions_cnn()
        statistics = qcompiler.calibrate(model, list(self.KEPT), output=tmp_path / "s.qcal")
        direct = qcompiler.compile(model, calibration=self.FEEDS, guard=False)
        through = [
            qcompiler.compile(model, calibration=given, guard=False)
            for given in (statistics, tmp_path / "s.qcal", str(tmp_path / "s.qcal"))
        ]
        assert "QuantizeLinear" in {n.op_type for n in direct.model.graph.all_nodes()}
        for other in through:
            assert other.to_bytes() == direct.to_bytes()
            assert other.decisions == direct.decisions

    def test_statistics_of_other_feeds_give_another_model(self) -> None:
        model = synthetic.regions_cnn()
        small = [{n: a * F(0.1) for n, a in f.items()} for f in self.KEPT]
        one, other = (
            qcompiler.compile(model, calibration=qcompiler.calibrate(model, list(given)), guard=False)
            for given in (self.KEPT, small)
        )
        assert one.to_bytes() != other.to_bytes()

    def test_statistics_of_another_model_are_an_error(self, tmp_path: Path) -> None:
        path = tmp_path / "s.qcal"
        statistics = qcompiler.calibrate(mlp(), rows(), output=path)
        for given in (statistics, path):
            with pytest.raises(CalibrationError, match="the statistics are of another model, or of this"):
                qcompiler.compile(mlp(5), calibration=given, guard=False)

    def test_on_the_command_line_that_is_one_line_and_code_2(self, tmp_path: Path) -> None:
        qcompiler.calibrate(mlp(), rows(), output=tmp_path / "s.qcal")
        other = tmp_path / "other.onnx"
        onnx.save(mlp(5), other)
        arguments = ["compile", other, "-o", tmp_path / "o.onnx", "--calibration", tmp_path / "s.qcal"]
        done = CliRunner().invoke(app, list(map(str, arguments)))
        assert done.exit_code == 2
        assert "another model" in " ".join(done.stderr.split())
        assert not (tmp_path / "o.onnx").exists()
