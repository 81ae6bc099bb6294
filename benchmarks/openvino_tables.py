"""Write the comparison on OpenVINO as Markdown for readers and JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from baselines import FLOAT, FLOAT_OPENVINO, OPENVINO_FORMS, OURS_CPU, OURS_OPENVINO
from measuring import ModelResult
from scoring import FormResult, geometric_mean

NNCF = tuple(form.name for form in OPENVINO_FORMS if form.name.startswith("nncf"))
_DEFINITION = (
    "Speed-ups are latencies divided, minima (medians in brackets) of interleaved rounds. Of NNCF's outputs that one",
    "counts which is the fastest to hold every metric within a point (0.01; 1 % where a metric is unbounded); where",
    "none does, the fastest that runs, marked `!`. OpenVINO's float runs in its default precision, which is bfloat16",
    "where the processor multiplies that. SQNR is that of the worst output over the evaluation data, against ONNX",
    "Runtime's float32.",
)


def write_openvino(folder: Path, results: Sequence[ModelResult], context: Mapping[str, str]) -> list[Path]:
    """Write ``openvino.md`` and ``openvino.json``, each under a temporary name first, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "context": dict(context),
        "means": {group: means(members) for group, members in _groups(results).items()},
        "models": [asdict(result) for result in results],
    }
    texts = {"md": markdown(results, context), "json": json.dumps(data, indent=1) + "\n"}
    written = []
    for suffix, text in texts.items():
        path = folder / f"openvino.{suffix}"
        temporary = path.with_name(path.name + ".partial")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
        written.append(path)
    return written


def means(results: Sequence[ModelResult]) -> dict[str, float]:
    """Return geometric means over models: ours against NNCF's and OpenVINO's float, and the usable speed-ups."""
    against_nncf = [r for r in (over(m, OURS_OPENVINO, nncf_of(m)) for m in results) if r is not None]
    against_float = [r for r in (over(m, OURS_OPENVINO, m.forms.get(FLOAT_OPENVINO)) for m in results) if r is not None]
    found = {
        "ours over NNCF": geometric_mean(r[0] for r in against_nncf),
        "ours over NNCF, medians": geometric_mean(r[1] for r in against_nncf),
        "models with an output of NNCF": float(len(against_nncf)),
        "ours over float of OpenVINO": geometric_mean(r[0] for r in against_float),
        "usable speed-up, NNCF": geometric_mean(
            max((m.forms[n].usable_speedup for n in NNCF if n in m.forms), default=1.0) for m in results
        ),
    }
    for name in (FLOAT_OPENVINO, OURS_OPENVINO, OURS_CPU):
        found[f"usable speed-up, {name}"] = geometric_mean(m.forms[name].usable_speedup for m in results)
    return found


def nncf_of(result: ModelResult) -> FormResult | None:
    """Return the output of NNCF that counts: the fastest usable one, else the fastest that runs, None if none does."""
    running = [result.forms[n] for n in NNCF if n in result.forms and result.forms[n].speedup is not None]
    return max(running, key=lambda f: (f.usable, f.speedup or 0.0), default=None)


def over(result: ModelResult, form: str, other: FormResult | None) -> tuple[float, float] | None:
    """Return (minima, medians) of another form's latency over a form's, None where one was not measured."""
    mine = result.forms[form]
    if other is None or other.milliseconds is None or mine.milliseconds is None:
        return None
    return other.milliseconds[0] / mine.milliseconds[0], other.milliseconds[1] / mine.milliseconds[1]


def markdown(results: Sequence[ModelResult], context: Mapping[str, str]) -> str:
    """Return the whole page."""
    lines = ["# OpenVINO on CPU", "", "Made by `python benchmarks/on_openvino.py`; do not edit.", ""]
    lines += [f"- {key}: {value}" for key, value in context.items()]
    lines += ["", *_DEFINITION, ""]
    for group, members in _groups(results).items():
        lines += [f"## {group}", "", *_headline(members), ""]
    lines += ["## All forms", "", *(f"- `{form.name}`: {form.what}" for form in OPENVINO_FORMS), ""]
    for result in results:
        lines += [f"### {result.name}", "", *_details(result), ""]
    return "\n".join(lines).rstrip() + "\n"


