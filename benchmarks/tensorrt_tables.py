"""Write the figures of TensorRT as Markdown for readers and JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """What a model is compiled for."""

    target: str
    recipe: str


@dataclass
class CaseResult:
    """All figures of one model, target and recipe.

    Attributes:
        group: where the model comes from, ``models`` or ``demo``.
        name: the model's.
        target: the capability table.
        recipe: the recipe.
        float_error: why the builder refuses the model as it came; None if it builds.
        error: why it could not be compiled; None if it was.
        build_error: why the builder refuses the compiled model; None if it builds.
        planned: fused calls handed to the engine, of all operators.
        fused: those that a layer of the engine runs on stored numbers.
        products: Conv, ConvTranspose, MatMul and Gemm that could be quantized somewhere.
        products_planned: of them, those handed to the engine quantized.
        products_fused: of them, those that it runs so.
        missed: operator, group, reason and text of every planned call that did not happen.
        float_products: product to the reason why it stays float.
        returned: groups that the accuracy guard returned to float.
        share: share of all multiply-adds that run quantized.
        held_out_db: SQNR per output on the set-aside calibration feeds, as the compiler reports it.
        sqnr_db: SQNR per output over the evaluation data.
        metrics_float: of the model as it came.
        metrics: of the emitted ONNX.
        holds: whether no metric falls by more than a point (0.01; 1 % where a metric is unbounded).
        size_before: bytes of the model as it came.
        size: bytes of the emitted ONNX.
        seconds: of the compilation.
        warnings: the compiler's.
    """

    group: str
    name: str
    target: str
    recipe: str
    float_error: str | None = None
    error: str | None = None
    build_error: str | None = None
    planned: int = 0
    fused: int = 0
    products: int = 0
    products_planned: int = 0
    products_fused: int = 0
    missed: list[str] = field(default_factory=list)
    float_products: dict[str, str] = field(default_factory=dict)
    returned: int = 0
    share: float = 0.0
    held_out_db: dict[str, float] = field(default_factory=dict)
    sqnr_db: dict[str, float] = field(default_factory=dict)
    metrics_float: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    holds: bool = False
    size_before: int = 0
    size: int = 0
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)

    @property
    def built(self) -> bool:
        """Return whether the builder makes an engine of the compiled model."""
        return self.error is None and self.build_error is None

    @property
    def worst_db(self) -> float | None:
        """Return the least SQNR over the outputs in dB."""
        return min(self.sqnr_db.values(), default=None)

    @property
    def by_guard(self) -> int:
        """Return the number of products that the accuracy guard returned to float."""
        return sum("accuracy guard" in why for why in self.float_products.values())

    def line(self) -> str:
        """Return one line for a terminal."""
        if self.error is not None:
            return f"{self.name} {self.target} {self.recipe}: {self.error}"
        figures = ", ".join(
            f"{k} {v:.4f} -> {self.metrics.get(k, float('nan')):.4f}" for k, v in self.metrics_float.items()
        )
        worst = "" if self.worst_db is None else f", {self.worst_db:.1f} dB"
        return (
            f"{self.name} {self.target} {self.recipe}: fused {self.fused}/{self.planned}, products "
            f"{self.products_fused}/{self.products_planned} of {self.products}, share {self.share:.3f}, {figures}"
            f"{worst}, {self.seconds:.0f} s"
            + ("" if self.holds else "  MISSES")
            + ("" if self.built else "  NOT BUILT")
        )


_DEFINITION = (
    "`built`: whether the builder makes an engine of the model as it came, and of the compiled one. `fused` is layers",
    "that the build log shows on stored numbers, of those that were planned: all of them, and the products among them",
    "(Conv, MatMul, Gemm); `of` is how many products the target could quantize. `share` is the share of all",
    "multiply-adds that run on stored numbers (weight-only: with a stored weight). SQNR is that of the worst output",
    "over the evaluation data. A metric marked `!` falls by more than a point (0.01; 1 % where it is unbounded).",
)


def write_tensorrt(folder: Path, results: Sequence[CaseResult], context: Mapping[str, str]) -> list[Path]:
    """Write ``tensorrt.md`` and ``tensorrt.json``, each under a temporary name first, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"context": dict(context), "totals": totals(results), "cases": [asdict(result) for result in results]}
    texts = {"md": markdown(results, context), "json": json.dumps(data, indent=1) + "\n"}
    written = []
    for suffix, text in texts.items():
        path = folder / f"tensorrt.{suffix}"
        temporary = path.with_name(path.name + ".partial")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
        written.append(path)
    return written


