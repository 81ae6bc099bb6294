"""The GPU benchmark without a GPU: every case against the NumPy references, and what happens when something fails."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qcompiler.kernels.catalog import kernel_names

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = (
    "gpu", "gpu_cases", "gpu_more_cases", "gpu_float_cases", "gpu_machines", "gpu_tables", "gpu_models", "checkout",
)  # fmt: skip

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs pip install qcompiler[triton]")


@dataclass(frozen=True)
class Bench:
    """The modules of the benchmark, which stand beside each other and not in a package."""

    gpu: ModuleType
    cases: ModuleType
    machines: ModuleType
    tables: ModuleType

    def run(self, machine: Any, cases: Any, out: Path, budget: float = 1e9, **more: Any) -> Any:
        said: list[str] = []
        return self.gpu.run_cases(machine, cases, budget, out, said.append, **more), said


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield Bench(*(importlib.import_module(n) for n in ("gpu", "gpu_more_cases", "gpu_machines", "gpu_tables")))
    for name in MODULES:
        sys.modules.pop(name, None)


def test_every_kernel_has_cases_and_the_main_one_of_each_comes_first(bench: Bench) -> None:
    cases = bench.cases.all_cases()
    assert {c.kernel for c in cases} == set(kernel_names())
    assert len({c.name for c in cases}) == len(cases)
    assert {c.kernel for c in cases[: len(kernel_names())]} == set(kernel_names())


def test_each_case_agrees_with_the_numpy_reference(bench: Bench, tmp_path: Path) -> None:
    """One case of each kind; the torch references and the NumPy references were written independently."""
    cases = bench.cases.all_cases()
    kinds = list({(c.kernel, json.dumps([dict(c.options), c.tiny], sort_keys=True)): c for c in cases}.values())
    results, said = bench.run(bench.machines.DryMachine(), kinds, tmp_path)
    assert [(r.name, r.error, r.wrong) for r in results if r.error or r.wrong] == []
    assert [(r.name, rival.error) for r in results for rival in r.rivals if rival.error] == []
    assert all(len(r.runs) == len(rival.runs) == bench.gpu.ROUNDS for r in results for rival in r.rivals)
    assert all(r.config and r.bytes > 0 and r.floor_us > 0 for r in results)
    assert len(said) == len(kinds) + 2


def test_full_shapes_are_legal_calls_with_a_configuration(bench: Bench) -> None:
    from qcompiler.kernels.tuning.ranking import least_traffic

    macs = {}
    for case in bench.cases.all_cases():
        work = bench.machines._work(case, "sm90", case.dims)
        assert bench.machines.config_of(work, "sm90")
        macs[case.name] = least_traffic(work).macs
    assert macs["K1 int8_matmul 8192x8192x8192, requantized"] == 8192**3
    assert macs["K8 int8_conv 3x3/1 64->64 at 56, batch 64"] == 64 * 56 * 56 * 64 * 64 * 9
    assert macs["K8 int8_conv 7x7/2 16->64 at 224, batch 1"] == 112 * 112 * 64 * 16 * 49
    assert macs["K6 decode_attention B=16 S=8192 int8 per token"] == 2 * 16 * 32 * 8192 * 128


def test_a_kernel_that_fails_is_reported_and_the_others_go_on(bench: Bench, tmp_path: Path) -> None:
    class Machine(bench.machines.DryMachine):  # type: ignore[misc, name-defined]
        def launcher(self, work: Any, given: Any, config: Any) -> Any:
            if work.kernel == "fp8_matmul":
                raise RuntimeError("no kernel image\nfor this device")
            run = super().launcher(work, given, config)
            if work.kernel != "norm_quantize":
                return run

            def spoiled() -> None:
                run()
                given["out"][0, 0] ^= 0x40

            return spoiled

    wanted = ("int8_matmul", "fp8_matmul", "norm_quantize")
    cases = {c.kernel: c for c in reversed(bench.cases.all_cases()) if c.kernel in wanted}
    results, _ = bench.run(Machine(), [cases[name] for name in wanted], tmp_path)
    assert [bool(r.runs) for r in results] == [True, False, True]
    assert results[1].error == "RuntimeError: no kernel image for this device"
    assert results[2].wrong.startswith("out differs by ")
    page = (tmp_path / "gpu.md").read_text()
    assert "failed" in page
    assert f"- {results[1].name}: {results[1].error}" in page
    assert [c["wrong"] == "" for c in json.loads((tmp_path / "gpu.json").read_text())["cases"]] == [True, True, False]


def test_a_rival_that_fails_is_left_out(bench: Bench, tmp_path: Path) -> None:
    def rivals(given: Any, compiler: Any) -> Any:
        def broken() -> None:
            raise RuntimeError("not implemented for this GPU")

        return {"broken": broken, "fine": lambda: None}

    case = replace(bench.cases.all_cases()[0], rivals=rivals)
    [result], _ = bench.run(bench.machines.DryMachine(), [case], tmp_path)
    assert result.wrong == result.error == ""
    assert set(result.ratios) == {"fine"}
    assert [r.error for r in result.rivals if r.name == "broken"] == ["RuntimeError: not implemented for this GPU"]


def test_the_budget_ends_it_and_a_second_run_goes_on(bench: Bench, tmp_path: Path) -> None:
    cases = bench.cases.all_cases()[:4]
    machine = bench.machines.DryMachine(step=1.0)
    results, _ = bench.run(machine, cases, tmp_path, budget=1.0)
    assert [r.error for r in results] == ["", *["not run: out of time"] * 3]
    before = [r for r in bench.tables.read_results(tmp_path) if not r.error]
    assert before == results[:1]
    results, said = bench.run(bench.machines.DryMachine(), cases[:2], tmp_path, before=before)
    assert [r.error for r in results] == ["", ""]
    assert not any(cases[0].name in text for text in said)


def test_a_lost_device_ends_the_process_with_all_results_written(bench: Bench, tmp_path: Path) -> None:
    class Machine(bench.machines.DryMachine):  # type: ignore[misc, name-defined]
        def release(self) -> bool:
            return False

    cases = bench.cases.all_cases()[:2]
    with pytest.raises(bench.gpu.DeviceLostError, match=r"K1 int8_matmul"):
        bench.run(Machine(), cases, tmp_path)
    assert [r.name for r in bench.tables.read_results(tmp_path)] == [cases[0].name]


def test_figures_of_a_result(bench: Bench) -> None:
    rivals = [bench.tables.RivalResult("theirs", [30.0, 20.0, 40.0]), bench.tables.RivalResult("none", error="no")]
    result = bench.tables.CaseResult("K", "k", "case", bytes=10**7, macs=10**9, floor_us=5.0, rivals=rivals)
    assert (result.microseconds, result.ratios, result.roofline) == (None, {}, None)
    result.runs = [10.0, 20.0, 10.0, 9.0, 11.0]
    found = result.to_json()
    assert (found["microseconds"], found["minimum"], found["roofline"]) == (10.0, 9.0, 0.5)
    assert found["ratios"] == {"theirs": 3.0}
    assert found["tops"] == pytest.approx(200)
    assert found["gigabytes_per_second"] == pytest.approx(1000)
    assert found["spread"] == pytest.approx(1.1)
    assert result.line() == "K k case: 10.00 us, 50% of the roofline, 3.00x theirs"


def test_the_command_runs_dry_and_needs_a_gpu_otherwise(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry", "--only", "K2", "--out", str(tmp_path)])
    assert bench.gpu.main() == 0
    assert "cases are right" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "no such case"])
    assert bench.gpu.main() == 2
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.gpu.main() == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: timing needs an NVIDIA GPU that torch can use; found none")


def test_whole_models_run_through_the_executor(bench: Bench, tmp_path: Path) -> None:
    models = importlib.import_module("gpu_models")
    [result] = models.run_models(bench.machines.DryMachine(), 1e9, tmp_path, lambda text: None)
    assert result.error == ""
    assert set(result.runs) == {"ours", "torch fp16", "torch.compile fp16"}
    assert result.sqnr_db["ours"] > 25
    assert result.sqnr_db["torch fp16"] > 35  # bfloat16 on the CPU
    assert json.loads((tmp_path / "gpu-models.json").read_text())[0]["name"] == "encoder, tiny"
    [late] = models.run_models(bench.machines.DryMachine(), 0.0, tmp_path, lambda text: None)
    assert late.error == "not run: out of time"


INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="needs triton and a process with TRITON_INTERPRET=1",
)


@pytest.mark.interpreter
@INTERPRETED
@pytest.mark.parametrize("kernel", kernel_names())
def test_the_real_kernels_give_what_the_cases_expect(bench: Bench, tmp_path: Path, kernel: str) -> None:
    """All that a GPU does but the timing: launches as they are prepared there, interpreted, at tiny shapes."""
    from qcompiler.backends.triton.stopwatch import prepared, with_scratch
    from qcompiler.kernels.proof.interpreting import interpreted, repair_interpreter

    repair_interpreter()

    class Machine(bench.machines.DryMachine):  # type: ignore[misc, name-defined]
        def launcher(self, work: Any, given: Any, config: Any) -> Any:
            launch = prepared(work, with_scratch(work, given, config, "cpu"), config)

            def run() -> None:
                with interpreted():
                    launch()

            return run

    case = next(c for c in bench.cases.all_cases() if c.kernel == kernel)
    [result], _ = bench.run(Machine(), [case], tmp_path)
    assert (result.error, result.wrong) == ("", "")


@pytest.mark.interpreter
@INTERPRETED
def test_the_timer_compares_results_of_configurations() -> None:
    import torch

    from qcompiler.backends.triton.stopwatch import GpuTimer, difference, sets_needed
    from qcompiler.kernels.call import Case
    from qcompiler.kernels.config import config
    from qcompiler.kernels.proof.interpreting import interpreted, repair_interpreter
    from qcompiler.kernels.tuning.timing import Place
    from qcompiler.kernels.tuning.work import make_work

    repair_interpreter()
    timer = GpuTimer(Place("sm90", "none", "", "3.6.0", ""), cache=1 << 20, device="cpu")
    work = make_work("norm_quantize", "sm90", Case("", {"M": 16, "N": 64}, {"norm": "rms"}))
    with interpreted():
        assert timer.check(work, config({"ROWS": 4}), config({"ROWS": 1})) == ""
        timer.trusted[0].neg_()
        assert timer.check(work, config({"ROWS": 4}), config({"ROWS": 1})).startswith(
            "its results differ from the ship"
        )
    assert sets_needed(100 << 20, 60 << 20, 100 << 30) == 3
    assert sets_needed(1 << 10, 60 << 20, 100 << 30) == 64
    assert sets_needed(50 << 30, 60 << 20, 100 << 30) == 1
    assert difference(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])) == pytest.approx(1 / 18**0.5)
    assert difference(torch.tensor([float("nan")]), torch.tensor([1.0])) == float("inf")
    assert difference(torch.tensor([float("inf"), 1.0]), torch.tensor([float("inf"), 1.0])) == 0.0


class FakeGpu:
    """A clock that launches move, and what of ``torch.cuda`` reads it; those in a graph count at its replay."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, capture: bool = True) -> None:
        import torch

        self.now, self.captured, self.replays = 0.0, None, 0
        self.can_capture = capture
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = gpu.now

            def elapsed_time(self, other: Event) -> float:
                return (other.at - self.at) / 1e3

        class Graph:
            length = 0.0

            def replay(self) -> None:
                gpu.replays += 1
                gpu.now += self.length

        class Stream:
            def wait_stream(self, other: Any) -> None:
                pass

        @contextlib.contextmanager
        def capturing(graph: Graph) -> Iterator[None]:
            if not gpu.can_capture:
                raise RuntimeError("operation not permitted when stream is capturing")
            start = gpu.now
            yield
            graph.length, gpu.now = (gpu.now - start) / 2, start  # without the host, launches take half as long

        names = {"Event": Event, "CUDAGraph": Graph, "Stream": Stream, "graph": capturing, "current_stream": Stream}
        names |= {"synchronize": lambda: None, "stream": lambda s: contextlib.nullcontext()}
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def launch(self, microseconds: float) -> Any:
        def run() -> None:
            self.now += microseconds

        return run