def _groups(results: Sequence[ModelResult]) -> dict[str, list[ModelResult]]:
    return {group: [r for r in results if r.group == group] for group in dict.fromkeys(r.group for r in results)}


def _headline(results: Sequence[ModelResult]) -> list[str]:
    lines = [
        "| model | metric, float | NNCF | its metric | its SQNR, dB | ours | our metric | our SQNR, dB "
        "| ours over NNCF | ours over OpenVINO's float | float of OpenVINO over ONNX Runtime's "
        "| `cpu`: engine | its usable speed-up | its metric |",
        "|" + "---|" * 14,
    ]
    for result in results:
        reference, cpu = result.forms[FLOAT], result.forms[OURS_CPU]
        main = next(iter(reference.metrics))
        theirs, mine = nncf_of(result), result.forms[OURS_OPENVINO]
        lines.append(
            _row(
                result.name,
                f"{main} {reference.metrics[main]:.4f}",
                *(("none", "", "") if theirs is None else (_name(theirs), *_quality(theirs, main))),
                _name(mine),
                *_quality(mine, main),
                _pair(over(result, OURS_OPENVINO, theirs)),
                _pair(over(result, OURS_OPENVINO, result.forms.get(FLOAT_OPENVINO))),
                _ratio(result.forms[FLOAT_OPENVINO].speedup),
                str(cpu.notes.get("engine", "")),
                f"{cpu.usable_speedup:.2f}" + ("" if cpu.usable else " (not usable)"),
                _quality(cpu, main)[0],
            )
        )
    total = means(results)
    lines.append(
        _row(
            "**geometric mean**", "", "", "", "", "", "", "", f"**{total['ours over NNCF']:.2f}**",
            f"**{total['ours over float of OpenVINO']:.2f}**", "", "",
            f"**{total[f'usable speed-up, {OURS_CPU}']:.2f}**", "",
        )
    )  # fmt: skip
    usable = [f"`{name.rpartition(', ')[2]}` {value:.2f}" for name, value in total.items() if name.startswith("usable")]
    return [*lines, "", f"Usable speed-up against float on ONNX Runtime, geometric mean: {', '.join(usable)}."]


def _name(form: FormResult) -> str:
    if form.speedup is None:
        return f"fails: {form.error}".replace("|", "/")
    return f"{form.speedup:.2f}" + ("" if form.usable else " !")


def _quality(form: FormResult, metric: str) -> tuple[str, str]:
    worst = form.worst_sqnr
    return f"{form.metrics[metric]:.4f}" if metric in form.metrics else "", "" if worst is None else f"{worst:.1f}"


def _details(result: ModelResult) -> list[str]:
    metrics = list(result.forms[FLOAT].metrics)
    lines = [
        _row("form", "against float on ONNX Runtime", "ms", *metrics, "SQNR, dB", "compile, s", "note"),
        "|" + "---|" * (6 + len(metrics)),
    ]
    for name, form in result.forms.items():
        speed = None if form.speedup is None or form.speedup_median is None else (form.speedup, form.speedup_median)
        notes = form.notes
        said = form.error or (f"{notes['engine']}, fused {notes['fused']} / {notes['planned']}" if notes else "")
        worst = form.worst_sqnr
        lines.append(
            _row(
                f"`{name}`",
                _pair(speed),
                "" if form.milliseconds is None else f"{form.milliseconds[0]:.4g}",
                *(f"{form.metrics[m]:.4f}" if m in form.metrics else "" for m in metrics),
                "" if worst is None or name == FLOAT else f"{worst:.1f}",
                f"{form.seconds:.1f}" if form.seconds else "",
                said.replace("|", "/"),
            )
        )
    return [*lines, "", f"{result.rounds} rounds."]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _pair(value: tuple[float, float] | None) -> str:
    return "" if value is None else f"{value[0]:.2f} ({value[1]:.2f})"
