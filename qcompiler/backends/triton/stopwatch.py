"""Time kernels on a GPU: random data, cold caches, CUDA graphs for short ones; needs nothing of ONNX."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qcompiler.errors import TargetError
from qcompiler.kernels.call import Call
from qcompiler.kernels.catalog import implementation_of
from qcompiler.kernels.config import Config
from qcompiler.kernels.contract import Argument
from qcompiler.kernels.operand import Operand
from qcompiler.kernels.tuning.timing import Place
from qcompiler.kernels.tuning.work import Work

TORCH_TYPES: Mapping[str, torch.dtype] = {
    "int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32, "int64": torch.int64,
    "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "bool": torch.bool,
    "float8e4m3fn": torch.float8_e4m3fn, "float8e5m2": torch.float8_e5m2,
}  # fmt: skip
"""torch's type of each dtype of a kernel."""

SHORT_US = 500.0
"""Calls below this are timed by replaying a CUDA graph: launches from the host would be part of what is measured."""

COLD_FACTOR = 2
"""How many times the second-level cache the data of the rotating sets holds, so that each call finds it cold."""

MOST_SETS = 64

Launch = Callable[[], Any]


def random_tensor(operand: Operand, device: str, generator: torch.Generator) -> Tensor:
    """Return random data: integers of the whole range (small ones in int32), floats from N(0, 1)."""
    dtype, shape = TORCH_TYPES[operand.dtype], operand.shape
    if operand.dtype in ("int8", "uint8"):
        low = -128 if operand.dtype == "int8" else 0
        return torch.randint(low, low + 256, shape, dtype=dtype, device=device, generator=generator)
    if operand.dtype in ("int16", "int32", "int64"):
        return torch.randint(-128, 128, shape, dtype=dtype, device=device, generator=generator)
    return torch.randn(shape, dtype=torch.float32, device=device, generator=generator).to(dtype)


def random_argument(argument: Argument, operand: Operand, dims: Mapping[str, int], device: str,
                    generator: torch.Generator) -> Tensor:  # fmt: skip
    """Return random data that makes sense for an argument: scales are positive and small, lengths whole."""
    if argument.name == "lengths":
        return torch.full(operand.shape, dims["S"], dtype=TORCH_TYPES[operand.dtype], device=device)
    if "scale" in argument.name or argument.name in ("multiplier", "w_scale", "a_blocks"):
        drawn = torch.rand(operand.shape, dtype=torch.float32, device=device, generator=generator)
        return ((drawn + 0.5) / 128).to(TORCH_TYPES[operand.dtype])
    return random_tensor(operand, device, generator)


def random_set(work: Work, device: str, generator: torch.Generator) -> dict[str, Any]:
    """Return all arguments of a call but scratch: random inputs, empty outputs, example numbers."""
    contract, operands = work.contract, work.operands()
    given: dict[str, Any] = dict(contract.example_scalars(work.options))
    for argument in contract.tensors(work.options):
        operand = operands[argument.name]
        if argument.role == "output":
            given[argument.name] = torch.empty(operand.shape, dtype=TORCH_TYPES[operand.dtype], device=device)
        else:
            given[argument.name] = random_argument(argument, operand, work.dims, device, generator)
    return given


def with_scratch(work: Work, given: Mapping[str, Any], config: Config, device: str) -> dict[str, Any]:
    """Return arguments with the scratch that a configuration needs."""
    scratch = work.contract.scratch(work.dims, work.options, config)
    made = {n: torch.empty(o.shape, dtype=TORCH_TYPES[o.dtype], device=device) for n, o in scratch.items()}
    return {**given, **made}


def prepared(work: Work, given: Mapping[str, Any], config: Config) -> Launch:
    """Return a function that launches a call, without the contract's check: only launches are timed."""
    calls: list[Call] = implementation_of(work.kernel).calls(given, work.options, config)

    def launch() -> None:
        for call in calls:
            call.launch()

    return launch


