"""The figures of the GPU benchmark as Markdown for readers and JSON for programs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass
class RivalResult:
    """Runs of one rival, microseconds each, or why it did not run."""

    name: str
    runs: list[float] = field(default_factory=list)
    error: str = ""


@dataclass
class CaseResult:
    """What one case gave.

    Attributes:
        key: its group.
        kernel: its name.
        label: of the case.
        target: what this project aims at against the first rival.
        config: that ran.
        bytes: least traffic.
        macs: multiply-adds.
        floor_us: the roofline: time at the peaks of the machine's data sheet.
        runs: of our kernel, microseconds each.
        rivals: the others.
        error_size: ||found - expected|| / ||expected||.
        wrong: what is wrong with the results; empty if nothing.
        error: why it did not run; empty if it did.
        clocks: SM and memory MHz, W, degrees, just after.
    """

    key: str
    kernel: str
    label: str
    target: str = ""
    config: str = ""
    bytes: int = 0
    macs: int = 0
    floor_us: float = 0.0
    runs: list[float] = field(default_factory=list)
    rivals: list[RivalResult] = field(default_factory=list)
    error_size: float = 0.0
    wrong: str = ""
    error: str = ""
    clocks: str = ""

    @property
    def microseconds(self) -> float | None:
        """Return the median."""
        return statistics.median(self.runs) if self.runs else None

    @property
    def ratios(self) -> dict[str, float]:
        """Return rival / ours by rival, of the medians: above 1 we are faster."""
        own = self.microseconds
        return {r.name: statistics.median(r.runs) / own for r in self.rivals if r.runs} if own else {}

    @property
    def roofline(self) -> float | None:
        """Return the share of the roofline that is reached."""
        own = self.microseconds
        return self.floor_us / own if own else None

    def to_json(self) -> dict[str, Any]:
        """Return all figures and what follows from them."""
        own = self.microseconds
        figures: dict[str, Any] = {}
        if own:
            figures = {"microseconds": own, "minimum": min(self.runs), "spread": spread(self.runs)}
            figures |= {"roofline": self.roofline, "ratios": self.ratios}
            figures |= {"tops": 2 * self.macs / own / 1e6, "gigabytes_per_second": self.bytes / own / 1e3}
        return asdict(self) | figures

    @property
    def name(self) -> str:
        """Return key, kernel and label."""
        return f"{self.key} {self.kernel} {self.label}"

    def line(self) -> str:
        """Return the result in one line."""
        name = self.name
        if self.error:
            return f"{name}: FAILED {self.error}"
        parts = [f"{self.microseconds:.2f} us", f"{self.roofline:.0%} of the roofline"]
        parts += [f"{ratio:.2f}x {rival}" for rival, ratio in self.ratios.items()]
        return f"{name}: " + ", ".join(parts) + (f"; WRONG: {self.wrong}" if self.wrong else "")


def read_results(folder: Path) -> list[CaseResult]:
    """Return the results that `write_results` wrote; none if there are none."""
    path = folder / "gpu.json"
    if not path.is_file():
        return []
    found = []
    for row in json.loads(path.read_text(encoding="utf-8"))["cases"]:
        own = {f.name: row[f.name] for f in fields(CaseResult) if f.name != "rivals"}
        found.append(CaseResult(**own, rivals=[RivalResult(**r) for r in row["rivals"]]))
    return found


def spread(runs: Sequence[float]) -> float:
    """Return (greatest - least) / median."""
    return (max(runs) - min(runs)) / statistics.median(runs)


def write_results(folder: Path, results: Sequence[CaseResult], environment: Mapping[str, str]) -> list[Path]:
    """Write ``gpu.json`` and ``gpu.md``, each under a temporary name first, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"environment": dict(environment), "cases": [r.to_json() for r in results]}
    return _write(folder, {"gpu.json": json.dumps(data, indent=1) + "\n", "gpu.md": markdown(results, environment)})


def _write(folder: Path, texts: Mapping[str, str]) -> list[Path]:
    written = []
    for name, text in texts.items():
        path = folder / name
        temporary = path.with_name(path.name + ".partial")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
        written.append(path)
    return written


def markdown(results: Sequence[CaseResult], environment: Mapping[str, str]) -> str:
    """Return the whole page."""
    lines = ["# Kernels on a GPU", "", "Made by `python benchmarks/gpu.py`; do not edit.", ""]
    lines += [f"- {key}: {value}" for key, value in environment.items()]
    lines += ["", *_DEFINITION, ""]
    for key in dict.fromkeys(r.key for r in results):
        group = [r for r in results if r.key == key]
        lines += [f"## {key}: {', '.join(dict.fromkeys(r.kernel for r in group))}", "", *_table(group), ""]
    wrong = [f"- {r.key} {r.kernel} {r.label}: {r.error or r.wrong}" for r in results if r.error or r.wrong]
    lines += ["## What failed", "", *wrong] if wrong else ["All results are right."]
    return "\n".join(lines).rstrip() + "\n"


_DEFINITION = (
    "Medians of interleaved rounds on random data, caches cold; below 500 us from CUDA graphs. A ratio is the rival's",
    "time over ours: above 1.00 we are faster; the target is for the first rival. Spread is (greatest - least) over",
    "the median; smaller differences are noise. Roofline: the time that bytes or multiply-adds alone take at the data",
    "sheet's peaks, over ours.",
)


def _table(group: Sequence[CaseResult]) -> list[str]:
    rivals = list(dict.fromkeys(rival.name for r in group for rival in r.rivals))
    heads = ["case", "tile", "us", "min", "spread", "roofline", "TOPS", "GB/s", *(f"x {r}" for r in rivals), "target"]
    lines = [_row(heads), "|" + "---|" * len(heads)]
    for r in group:
        own = r.microseconds
        if own is None:
            lines.append(_row([r.label, r.config, "failed", *[""] * (len(heads) - 4), r.target]))
            continue
        figures = [f"{own:.2f}", f"{min(r.runs):.2f}", f"{spread(r.runs):.1%}", f"{r.roofline:.0%}"]
        figures += [f"{2 * r.macs / own / 1e6:.0f}" if r.macs else "", f"{r.bytes / own / 1e3:.0f}"]
        ratios = [f"{r.ratios[n]:.2f}" if n in r.ratios else "" for n in rivals]
        lines.append(_row([r.label + (" (wrong)" if r.wrong else ""), r.config, *figures, *ratios, r.target]))
    return lines


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
