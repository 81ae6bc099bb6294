"""Sharing feeds out: the same statistics bit for bit whatever the shards, and whatever happens on the way."""

from __future__ import annotations

import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import FrameType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.calibration import driver, recent_extremes, shards
from qcompiler.calibration.driver import gather
from qcompiler.calibration.executors import Workers, open_workers
from qcompiler.calibration.feed_digests import feed_digest
from qcompiler.calibration.observe import Observer, observe
from qcompiler.calibration.qcal import Journal, read_journal, write_journal
from qcompiler.calibration.recent_extremes import RECENT
from qcompiler.calibration.shards import Shard, observe_shard
from qcompiler.calibration.statistics import HALF_BINS, Parts, Statistics, TensorStatistics, merge_all, part_name
from qcompiler.engine import Feeds
from qcompiler.errors import CalibrationError
from tests.calibration.sharing import (
    NAMES,
    Copying,
    F,
    NotingEngine,
    as_bytes,
    feeds,
    interrupted,
    model,
    plan,
    share,
)

State = tuple[Statistics, dict[int, str]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return as_bytes(share("inline").statistics, tmp_path_factory.mktemp("undisturbed"))


class Late(ThreadPoolExecutor):
    """Threads that finish in any order."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        wait = random.Random(repr(args[1].indices)).random() * 0.004

        def late() -> Any:
            time.sleep(wait)
            return fn(*args)

        return super().submit(late)


class TestSharing:
    @pytest.mark.parametrize("shards", [1, 2, 7, 40])
    def test_shards_merged_in_any_order(self, shards: int, undisturbed: bytes, tmp_path: Path) -> None:
        given, made = feeds(), []
        for place in range(shards):
            own = range(place, len(given), shards)
            shard = Shard(tuple(own), tuple(given[i] for i in own), ("",) * len(own))
            made.append(observe_shard(Observer(model(), NAMES, OrtEngine(), squares=("h",)), shard))
        for seed in range(3):
            random.Random(seed).shuffle(made)
            assert as_bytes(merge_all(made), tmp_path) == undisturbed

    @pytest.mark.parametrize("executor", ["threads:1", "threads:3", "copies", "late"])
    def test_every_executor_gives_the_same(self, executor: str, undisturbed: bytes, tmp_path: Path) -> None:
        made: Executor | str = {"copies": Copying(), "late": Late(4)}.get(executor, executor)
        gathered = share(made)
        assert as_bytes(gathered.statistics, tmp_path) == undisturbed
        assert (gathered.notes, gathered.stopped) == ([], False)
        if isinstance(made, Late):
            made.shutdown()

    def test_that_equals_observing_in_a_plain_loop(self, undisturbed: bytes, tmp_path: Path) -> None:
        assert as_bytes(observe(model(), NAMES, feeds(), OrtEngine(), squares=("h",)), tmp_path) == undisturbed

    @pytest.mark.parametrize("memory", [1, 500])
    def test_the_memory_changes_no_bit(self, memory: int, undisturbed: bytes, tmp_path: Path) -> None:
        small = driver.Plan(model(), NAMES, OrtEngine(), memory=memory, squares=("h",))
        for executor in ("inline", "threads:2"):
            assert as_bytes(share(executor, of=small).statistics, tmp_path) == undisturbed

    def test_more_feeds_than_are_kept_one_by_one(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(recent_extremes, "RECENT", 5)
        one = share("inline").statistics
        late = Late(4)
        assert as_bytes(share(late).statistics, tmp_path) == as_bytes(one, tmp_path)
        late.shutdown()
        assert one.tensors["x"].recent.feeds.tolist() == [35, 36, 37, 38, 39]

    def test_parts_and_squares_reach_the_workers(self, tmp_path: Path) -> None:
        parts = {"h": Parts(1)}
        found = share(Copying(), of=plan(parts=parts)).statistics
        assert as_bytes(found, tmp_path) == as_bytes(share("inline", of=plan(parts=parts)).statistics, tmp_path)
        assert found.tensors[part_name("h", 2)].count > 0
        channels = found.tensors["h"].channels
        assert channels is not None
        assert channels.squares is not None

    def test_a_worker_that_did_another_run_of_this_model_does_not_mix_them_up(self) -> None:
        """One executor, as a cluster is, for several runs: its workers keep sessions from shard to shard."""
        cluster = Copying()
        assert part_name("h", 0) not in share(cluster).statistics.tensors
        assert part_name("h", 0) in share(cluster, of=plan(parts={"h": Parts(1)})).statistics.tensors
        fewer = driver.Plan(model(), ("x",), OrtEngine())
        assert list(share(cluster, of=fewer).statistics) == ["x"]

    def test_the_digest_of_the_data_is_that_of_its_feeds_in_order(self) -> None:
        found = [share(e).data_digest for e in ("inline", "threads:3", Copying())]
        assert len(set(found)) == 1
        assert share("inline", feeds()[::-1]).data_digest != found[0]
        assert share("inline", feeds()[:-1]).data_digest != found[0]

    def test_progress_counts_up_to_the_total(self) -> None:
        for executor in ("inline", "threads:2", Copying()):
            seen: list[tuple[int, int | None]] = []
            share(executor, progress=lambda d, t, seen=seen: seen.append((d, t)))
            assert seen[-1] == (40, 40)
            assert [d for d, _ in seen] == sorted({d for d, _ in seen})
            share(executor, iter(feeds(3)), progress=lambda d, t, seen=seen: seen.append((d, t)))
            assert seen[-1] == (3, None)

    def test_no_feeds_are_an_error(self) -> None:
        for executor in ("inline", "threads:2", Copying()):
            with pytest.raises(CalibrationError, match="the calibration source is empty; give at least one feed"):
                share(executor, [])


class TestReadingAhead:
    @pytest.mark.parametrize(("executor", "workers"), [("inline", 0), ("threads:2", 2), ("copies", 2)])
    def test_a_generator_is_read_no_further_ahead_than_a_bound(self, executor: str, workers: int) -> None:
        read = done = furthest = 0
        small = {"x": np.ones((1, 4), F)}

        def source() -> Iterator[Feeds]:
            nonlocal read, furthest
            for _ in range(2000):
                read += 1
                furthest = max(furthest, read - done)
                yield small

        def progress(feeds_done: int, total: int | None) -> None:
            nonlocal done
            done = feeds_done

        made: Executor | str = Copying() if executor == "copies" else executor
        found = share(made, source(), driver.Plan(model(), ("x",), OrtEngine()), progress=progress)
        assert found.statistics.feeds == done == 2000
        assert furthest <= (2 * workers + 1) * driver._MOST_FEEDS

    def test_large_feeds_make_small_shards(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(driver, "_MOST_BYTES", 64)  # four rows
        executor = Copying()
        share(executor, [{"x": np.ones((2, 4), F)}] * 20, driver.Plan(model(), ("x",), OrtEngine()))
        assert {len(shard.feeds) for _, shard in executor.calls} == {1, 2}


class TestMemory:
    def test_it_does_not_grow_with_the_number_of_feeds(self) -> None:
        """What arrays hold between two shards after 50 feeds is what they hold after any number."""
        only_arrays = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
        held: list[int] = []

        def note(done: int, _: int | None) -> None:
            if done == 1500 or (done >= 50 and not held):
                traces = tracemalloc.take_snapshot().filter_traces([only_arrays]).traces
                held.append(sum(trace.size for trace in traces))

        given = feeds()
        tracemalloc.start()
        try:
            share("inline", (given[i % 40] for i in range(1500)), progress=note)
        finally:
            tracemalloc.stop()
        early, late = held
        assert len(NAMES) * (2 * HALF_BINS + 2 * RECENT) * 8 < early  # every sketch is there
        assert late <= 1.01 * early


class TestLostWorkers:
    def test_a_shard_that_was_lost_runs_again_and_counts_once(self, undisturbed: bytes, tmp_path: Path) -> None:
        def lose(number: int) -> None:
            if number in (2, 5):
                raise OSError("connection lost")

        gathered = share(Copying(lose))
        assert as_bytes(gathered.statistics, tmp_path) == undisturbed
        assert gathered.notes == ["a worker was lost (OSError); its samples were run again"] * 2

    def test_a_shard_that_is_lost_again_and_again_is_an_error(self) -> None:
        def lose(number: int) -> None:
            if number >= 1:
                raise MemoryError("no room")

        executor = Copying(lose)
        text = (
            r"^samples 1 to 1 failed 3 times, the last time with MemoryError: no room; a worker may lack memory: lower "
            "the calibration memory or the number of workers$"
        )
        with pytest.raises(CalibrationError, match=text):
            share(executor)

    def test_an_executor_that_breaks_for_good_leaves_the_rest_to_this_process(
        self, undisturbed: bytes, tmp_path: Path
    ) -> None:
        def lose(number: int) -> None:
            if number >= 3:
                raise BrokenProcessPool("a child died")

        executor = Copying(lose)
        gathered = share(executor)
        assert as_bytes(gathered.statistics, tmp_path) == undisturbed
        assert gathered.notes == [
            "a worker was lost (BrokenProcessPool); its samples were run again",
            "the executor broke; the rest ran in the calling process",
        ]
        assert len(executor.calls) <= 3 + 2 * 2

    def test_an_executor_that_its_owner_shut_down_is_an_error(self) -> None:
        executor = ThreadPoolExecutor(1)
        executor.shutdown()
        with pytest.raises(CalibrationError, match="failed 3 times, the last time with RuntimeError: cannot"):
            share(executor)

    def test_workers_that_do_not_see_the_file_get_the_model_itself(
        self, undisturbed: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        shards._observer.cache_clear()
        seen = Path.is_file
        monkeypatch.setattr(Path, "is_file", lambda path: path.name != "model.onnx" and seen(path))
        executor = Copying()
        gathered = share(executor)
        assert as_bytes(gathered.statistics, tmp_path) == undisturbed
        assert gathered.notes == []
        payloads = [remote.payload is not None for remote, _ in executor.calls]
        assert payloads == sorted(payloads)
        assert 1 <= payloads.count(False) <= 4  # as many as were under way

    def test_the_file_for_the_workers_is_gone_afterwards(self) -> None:
        executor = Copying()
        share(executor)
        remote = executor.calls[0][0]
        assert Path(remote.path).name == "model.onnx"
        assert not Path(remote.path).parent.exists()


class TestErrors:
    @pytest.mark.parametrize("executor", ["inline", "threads:3", "copies"])
    def test_nan_comes_as_one_error_that_names_sample_and_tensor(self, executor: str) -> None:
        given = feeds()
        given[23] = {"x": -given[23]["x"] - 1}
        made: Executor | str = Copying() if executor == "copies" else executor
        with pytest.raises(CalibrationError, match=r"^sample 23: tensor 'r' holds NaN although the inputs are finite"):
            share(made, given)

    @pytest.mark.parametrize("executor", ["inline", "threads:3", "copies"])
    def test_what_the_engine_says_comes_with_the_sample(self, executor: str) -> None:
        given = feeds()
        given[5] = {"x": np.ones((2, 3), F)}
        made: Executor | str = Copying() if executor == "copies" else executor
        with pytest.raises(CalibrationError, match=r"^sample 5: onnxruntime could not run the model on this feed: "):
            share(made, given)

    def test_an_error_of_the_source_comes_as_it_is(self) -> None:
        def source() -> Iterator[Feeds]:
            yield from feeds(5)
            raise CalibrationError("sample 5 cannot be read")

        for executor in ("inline", "threads:2", Copying()):
            with pytest.raises(CalibrationError, match=r"^sample 5 cannot be read$"):
                share(executor, source())


class Saved:
    """Keeps a state as a file does: later changes do not reach it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.partial"
        self.times = 0

    def __call__(self, state: Statistics, digests: Mapping[int, str]) -> None:
        self.times += 1
        write_journal(Journal(state, dict(digests)), self.path)

    @property
    def state(self) -> State | None:
        if not self.path.exists():
            return None
        found = read_journal(self.path)
        return found.statistics, dict(found.digests)


class TestInterrupt:
    @pytest.mark.parametrize("executor", ["inline", "threads:3", "copies"])
    @pytest.mark.parametrize("at", [0, 1, 23, 40])
    def test_what_was_done_is_not_run_again_and_the_result_is_the_same(
        self, executor: str, at: int, undisturbed: bytes, tmp_path: Path
    ) -> None:
        saved = Saved(tmp_path)
        made: Executor | str = Copying() if executor == "copies" else executor
        with pytest.raises(KeyboardInterrupt):
            share(made, interrupted(feeds(), at), save=saved)
        done = set() if saved.state is None else set(saved.state[1])
        assert done <= set(range(at))
        if executor == "inline" and at > 20:
            assert len(done) >= at - driver._MOST_FEEDS
            assert done
        engine = NotingEngine()
        gathered = share("inline", of=plan(engine), resumed=saved.state, save=saved)
        assert as_bytes(gathered.statistics, tmp_path) == undisturbed
        assert sorted(engine.indices) == sorted(set(range(40)) - done)
        assert gathered.data_digest == share("inline").data_digest

    def test_an_interrupt_at_any_line_can_be_resumed(
        self, undisturbed: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """The user's key comes between any two steps; here it comes before every line of the driver in turn."""
        monkeypatch.setattr(driver, "_SAVE_SECONDS", 0.0)
        given = feeds(3)
        whole = as_bytes(share("inline", given).statistics, tmp_path)
        lines = interrupt_at_line(None, lambda: share("inline", given))
        assert lines > 100
        for number in range(1, lines):
            saved = Saved(tmp_path)
            saved.path.unlink(missing_ok=True)
            with pytest.raises(KeyboardInterrupt):
                interrupt_at_line(number, lambda saved=saved: share("inline", given, save=saved))
            gathered = share("threads:1", given, resumed=saved.state)
            assert as_bytes(gathered.statistics, tmp_path) == whole, f"interrupted before line {number}"

    def test_the_state_is_saved_now_and_then(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        saved = Saved(tmp_path)
        share("inline", save=saved)
        assert saved.times == 0
        monkeypatch.setattr(driver, "_SAVE_SECONDS", 0.0)
        share("inline", save=saved)
        assert saved.times > 1
        assert saved.state is not None
        assert (saved.state[0].feeds, len(saved.state[1])) == (40, 40)

    def test_an_interrupt_in_a_merge_keeps_what_was_saved_before(
        self, undisturbed: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """Sketches are merged in place: half a merge is nothing to go on from."""
        monkeypatch.setattr(driver, "_SAVE_SECONDS", 0.0)
        merge, merged = TensorStatistics.take_in, 0

        def interrupted_merge(tensor: TensorStatistics, other: TensorStatistics) -> None:
            nonlocal merged
            merged += 1
            if merged == 21:  # of six tensors in each shard
                raise KeyboardInterrupt
            merge(tensor, other)

        saved = Saved(tmp_path)
        monkeypatch.setattr(TensorStatistics, "take_in", interrupted_merge)
        with pytest.raises(KeyboardInterrupt):
            share("inline", save=saved)
        monkeypatch.setattr(TensorStatistics, "take_in", merge)
        state = saved.state
        assert state is not None
        assert 0 < state[0].feeds == len(state[1]) < 40
        assert as_bytes(share("inline", resumed=state).statistics, tmp_path) == undisturbed

    def half(self) -> State:
        gathered = share("inline", feeds()[:20])
        return gathered.statistics, gathered.digests

    def test_changed_data_is_an_error(self) -> None:
        changed = feeds()
        changed[7] = {"x": changed[7]["x"] * F(2)}
        text = r"^sample 7 is not the one that the interrupted run saw: the data changed; run without resuming$"
        with pytest.raises(CalibrationError, match=text):
            share("inline", changed, resumed=self.half())

    def test_data_that_ends_earlier_is_an_error(self) -> None:
        text = r"^the interrupted run saw sample 19, now there are 12 samples: the data changed; run without resuming$"
        for executor in ("inline", "threads:2"):
            with pytest.raises(CalibrationError, match=text):
                share(executor, feeds()[:12], resumed=self.half())

    def test_a_run_that_was_done_runs_nothing(self, undisturbed: bytes, tmp_path: Path) -> None:
        whole = share("inline")
        engine = NotingEngine()
        again = share("threads:2", of=plan(engine), resumed=(whole.statistics, whole.digests))
        assert engine.indices == []
        assert as_bytes(again.statistics, tmp_path) == undisturbed


def interrupt_at_line(number: int | None, call: Callable[[], object]) -> int:
    """Call, with an interrupt before the given line of the driver's file; return how many lines there were."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename != driver.__file__:
            return None
        if event == "line":
            count += 1
            if count == number:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


class TestUntilStable:
    SHARE = 0.05
    """Feeds grow evenly up to the 26th; checks come at 16, 24, 36 and 54 feeds."""

    def endless(self, read: list[int] | None = None) -> Iterator[Feeds]:
        for index in range(100_000):
            if read is not None:
                read.append(index)
            yield {"x": np.linspace(0.1, 1, 16, dtype=F).reshape(4, 4) * F(min(index + 1, 26))}

    @pytest.mark.parametrize("executor", ["inline", "threads:3", "copies"])
    def test_every_executor_stops_at_the_same_feed(self, executor: str, tmp_path: Path) -> None:
        read: list[int] = []
        one = share("inline", self.endless(read), plan(stable=self.SHARE))
        assert one.stopped
        assert one.statistics.feeds == len(read) == 54
        made: Executor | str = Copying() if executor == "copies" else executor
        other = share(made, self.endless(), plan(stable=self.SHARE))
        assert other.stopped
        assert as_bytes(other.statistics, tmp_path) == as_bytes(one.statistics, tmp_path)
        assert other.data_digest == one.data_digest

    def test_a_smaller_share_needs_more_feeds(self) -> None:
        counts = [share("inline", self.endless(), plan(stable=s)).statistics.feeds for s in (0.4, 0.1, 0.05)]
        assert counts == [24, 36, 54]

    def test_ranges_that_go_on_growing_take_all_feeds(self) -> None:
        growing = [{"x": np.full((1, 4), 1.2**i, F)} for i in range(60)]
        gathered = share("inline", growing, plan(stable=0.01))
        assert (gathered.stopped, gathered.statistics.feeds) == (False, 60)

    @pytest.mark.parametrize("executor", ["inline", "threads:3"])
    @pytest.mark.parametrize("at", [5, 16, 17, 24, 30, 50])
    def test_an_interrupted_run_stops_where_it_would_have(self, executor: str, at: int, tmp_path: Path) -> None:
        whole = share("inline", self.endless(), plan(stable=self.SHARE))
        assert whole.statistics.feeds == 54
        saved = Saved(tmp_path)
        first = [f for f, _ in zip(self.endless(), range(at), strict=False)]
        with pytest.raises(KeyboardInterrupt):
            share(executor, interrupted(first, at), plan(stable=self.SHARE), save=saved)
        assert (saved.state is None) == (at < 16)
        gathered = share(executor, self.endless(), plan(stable=self.SHARE), resumed=saved.state)
        assert gathered.stopped
        assert as_bytes(gathered.statistics, tmp_path) == as_bytes(whole.statistics, tmp_path)


class TestDigests:
    def test_they_tell_names_types_shapes_and_numbers_apart(self) -> None:
        x = np.arange(6, dtype=F)
        different = [
            {"x": x}, {"y": x}, {"x": x.reshape(2, 3)}, {"x": x.reshape(3, 2)}, {"x": x.astype(np.float64)},
            {"x": x + 1}, {"x": x.view(np.int32)}, {"x": x, "y": x}, {"x": x[:0]}, {"x": x[:0].reshape(0, 2)},
            {"x": x.astype(ml_dtypes.bfloat16)}, {"x": x.astype(np.float16)}, {"x": np.float32(0)},
            {"x": np.array(["a", "b"], object)}, {"x": np.array(["a", "c"], object)},
        ]  # fmt: skip
        found = [feed_digest(f) for f in different]
        assert len(set(found)) == len(found)
        assert all(len(d) == 16 and set(d) <= set("0123456789abcdef") for d in found)

    def test_they_do_not_depend_on_layout_or_order(self) -> None:
        x = np.arange(6, dtype=F).reshape(2, 3)
        assert feed_digest({"a": x, "b": x}) == feed_digest({"b": np.asfortranarray(x), "a": x.repeat(2, 1)[:, ::2]})


def test_threads_share_the_memory_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int | None] = []
    made = driver.Observer

    def note(*arguments: Any) -> Observer:
        taken.append(arguments[4])
        return made(*arguments)

    monkeypatch.setattr(driver, "Observer", note)
    limited = driver.Plan(model(), ("x",), OrtEngine(), memory=1200)
    with open_workers("threads:3") as workers:
        gather(limited, feeds(2), workers)
    with Workers("inline") as workers:
        gather(limited, feeds(2), workers)
    assert taken == [400, 1200]