def test_short_calls_are_replayed_from_a_graph_and_long_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from qcompiler.backends.triton.stopwatch import Clock

    gpu, clock = FakeGpu(monkeypatch), Clock()
    short = [gpu.launch(20.0), gpu.launch(40.0)]
    assert clock.warm(short) == pytest.approx(30.0)
    assert clock.measure(short, 30.0) == pytest.approx(15.0)
    assert gpu.replays == 1 + 2000 // 30
    clock.measure(short, 30.0)
    assert gpu.replays == 1 + 2 * (2000 // 30)  # the graph is kept
    clock.forget()
    assert clock.graphs == {}
    before = gpu.replays
    start = gpu.now
    assert clock.measure([gpu.launch(600.0)], 600.0) == pytest.approx(600.0)
    assert gpu.replays == before
    assert gpu.now - start == pytest.approx(16 * 600.0)  # some ten milliseconds


def test_what_cannot_be_captured_is_timed_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from qcompiler.backends.triton.stopwatch import Clock

    gpu = FakeGpu(monkeypatch, capture=False)
    assert Clock().measure([gpu.launch(20.0), gpu.launch(40.0)], 30.0) == pytest.approx(30.0)
    assert gpu.replays == 0


def test_tuning_on_a_bare_machine_needs_candidates_and_a_gpu(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tune = importlib.import_module("gpu_tune")
    monkeypatch.setattr(sys, "argv", ["gpu_tune.py", str(tmp_path / "absent"), "--out", str(tmp_path)])
    assert tune.main() == 2
    assert capsys.readouterr().err.startswith("error: no candidates in ")
    sys.modules.pop("gpu_tune")
