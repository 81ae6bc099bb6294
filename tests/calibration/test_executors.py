"""Executors by name and from outside: other processes, a cluster, and processes that are killed."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.calibration.executors import Workers, open_workers
from qcompiler.calibration.statistics import Parts
from qcompiler.errors import CalibrationError
from tests.calibration.sharing import DEADLY, as_bytes, deadly_engine, feeds, plan, share

LOST = "a worker was lost (BrokenProcessPool); its samples were run again"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return as_bytes(share("inline", of=plan(parts={"h": Parts(1)})).statistics, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def on_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield a folder whose modules processes started from here can import."""
    folder = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder
    sys.modules.pop("deadly", None)


def deadly(folder: Path, always: bool = False) -> OrtEngine:
    (folder / "died").unlink(missing_ok=True)
    return deadly_engine(folder, always)


class TestTexts:
    @pytest.mark.parametrize(
        "text", ["fibres", "threads:0", "threads:-1", "threads:two", "threads:²", "inline:2", "dask:2", "processes:1:2"]
    )
    def test_an_unknown_one_is_an_error(self, text: str) -> None:
        with pytest.raises(CalibrationError) as caught:
            open_workers(text)
        assert str(caught.value) == (
            f"unknown executor {text!r}; expected inline, threads, threads:N, processes, processes:N or dask"
        )

    def test_what_is_no_executor_is_an_error(self) -> None:
        with pytest.raises(CalibrationError, match=r"^executor is a int; expected a concurrent\.futures\.Executor"):
            open_workers(4)  # type: ignore[arg-type]

    def test_counts(self) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        assert open_workers("inline").count == 1
        assert open_workers("threads:3").count == 3
        assert open_workers("processes:5").count == 5
        assert open_workers(None).count == open_workers("threads").count == min(cores or 1, 4)
        with ThreadPoolExecutor(3) as own:
            assert open_workers(own).count == 3

    def test_which_workers_see_this_process(self) -> None:
        assert open_workers("inline").inline
        with open_workers("threads:1") as threads, open_workers("processes:1") as processes:
            assert (threads.inline, threads.shares_memory) == (False, True)
            assert (processes.inline, processes.shares_memory) == (False, False)

    def test_an_executor_from_outside_is_left_open(self) -> None:
        with ThreadPoolExecutor(1) as own:
            with open_workers(own) as workers:
                assert workers.executor is own
                assert not workers.renew()
            assert own.submit(int, "7").result() == 7

    def test_an_executor_made_here_is_closed_and_can_be_replaced(self) -> None:
        workers = Workers("threads:1")
        with workers:
            first = workers.executor
            assert workers.executor is first
            assert workers.renew()
            second = workers.executor
            assert second is not first
        for closed in (first, second):
            with pytest.raises(RuntimeError, match="after shutdown"):
                closed.submit(int)


class TestProcesses:
    def test_two_processes_give_the_same_and_one_that_is_killed_counts_once(
        self, undisturbed: bytes, on_path: Path, tmp_path: Path
    ) -> None:
        engine = deadly(on_path)
        gathered = share("processes:2", of=plan(engine, parts={"h": Parts(1)}))
        assert (on_path / "died").exists()
        assert as_bytes(gathered.statistics, tmp_path) == undisturbed
        assert gathered.statistics.feeds == len(gathered.digests) == 40
        assert gathered.notes == [LOST]

    def test_one_that_always_dies_at_a_feed_is_an_error_that_names_it(self, on_path: Path) -> None:
        with pytest.raises(
            CalibrationError, match=r"^samples \d+ to \d+ failed 3 times, .* BrokenProcessPool: "
        ) as caught:
            share("processes:1", feeds()[DEADLY - 1 : DEADLY + 1], of=plan(deadly(on_path, always=True)))
        assert "lower the calibration memory or the number of workers" in str(caught.value)

    def test_a_pool_of_the_callers_that_breaks_leaves_the_rest_to_this_process(
        self, undisturbed: bytes, on_path: Path, tmp_path: Path
    ) -> None:
        engine = deadly(on_path)
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as own:
            gathered = share(own, of=plan(engine, parts={"h": Parts(1)}))
        assert as_bytes(gathered.statistics, tmp_path) == undisturbed
        assert gathered.notes == [LOST, "the executor broke; the rest ran in the calling process"]

    def test_nan_arrives_as_one_error(self) -> None:
        given = feeds(8)
        given[5] = {"x": -given[5]["x"] - 1}
        with pytest.raises(CalibrationError, match=r"^sample 5: tensor 'r' holds NaN although the inputs are finite"):
            share("processes:2", given)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::UserWarning")
class TestDask:
    @pytest.fixture(scope="class")
    def cluster(self, on_path: Path) -> Iterator[Any]:
        """Yield a cluster of two processes on this machine."""
        distributed = pytest.importorskip("distributed", reason="the dask extra is not installed")
        deadly(on_path)
        # How long the scheduler tries to reach a worker that is gone; 30 seconds by default.
        quick = importlib.import_module("dask").config.set({"distributed.comm.timeouts.connect": "2s"})
        made = distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, memory_limit=None,
            silence_logs=logging.CRITICAL,
        )  # fmt: skip
        with quick, made:
            yield made

    def test_a_cluster_by_its_address(self, cluster: Any, undisturbed: bytes, tmp_path: Path) -> None:
        with open_workers(None, cluster.scheduler_address) as workers:
            assert workers.text == "dask"
            gathered = share(workers, of=plan(parts={"h": Parts(1)}))
        assert as_bytes(gathered.statistics, tmp_path) == undisturbed
        assert gathered.notes == []

    def test_nan_arrives_as_one_error(self, cluster: Any) -> None:
        given = feeds(8)
        given[5] = {"x": -given[5]["x"] - 1}
        with open_workers("dask", cluster.scheduler_address) as workers, pytest.raises(CalibrationError) as caught:
            share(workers, given)
        assert str(caught.value).startswith("sample 5: tensor 'r' holds NaN although the inputs are finite")

    def test_a_worker_that_is_killed_counts_once(
        self, cluster: Any, on_path: Path, undisturbed: bytes, tmp_path: Path
    ) -> None:
        distributed = importlib.import_module("distributed")
        engine = deadly(on_path)
        with distributed.Client(cluster) as client:
            executor = client.get_executor()
            gathered = share(executor, of=plan(engine, parts={"h": Parts(1)}))
            executor.shutdown()
        assert (on_path / "died").exists()
        assert as_bytes(gathered.statistics, tmp_path) == undisturbed
        assert gathered.statistics.feeds == len(gathered.digests) == 40

    def test_no_address_is_an_error(self) -> None:
        with pytest.raises(CalibrationError, match=r"give --scheduler tcp://host:8786$"):
            share("dask")

    def test_no_package_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "distributed", None)
        with pytest.raises(CalibrationError, match=r'^the dask executor needs Dask: pip install "qcompiler\[dask\]"$'):
            share(Workers("dask", "tcp://127.0.0.1:1"))