def sets_needed(nbytes: int, cache: int, free: int) -> int:
    """Return how many sets of data rotate: together `COLD_FACTOR` caches, in a third of the free memory."""
    wanted = -(-COLD_FACTOR * cache // max(nbytes, 1)) + 1
    return max(1, min(wanted, MOST_SETS, free // 3 // max(nbytes, 1)))


@dataclass
class Clock:
    """Times launches on the current GPU.

    Attributes:
        graphs: captured replays by what they replay.
    """

    graphs: dict[int, tuple[Any, int, list[Launch]]] = field(default_factory=dict)

    def once(self, launches: Sequence[Launch]) -> float:
        """Return microseconds per launch over all of them in turn, by events; what the host adds counts."""
        event: Any = torch.cuda.Event  # torch's types leave its constructor out
        start, end = event(enable_timing=True), event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for launch in launches:
            launch()
        end.record()
        torch.cuda.synchronize()
        return 1e3 * float(start.elapsed_time(end)) / len(launches)

    def warm(self, launches: Sequence[Launch]) -> float:
        """Run all once, so that what compiles or allocates is done; return a first estimate in microseconds."""
        for launch in launches:
            launch()
        return self.once(launches)

    def replay(self, launches: list[Launch], least_us: float = 2000.0) -> float:
        """Return microseconds per launch from a CUDA graph that holds them all, replayed for ``least_us`` or more."""
        key = id(launches)
        if key not in self.graphs:
            stream: Any = torch.cuda.Stream
            side = stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for launch in launches:
                    launch()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for launch in launches:
                    launch()
            first = self.once([graph.replay])
            self.graphs[key] = (graph, max(1, int(least_us / max(first, 1.0))), launches)
        graph, count, _ = self.graphs[key]
        return self.once([graph.replay] * count) / len(launches)

    def measure(self, launches: list[Launch], estimate_us: float) -> float:
        """Return microseconds of one launch: replayed if short, else by events around some ten milliseconds of them."""
        if estimate_us < SHORT_US:
            try:
                return self.replay(launches)
            except RuntimeError:  # what cannot be captured (it waits for the host) is timed as it is
                torch.cuda.synchronize()
        repeats = max(1, int(10_000 / max(estimate_us * len(launches), 1.0)))
        return self.once(launches * repeats)

    def forget(self) -> None:
        """Let all graphs go."""
        self.graphs.clear()


@dataclass
class GpuTimer:
    """The current GPU behind `qcompiler.kernels.tuning.timing.Timer`.

    Attributes:
        place: where it is.
        cache: bytes of the second-level cache.
        clock: times launches.
        sets: rotating data of the call that is being timed.
        timed: launches and first estimates by configuration.
        trusted: outputs of the trusted configuration on the first set.
        of: name of that call.
        device: torch's name of it; ``cpu`` only where Triton interprets, to check results.
    """

    place: Place
    cache: int
    device: str = "cuda"
    clock: Clock = field(default_factory=Clock)
    sets: list[dict[str, Any]] = field(default_factory=list)
    timed: dict[Config, tuple[list[Launch], float]] = field(default_factory=dict)
    trusted: list[Tensor] = field(default_factory=list)
    of: str = ""

    @classmethod
    def open(cls) -> GpuTimer:
        """Return the timer of this machine.

        Raises:
            TargetError: there is no NVIDIA GPU that torch can use.
        """
        return cls(find_place(), torch.cuda.get_device_properties(0).L2_cache_size)

    def check(self, work: Work, config: Config, trusted: Config) -> str:
        """Compare a configuration's outputs with a trusted one's."""
        self._prepare(work)
        if not self.trusted:
            self.trusted = [t.clone() for t in self._outputs(work, trusted)]
        found = self._outputs(work, config)
        worst = max(difference(a, b) for a, b in zip(found, self.trusted, strict=True))
        return "" if worst <= TOLERANCE else f"its results differ from the shipped configuration's by {worst:.2e}"

    def run(self, work: Work, config: Config) -> float:
        """Return microseconds of one call."""
        self._prepare(work)
        if config not in self.timed:
            launches = [prepared(work, with_scratch(work, given, config, self.device), config) for given in self.sets]
            self.timed[config] = (launches, self.clock.warm(launches))
        launches, estimate = self.timed[config]
        return self.clock.measure(launches, estimate)

    def seconds(self) -> float:
        """Return a clock of the host."""
        return time.perf_counter()

    def _prepare(self, work: Work) -> None:
        if self.of == work.name:
            return
        self.clock.forget()
        self.sets.clear()
        self.timed.clear()
        self.trusted.clear()
        generator = torch.Generator(self.device).manual_seed(1)
        nbytes = sum(o.nbytes for o in work.operands().values())
        free = nbytes
        if self.device == "cuda":
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info()[0]
        count = sets_needed(nbytes, self.cache, free)
        self.sets.extend(random_set(work, self.device, generator) for _ in range(count))
        self.of = work.name

    def _outputs(self, work: Work, config: Config) -> list[Tensor]:
        given = with_scratch(work, self.sets[0], config, self.device)
        outputs = [given[a.name] for a in work.contract.tensors(work.options) if a.role == "output"]
        for tensor in outputs:
            tensor.view(torch.uint8).fill_(0x55)
        prepared(work, given, config)()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return outputs


TOLERANCE = 1e-2
"""Greatest difference of outputs, as a share of their norm; sums in another order differ far less."""


def difference(found: Tensor, expected: Tensor) -> float:
    """Return ||found - expected|| / ||expected|| in float64; infinity where one is not finite and the other is."""
    a, b = found.to(torch.float64), expected.to(torch.float64)
    same = (a == b) | (a.isnan() & b.isnan())
    a, b = torch.where(same, 0.0, a), torch.where(same, 0.0, b)
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return float("inf")
    norm = float(
        torch.linalg.vector_norm(torch.where(expected.to(torch.float64).isfinite(), expected.to(torch.float64), 0.0))
    )
    return float(torch.linalg.vector_norm(a - b)) / max(norm, 1e-30)


def find_place() -> Place:
    """Return this machine's GPU and versions.

    Raises:
        TargetError: there is no NVIDIA GPU that torch can use.
    """
    if not torch.cuda.is_available():
        raise TargetError(
            "timing needs an NVIDIA GPU that torch can use; found none. Candidates compiled here can be copied to a "
            "machine that has one"
        )
    import triton

    major, minor = torch.cuda.get_device_capability()
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return Place(
        f"sm{10 * major + minor}", torch.cuda.get_device_name(), driver_version(), str(triton.__version__), today
    )


def driver_version() -> str:
    """Return the version of the GPU's driver, ``unknown`` where ``nvidia-smi`` does not say."""
    return query_gpu("driver_version") or "unknown"


def query_gpu(fields: str) -> str:
    """Return what ``nvidia-smi --query-gpu`` says of the first GPU, empty if it says nothing."""
    import shutil
    import subprocess

    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    command = [tool, f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-i", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    return done.stdout.strip() if done.returncode == 0 else ""
