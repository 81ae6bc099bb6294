"""Variants that the calibration benchmark measures, and its tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Figures = dict[str, Any]
"""What a process of the benchmark found; ``error`` where it failed."""

GENERATOR_MODELS = ("digits_resnet", "code_lm")
"""Demo models that run on feeds of changing shapes: batch size, and for the second the length of the sequence."""

MEMORY_BAR, TIME_BAR, GROWTH_BAR = 1 / 3, 1 / 2, 1.05


@dataclass(frozen=True)
class Variant:
    """One way to calibrate a model.

    Attributes:
        name: its name in the results.
        task: what the process is asked for.
        executor: where our calibration runs.
        single: one thread on one core, else what each takes by default.
        once: measured in the first round alone; nothing is compared with it.
    """

    name: str
    task: str
    executor: str = "inline"
    single: bool = True
    once: bool = False

    @property
    def ours(self) -> bool:
        """Return whether it is our calibration."""
        return self.task.startswith("ours")


VARIANTS = (
    Variant("ours, one core", "ours"),
    Variant("theirs, one core", "theirs"),
    Variant("ours, every value, one core", "ours-all"),
    Variant("ours, default", "ours", "threads", single=False),
    Variant("theirs, default", "theirs", single=False),
    Variant("ours, every value, default", "ours-all", "threads", single=False),
    Variant("theirs, min-max, one core", "theirs-min-max", once=True),
)


@dataclass(frozen=True)
class ModelRow:
    """What was found of one model, by variant."""

    name: str
    variants: Mapping[str, Figures]


@dataclass
class Results:
    """Everything that was found."""

    models: list[ModelRow] = field(default_factory=list)
    generator: list[Figures] = field(default_factory=list)
    reductions: list[Figures] = field(default_factory=list)


def merged(variant: Variant, rounds: Sequence[Figures]) -> Figures:
    """Return the least times of all rounds; of the peaks our largest, or their least."""
    broken = [r for r in rounds if "error" in r]
    if broken or not rounds:
        return broken[0] if broken else {"error": "not measured"}
    made = dict(rounds[0])
    for key, value in made.items():
        found = [r[key] for r in rounds]
        if key.endswith("seconds") or key == "others_cores":
            made[key] = min(found)
        elif key == "peak_mb":
            made[key] = max(found) if variant.ours else min(found)
        elif isinstance(value, dict):
            made[key] = merged(variant, found)
    return made


def markdown(results: Results, context: Mapping[str, Any]) -> str:
    """Return the whole page."""
    lines = ["# Calibration", "", "Made by `python benchmarks/calibration.py`; do not edit.", ""]
    lines += [f"- {key}: {value}" for key, value in context.items()]
    if results.models:
        lines += ["", "## Percentile and entropy together, against ONNX Runtime", "", *_METHOD]
        lines += ["", "### Peak memory above the imported process, MB", "", *_memory(results.models)]
        for where, title in _PLACES.items():
            lines += ["", f"### Seconds, {title}", "", *_seconds(results.models, where)]
    if results.generator:
        lines += ["", "## Feeds from a generator", "", *_GENERATOR, "", *_generator(results.generator)]
    if results.reductions:
        lines += ["", "## Reducing inside the graph", "", *_REDUCTIONS, "", *_reductions(results.reductions)]
        lines += ["", *_conclusion(results)]
    return "\n".join(lines) + "\n"


_METHOD = (
    "Ours: `qcompiler.calibrate` from the model's file on, then both ranges of every tensor. ONNX Runtime: a",
    "percentile and an entropy calibrator one after the other, `collect_data` and `compute_data` each, on the model as",
    "it is; making the calibrators is left out of their time, not of their memory. The same feeds, in memory before",
    "the start. *every value*: ours observing each float value of the graph, as ONNX Runtime does, and not only those",
    "that some target can quantize. Times are the least of all rounds; of the peaks, our largest and their least.",
    f"Bars: memory {MEMORY_BAR:.2f}, time {TIME_BAR:.2f} of ONNX Runtime's.",
)
_PLACES = {
    "one core": "one thread on one core for both",
    "default": "all cores, each with its own default number of threads",
}
_GENERATOR = (
    "Feeds are made as they are asked for; batch size, and for `code_lm` the length of the sequence, go through all",
    f"their values every 32 feeds. Peak above the imported process in MB; the bar is {GROWTH_BAR:.2f}.",
)
_REDUCTIONS = (
    "Nanoseconds per element on one thread, optimizations off, less what the producing operator takes. The first two",
    "hand the tensor to Python without a copy; the others are operators behind the producing one.",
)


def _memory(models: Sequence[ModelRow]) -> Iterable[str]:
    yield (
        "| model | feeds | tensors: ours | every value | ONNX Runtime | elements, 10^6: ours | every value "
        "| ONNX Runtime | peak: ours, inline | ours, threads | every value, inline | ONNX Runtime, percentile alone "
        "| both | ratio, inline | ratio, threads | ratio, every value |"
    )
    yield "|---|" + "---:|" * 15
    for row in models:
        inline, threads = row.variants["ours, one core"], row.variants["ours, default"]
        every, theirs = row.variants["ours, every value, one core"], row.variants["theirs, one core"]
        yield _cells(
            row.name, _of(inline, "feeds"), _of(inline, "tensors"), _of(every, "tensors"), _of(theirs, "tensors"),
            _of(inline, "elements", 1e-6), _of(every, "elements", 1e-6), _of(theirs, "elements", 1e-6),
            _of(inline, "peak_mb"), _of(threads, "peak_mb"), _of(every, "peak_mb"),
            _of(theirs.get("percentile", theirs), "peak_mb"), _of(theirs, "peak_mb"),
            *(_ratio(ours, theirs, "peak_mb") for ours in (inline, threads, every)),
        )  # fmt: skip
    for row in models:
        theirs = row.variants["theirs, one core"]
        if "failed" in theirs:
            yield ""
            yield (
                f"On {row.name} ONNX Runtime's percentile calibrator fails ({theirs['failed']}). Its figures there are "
                f"for what convolutions and matrix products read and write, {_of(theirs['percentile'], 'tensors')} "
                "tensors; its entropy calibrator looks at everything as usual."
            )


def _seconds(models: Sequence[ModelRow], where: str) -> Iterable[str]:
    yield (
        "| model | ours | every value | ONNX Runtime, percentile alone | both | ours / percentile alone | ours / both "
        "| every value / both | ns per element: ours | every value | ONNX Runtime |"
    )
    yield "|---|" + "---:|" * 10
    busiest = 0.0
    for row in models:
        ours, every = row.variants[f"ours, {where}"], row.variants[f"ours, every value, {where}"]
        theirs = row.variants[f"theirs, {where}"]
        alone = theirs.get("percentile", theirs)
        busiest = max(busiest, *(f.get("others_cores", 0.0) for f in (ours, every, theirs)))
        yield _cells(
            row.name, *(_of(f, "seconds", digits=2) for f in (ours, every, alone, theirs)),
            _ratio(ours, alone, "seconds"), _ratio(ours, theirs, "seconds"), _ratio(every, theirs, "seconds"),
            *(_per_element(f) for f in (ours, every, theirs)),
        )  # fmt: skip
    yield ""
    yield f"Other processes kept up to {busiest:.1f} cores busy in the quietest round of each."


def _generator(rows: Sequence[Figures]) -> Iterable[str]:
    counts = [next((r[key]["feeds"] for r in rows if "feeds" in r[key]), 0) for key in ("few", "many")]
    yield f"| model | executor | {counts[0]} feeds | {counts[1]} feeds | ratio | seconds, {counts[1]} feeds |"
    yield "|---|---|" + "---:|" * 4
    for row in rows:
        few, many = row["few"], row["many"]
        yield _cells(
            row["model"], row["executor"], _of(few, "peak_mb", digits=1), _of(many, "peak_mb", digits=1),
            _ratio(many, few, "peak_mb", 3), _of(many, "seconds", digits=1),
        )  # fmt: skip


def _reductions(rows: Sequence[Figures]) -> Iterable[str]:
    ways = [key for key in rows[0] if key != "size"]
    yield "| elements | " + " | ".join(ways) + " |"
    yield "|---:|" + "---:|" * len(ways)
    for row in rows:
        yield _cells(f"{row['size']:,}", *(f"{row[way]:.2f}" for way in ways))


def _conclusion(results: Results) -> Iterable[str]:
    rows = results.reductions
    outside, full = (sum(r[w] for r in rows) / len(rows) for w in ("NumPy min, max", "all of our statistics"))
    inside = sum(r["ReduceMin, ReduceMax"] for r in rows) / len(rows)
    histogram = sum(r["histogram by ScatterElements"] for r in rows) / len(rows)
    yield (
        f"On average {outside:.2f} ns against {inside:.2f} for extremes alone, {full:.2f} for all of our statistics "
        f"against {histogram:.2f} for the histogram alone: handing tensors over is the way that is kept."
    )
    seconds = [
        f"{row.name} {alone['seconds']:.2f} s (ours, all statistics: {ours['seconds']:.2f} s)"
        for row in results.models
        if "seconds" in (alone := row.variants["theirs, min-max, one core"])
        and "seconds" in (ours := row.variants["ours, one core"])
    ]
    if seconds:
        yield ""
        yield (
            "ONNX Runtime's own min-max calibrator, which reduces inside the graph and keeps nothing else, one core: "
            + "; ".join(seconds)
            + "."
        )


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _of(figures: Figures, key: str, scale: float = 1.0, digits: int = 0) -> str:
    """Return a figure as text, or why there is none."""
    if key not in figures:
        return str(figures.get("error", "")).replace("|", "/")
    return f"{figures[key] * scale:,.{digits}f}"


def _ratio(first: Figures, second: Figures, key: str, digits: int = 2) -> str:
    if key not in first or key not in second:
        return ""
    return f"{first[key] / second[key]:.{digits}f}"


def _per_element(figures: Figures) -> str:
    if not figures.get("elements"):
        return ""
    return f"{figures['seconds'] / figures['elements'] * 1e9:.1f}"