def totals(results: Sequence[CaseResult]) -> dict[str, dict[str, int]]:
    """Return counts per target and recipe: models, built, within a point, layers planned and fused."""
    found = {}
    for key in dict.fromkeys((r.target, r.recipe) for r in results):
        cases = [r for r in results if (r.target, r.recipe) == key]
        built = [r for r in cases if r.built]
        found[" ".join(key)] = {
            "models": len(cases),
            "float builds": sum(r.float_error is None for r in cases),
            "compiled builds": len(built),
            "metric within a point": sum(r.holds for r in cases),
            "planned": sum(r.planned for r in built),
            "fused": sum(r.fused for r in built),
            "products planned": sum(r.products_planned for r in built),
            "products fused": sum(r.products_fused for r in built),
        }
    return found


def markdown(results: Sequence[CaseResult], context: Mapping[str, str]) -> str:
    """Return the whole page."""
    lines = ["# TensorRT", "", "Made by `python benchmarks/on_tensorrt.py`; do not edit.", ""]
    lines += [f"- {key}: {value}" for key, value in context.items()]
    lines += ["", *_DEFINITION, "", *_totals(results), ""]
    for target, recipe in dict.fromkeys((r.target, r.recipe) for r in results):
        cases = [r for r in results if (r.target, r.recipe) == (target, recipe)]
        idle = [r.name for r in cases if r.error is None and r.products_planned == 0 and not r.by_guard]
        shown = [r for r in cases if r.name not in idle]
        lines += [f"## {target}, {recipe}", "", *_table(shown), "", *_remarks(shown)]
        lines += [f"- without a product for this recipe: {', '.join(idle)}.", ""] if idle else [""]
    return "\n".join(lines).rstrip() + "\n"


def _totals(results: Sequence[CaseResult]) -> list[str]:
    found = totals(results)
    names = list(next(iter(found.values()), {}))
    lines = [_row("target, recipe", *names), "|" + "---|" * (1 + len(names))]
    return lines + [_row(key, *(str(v) for v in counts.values())) for key, counts in found.items()]


def _table(cases: Sequence[CaseResult]) -> list[str]:
    lines = [
        "| model | built: float, compiled | fused / planned | products fused / planned of | share | SQNR, dB "
        "| metric, float | ours | size, MB |",
        "|" + "---|" * 9,
    ]
    for case in cases:
        if case.error is not None:
            lines.append(_row(case.name, _built(case), *("" for _ in range(7))))
            continue
        main = next(iter(case.metrics_float))
        lines.append(
            _row(
                case.name,
                _built(case),
                f"{case.fused} / {case.planned}",
                f"{case.products_fused} / {case.products_planned} of {case.products}",
                f"{case.share:.3f}",
                "" if case.worst_db is None else f"{case.worst_db:.1f}",
                f"{main} {case.metrics_float[main]:.4f}",
                f"{case.metrics[main]:.4f}" + ("" if case.holds else " !"),
                f"{case.size_before / 1e6:.2f} to {case.size / 1e6:.2f}",
            )
        )
    return lines


def _built(case: CaseResult) -> str:
    ours = "yes" if case.built else "fails" if case.error is None else "not compiled"
    return f"{'yes' if case.float_error is None else 'no'}, {ours}"


def _remarks(cases: Sequence[CaseResult]) -> list[str]:
    """List what did not build, what did not fuse, and what the guard returned to float."""
    lines = []
    for case in cases:
        said = []
        if case.float_error is not None:
            said.append(f"float does not build: {case.float_error}")
        if case.error is not None:
            said.append(f"not compiled: {case.error}")
        elif case.build_error is not None:
            said.append(f"compiled does not build: {case.build_error}")
        else:
            said += [f"missed {text}" for text in case.missed]
        why: dict[str, int] = {}
        for text in case.float_products.values():
            short = "the accuracy guard" if "accuracy guard" in text else text.removeprefix("float: ").partition(":")[0]
            why[short] = why.get(short, 0) + 1
        if why:
            said.append("products in float: " + ", ".join(f"{count} by {text}" for text, count in why.items()))
        if said:
            lines.append(f"- {case.name}: {'; '.join(said)}.".replace("|", "/").replace("\n", " "))
    return lines


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
