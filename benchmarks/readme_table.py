"""Copy the headline figures of ``benchmarks/results/cpu.json`` into README.md, and draw them.

Run ``python benchmarks/readme_table.py`` after a full run of ``python benchmarks/cpu.py``. It replaces what stands
between the markers in README.md and writes ``docs/images/speedup.svg``; both follow from the JSON file alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "images" / "speedup.svg"
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"

FLOAT, OURS = "float", "ours"
BEST = "best of ONNX Runtime per model"

Model = Mapping[str, Any]

_BAR, _GAP, _ROW = 11, 2, 34
_LEFT, _PLOT, _RIGHT, _TOP = 190, 420, 60, 46
_COLOURS = {"theirs": "#9aa4b2", "ours": "#2f6fdb"}
_INK = "#7d8590"
"""A grey that reads on white and on black."""


def best_of_others(model: Model) -> tuple[str, float]:
    """Return (form, usable speed-up) of ONNX Runtime's best form; an empty name where none is usable."""
    usable = {
        name: (model["usable_speedup"][name], max(min(form["sqnr_db"].values(), default=0.0), 0.0))
        for name, form in model["forms"].items()
        if name not in (FLOAT, OURS) and form["error"] is None and form["holds"]
    }
    if not usable:
        return "", 1.0
    name = max(usable, key=lambda form: usable[form])
    return name, usable[name][0]


def table(data: Mapping[str, Any]) -> list[str]:
    """Return the Markdown between the markers, line by line."""
    context = data["context"]
    lines = [
        f"![Usable speed-up per model]({PICTURE.relative_to(README.parent).as_posix()})",
        "",
        "Usable speed-up is float latency / latency on ONNX Runtime. It counts as 1.0 where the result is slower than "
        "float, or where the model's task metric falls by more than one point (1 % where it is unbounded).",
        '"Float" is the model as given, also where that is quantized already. The rival is the best form that ONNX '
        "Runtime's own quantizer makes, chosen anew for each model.",
        "",
        "| model | metric | of float | of ours | speed-up, best of ONNX Runtime | **speed-up, ours** | size, ours "
        "| fused / planned, ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in data["models"]:
        lines.append(_line(model))
    for group, means in data["usable_speedup"].items():
        cells = ("", "", "", f"**{means[BEST]:.2f}**", f"**{means[OURS]:.2f}**", "", "")
        lines.append(_row(f"**geometric mean, {_group(group)}**", *cells))
    lines += ["", f"{context['processor']}; {context['versions']}; {context['timing']}."]
    lines.append("All forms, SQNR, compile time and memory: [benchmarks/results/cpu.md](benchmarks/results/cpu.md).")
    return lines


def _line(model: Model) -> str:
    reference, ours = model["forms"][FLOAT], model["forms"][OURS]
    metric, value = next(iter(reference["metrics"].items()))
    form, theirs = best_of_others(model)
    notes, usable = ours["notes"], ours["error"] is None and ours["holds"]
    return _row(
        model["name"],
        metric,
        f"{value:.4f}",
        f"{ours['metrics'][metric]:.4f}" if metric in ours["metrics"] else "failed",
        f"{theirs:.2f} ({form})" if theirs > 1.0 else "1.00",
        f"**{model['usable_speedup'][OURS]:.2f}**" + ("" if usable else " (not usable)"),
        f"{ours['size'] / reference['size']:.0%}" if ours["size"] else "",
        f"{notes['fused']} / {notes['planned']}" if "planned" in notes else "",
    )


def _group(name: str) -> str:
    return "reference models" if name == "models" else f"{name} models"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def picture(data: Mapping[str, Any]) -> str:
    """Return an SVG bar chart: two bars per model, and the geometric means."""
    bars = [(m["name"], best_of_others(m)[1], float(m["usable_speedup"][OURS])) for m in data["models"]]
    bars += [(f"mean, {_group(g)}", means[BEST], means[OURS]) for g, means in data["usable_speedup"].items()]
    longest = max(value for _, *values in bars for value in values)
    unit = _PLOT / max(longest, 1.5)
    height, width = _TOP + len(bars) * _ROW + 10, _LEFT + _PLOT + _RIGHT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="13">',
        "<title>Usable speed-up over float on ONNX Runtime, one thread</title>",
        *_legend(),
        *_grid(longest, unit, height),
    ]
    for index, (name, theirs, ours) in enumerate(bars):
        lines += _bars(name, theirs, ours, _TOP + index * _ROW, unit)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _legend() -> Iterator[str]:
    for x, key, text in (
        (_LEFT, "theirs", "best of ONNX Runtime's own forms"),
        (_LEFT + 245, "ours", "qcompiler"),
    ):
        yield f'<rect x="{x}" y="8" width="11" height="11" fill="{_COLOURS[key]}"/>'
        yield _text(x + 17, 18, text)


def _grid(longest: float, unit: float, height: int) -> Iterator[str]:
    step = 0.5 if longest < 4 else 1.0
    for count in range(1, int(longest / step) + 1):
        x = _LEFT + count * step * unit
        weight = 1.4 if count * step == 1.0 else 0.5
        yield (
            f'<line x1="{x:.1f}" y1="{_TOP - 8}" x2="{x:.1f}" y2="{height - 8}" stroke="{_INK}" '
            f'stroke-width="{weight}" stroke-opacity="0.6"/>'
        )
        yield _text(x, _TOP - 12, f"{count * step:g}", "middle", 11)


def _bars(name: str, theirs: float, ours: float, y: int, unit: float) -> Iterator[str]:
    yield _text(_LEFT - 8, y + _BAR + 5, name, "end")
    for offset, key, value in ((0, "theirs", theirs), (_BAR + _GAP, "ours", ours)):
        yield (
            f'<rect x="{_LEFT}" y="{y + offset}" width="{value * unit:.1f}" height="{_BAR}" fill="{_COLOURS[key]}"/>'
        )
        yield _text(_LEFT + value * unit + 5, y + offset + _BAR - 1, f"{value:.2f}", size=11)


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 13) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{_INK}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
    )


def replace_between(text: str, lines: Sequence[str]) -> str:
    """Return a text with what stands between the markers replaced.

    Raises:
        ValueError: a marker is missing, or they are in the wrong order.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected {BEGIN} and behind it {END}")
    return "\n".join([head + begin, *lines, end + tail])


def main() -> None:
    """Rewrite README.md and the picture."""
    if not RESULTS.is_file():
        sys.exit(f"error: no file {RESULTS.relative_to(ROOT)}; run: python benchmarks/cpu.py")
    data = json.loads(RESULTS.read_text(encoding="utf-8"))
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(picture(data), encoding="utf-8")
    README.write_text(replace_between(README.read_text(encoding="utf-8"), table(data)), encoding="utf-8")
    print(f"wrote {README.relative_to(ROOT)} and {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
