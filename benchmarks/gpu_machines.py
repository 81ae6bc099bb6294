"""Where the GPU benchmark runs: on a GPU, or dry, on the references and the CPU."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from gpu_cases import Given, GpuCase, Launch

from qcompiler.backends.triton.stopwatch import (
    Clock,
    find_place,
    prepared,
    query_gpu,
    random_set,
    sets_needed,
    with_scratch,
)
from qcompiler.kernels.catalog import reference_of
from qcompiler.kernels.config import Config, load_table, user_folder
from qcompiler.kernels.contract import Contract
from qcompiler.kernels.tuning.work import Work

CLOCKS = "clocks.sm,clocks.mem,power.draw,temperature.gpu"


class Machine(Protocol):
    """What runs and times cases."""

    device: str
    arch: str

    def environment(self) -> dict[str, str]:
        """Return what figures depend on."""
        ...

    def clocks(self) -> str:
        """Return clocks, power and temperature of now."""
        ...

    def work(self, case: GpuCase) -> Work:
        """Return a case as a call, at the size that suits this machine."""
        ...

    def data(self, work: Work, case: GpuCase) -> list[Given]:
        """Return rotating sets of arguments."""
        ...

    def launcher(self, work: Work, given: Given, config: Config) -> Launch:
        """Return a function that runs the kernel."""
        ...

    def compiler(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function, compiled where that is possible."""
        ...

    def warm(self, launches: list[Launch]) -> float:
        """Run all once; return a first estimate of one in microseconds."""
        ...

    def measure(self, launches: list[Launch], estimate: float) -> float:
        """Return microseconds of one launch."""
        ...

    def release(self) -> bool:
        """Free what the last case held; return whether the device still answers."""
        ...

    def seconds(self) -> float:
        """Return a clock, for the budget."""
        ...


def config_of(work: Work, arch: str) -> Config:
    """Return the configuration that the tables have for a call, the user's first."""
    return load_table(work.kernel, user_folder()).choose(arch, work.dims, work.options)


def _adjusted(given: Given, case: GpuCase, contract: Contract, options: Mapping[str, str]) -> Given:
    if case.adjust is not None:
        case.adjust(given)
    contract.check(given, options)
    return given


@dataclass
class GpuMachine:
    """The GPU of this machine."""

    device: str = "cuda"
    arch: str = ""
    clock: Clock = field(default_factory=Clock)
    compiled: dict[Any, Callable[..., Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Look at the GPU.

        Raises:
            TargetError: there is none.
        """
        self.arch = find_place().arch
        torch.backends.cudnn.benchmark = True

    def environment(self) -> dict[str, str]:
        """Return GPU, driver and versions."""
        place = find_place()
        properties = torch.cuda.get_device_properties(0)
        return {
            "GPU": f"{place.device} ({place.arch}), {properties.multi_processor_count} multiprocessors, "
            f"{properties.total_memory / 2**30:.0f} GiB, {properties.L2_cache_size / 2**20:.0f} MiB of L2",
            "driver": place.driver,
            "versions": f"torch {torch.__version__}, triton {place.triton}, Python {platform.python_version()}",
            "clocks at the start": self.clocks(),
            "date": place.date,
        }

    def clocks(self) -> str:
        """Return SM and memory MHz, W and degrees."""
        return query_gpu(CLOCKS)

    def work(self, case: GpuCase) -> Work:
        """Return a case at full size."""
        return _work(case, self.arch, case.dims)

    def data(self, work: Work, case: GpuCase) -> list[Given]:
        """Return as many sets as leave the second-level cache cold; rivals keep wider copies of their own."""
        generator = torch.Generator(self.device).manual_seed(1)
        nbytes = sum(o.nbytes for o in work.operands().values())
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        count = min(16, sets_needed(nbytes, cache, torch.cuda.mem_get_info()[0] // 4))
        options = work.options
        return [_adjusted(random_set(work, "cuda", generator), case, work.contract, options) for _ in range(count)]

    def launcher(self, work: Work, given: Given, config: Config) -> Launch:
        """Return the kernel's launch."""
        return prepared(work, with_scratch(work, given, config, "cuda"), config)

    def compiler(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``torch.compile`` of a function, the same for all sets of a case: beyond some, torch gives up."""
        code = function.__code__
        if code not in self.compiled:
            self.compiled[code] = torch.compile(function, dynamic=False)
        return self.compiled[code]

    def warm(self, launches: list[Launch]) -> float:
        """Run all twice."""
        self.clock.warm(launches)
        return self.clock.once(launches)

    def measure(self, launches: list[Launch], estimate: float) -> float:
        """Return microseconds of one launch."""
        return self.clock.measure(launches, estimate)

    def release(self) -> bool:
        """Free graphs, compiled functions and cached memory; an access out of bounds ends the device's context."""
        self.compiled.clear()
        try:
            self.clock.forget()
            torch.compiler.reset()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
        return True

    def seconds(self) -> float:
        """Return the host's clock."""
        return time.perf_counter()


@dataclass
class DryMachine:
    """Tiny shapes, NumPy references instead of kernels, rivals on the CPU; figures mean nothing."""

    device: str = "cpu"
    arch: str = "sm90"
    now: float = 0.0
    step: float = 0.001

    def environment(self) -> dict[str, str]:
        """Return that this is a dry run."""
        return {
            "GPU": "none: a dry run on references, its figures mean nothing",
            "versions": f"torch {torch.__version__}",
        }

    def clocks(self) -> str:
        """Return nothing."""
        return ""

    def work(self, case: GpuCase) -> Work:
        """Return a case at its tiny size."""
        return _work(case, self.arch, case.tiny)

    def data(self, work: Work, case: GpuCase) -> list[Given]:
        """Return two sets."""
        generator = torch.Generator("cpu").manual_seed(1)
        options = work.options
        return [_adjusted(random_set(work, "cpu", generator), case, work.contract, options) for _ in range(2)]

    def launcher(self, work: Work, given: Given, config: Config) -> Launch:
        """Return the reference, which writes to the outputs."""
        from qcompiler.backends.triton.tensors import to_numpy, to_torch

        def run() -> None:
            arrays = {n: to_numpy(v) if isinstance(v, torch.Tensor) else v for n, v in given.items()}
            for name, array in reference_of(work.kernel).reference(arrays, work.options).items():
                given[name].copy_(to_torch(array))

        return run

    def compiler(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function."""
        return function

    def warm(self, launches: list[Launch]) -> float:
        """Run all once."""
        for launch in launches:
            launch()
        return 100.0

    def measure(self, launches: list[Launch], estimate: float) -> float:
        """Return an invented time."""
        self.now += self.step
        return 100.0 + len(launches)

    def release(self) -> bool:
        """Free nothing."""
        return True

    def seconds(self) -> float:
        """Return an invented clock, which only measuring moves."""
        return self.now


def _work(case: GpuCase, arch: str, dims: Mapping[str, int]) -> Work:
    contract = Work(case.kernel, arch, dims, {}, {}).contract
    return Work(case.kernel, arch, dims, contract.options(case.options), dict(case.dtypes))
