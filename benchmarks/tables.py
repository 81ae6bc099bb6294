"""Write the results as Markdown for readers and JSON for programs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from baselines import FLOAT, FORMS, OURS, OURS_CPU
from measuring import ModelResult, usable_means
from scoring import FormResult

STATIC_RIVALS = ("ort-static", "ort-u8s8-minmax", "ort-u8s8-percentile")
RIVALS = tuple(form.name for form in FORMS if form.name not in (FLOAT, OURS, OURS_CPU))


def write_results(folder: Path, stem: str, results: Sequence[ModelResult], context: Mapping[str, str]) -> list[Path]:
    """Write ``STEM.md`` and ``STEM.json``, each under a temporary name first, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    means = usable_means(results, RIVALS, OURS, OURS_CPU)
    data = {
        "context": dict(context),
        "usable_speedup": means,
        "models": [
            asdict(r) | {"usable_speedup": {name: f.usable_speedup for name, f in r.forms.items()}} for r in results
        ],
    }
    texts = {"md": markdown(results, means, context), "json": json.dumps(data, indent=1) + "\n"}
    written = []
    for suffix, text in texts.items():
        path = folder / f"{stem}.{suffix}"
        temporary = path.with_name(path.name + ".partial")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
        written.append(path)
    return written


def markdown(
    results: Sequence[ModelResult], means: Mapping[str, Mapping[str, float]], context: Mapping[str, str]
) -> str:
    """Return the whole page."""
    lines = ["# ONNX Runtime on CPU", "", "Made by `python benchmarks/cpu.py`; do not edit.", ""]
    lines += [f"- {key}: {value}" for key, value in context.items()]
    lines += ["", "## Usable speed-up", "", *_DEFINITION, ""]
    for group in dict.fromkeys(r.group for r in results):
        lines += [f"### {group}", "", *_headline([r for r in results if r.group == group], means[group]), ""]
    lines += ["## What the planner promised", "", *_promises(results), ""]
    lines += ["## All forms", ""]
    lines += [f"- `{form.name}`: {form.what}" + _cap(form.most_feeds) for form in FORMS]
    lines += ["", *_COLUMNS, ""]
    for result in results:
        lines += [f"### {result.name}", "", *_details(result), ""]
    return "\n".join(lines).rstrip() + "\n"


_DEFINITION = (
    "Float latency / latency of the form, minima of interleaved rounds. It counts as 1.0 where the form is slower than",
    "float, does not work, or one of its metrics falls by more than a point (0.01; 1 % where a metric is unbounded).",
    '"Float" is the model as given, also where that is quantized already. SQNR is that of the worst output over the',
    "evaluation data.",
)
_COLUMNS = (
    "Speed-ups are float / form of the minima and of the medians. Memory is the peak of the process that builds the",
    "form, with interpreter and calibration data; each form is built alone in a process of its own.",
)


def _cap(most: int | None) -> str:
    if most is None:
        return ""
    return f", on {most} calibration feeds at most since it keeps every activation of all feeds (fewer: see the note)"


def _headline(results: Sequence[ModelResult], means: Mapping[str, float]) -> list[str]:
    lines = [
        "| model | metric, float | best form of ONNX Runtime | its usable speed-up | its metric | its SQNR, dB "
        "| ours, usable speed-up | our metric | our SQNR, dB | integer share | fused / planned "
        "| `--target cpu`, usable |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        best, ours, reference = result.best_of(RIVALS), result.forms.get(OURS), result.forms[FLOAT]
        main = next(iter(reference.metrics))
        theirs = ("none is usable", "1.00", "", "") if _has_rivals(result) else ("not measured", "", "", "")
        if best is not None:
            theirs = (best.form, f"{best.usable_speedup:.2f}", f"{best.metrics[main]:.4f}", _decibels(best))
        mine = ("", "", "", "", "")
        if ours is not None:
            notes = ours.notes
            mine = (
                f"{ours.usable_speedup:.2f}" + ("" if ours.usable else " (not usable)"),
                f"{ours.metrics[main]:.4f}" if main in ours.metrics else str(ours.error),
                _decibels(ours),
                f"{notes['integer_share']:.0%}" if "integer_share" in notes else "",
                f"{notes['fused']} / {notes['planned']}" if "planned" in notes else "",
            )
        lines.append(_row(result.name, f"{main} {reference.metrics[main]:.4f}", *theirs, *mine, _on_cpu(result)))
    best_mean, our_mean, cpu_mean = means["best of ONNX Runtime per model"], means.get(OURS), means.get(OURS_CPU)
    blank = ("", "")
    lines.append(
        _row(
            "**geometric mean**",
            "",
            "",
            f"**{best_mean:.2f}**" if all(map(_has_rivals, results)) else "",
            *blank,
            "" if our_mean is None else f"**{our_mean:.2f}**",
            *blank,
            *blank,
            "" if cpu_mean is None else f"**{cpu_mean:.2f}**",
        )
    )
    whole = {name for name in RIVALS if all(name in result.forms for result in results)}
    others = [f"`{name}` {value:.2f}" for name, value in means.items() if name in whole]
    return [*lines, "", f"One form for all models, geometric mean: {', '.join(others)}."] if others else lines


def _promises(results: Sequence[ModelResult]) -> list[str]:
    """Return what the chosen plans were told to take and to be, and how close ONNX Runtime's static forms come."""
    lines = [
        "Time and SQNR of the plan that was taken, as it was promised after the proofs before it, and as measured; and",
        "the SQNR on evaluation data beside that of ONNX Runtime's best static form.",
        "",
        "| model | us, promised | measured | off | dB, promised | measured | off | our SQNR | their best static |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    times, noises = [], []
    for result in results:
        ours = result.forms.get(OURS)
        statics = [f for n, f in result.forms.items() if n in STATIC_RIVALS and f.worst_sqnr is not None]
        theirs = max((f.worst_sqnr or 0.0 for f in statics), default=None)
        plan = ours.notes.get("plan", {}) if ours is not None else {}
        cells = [""] * 6
        if plan.get("measured_us"):
            off = plan["predicted_us"] / plan["measured_us"] - 1.0
            times.append(abs(off))
            cells[:3] = [f"{plan['predicted_us']:.0f}", f"{plan['measured_us']:.0f}", f"{100 * off:+.1f} %"]
        promised, measured = plan.get("predicted_db", {}), plan.get("measured_db", {})
        pairs = [(promised[name], db) for name, db in measured.items() if name in promised]
        if pairs:
            told, found = max(pairs, key=lambda pair: abs(pair[0] - pair[1]))
            noises.append(abs(told - found))
            cells[3:] = [f"{told:.1f}", f"{found:.1f}", f"{told - found:+.1f}"]
        own = "" if ours is None else _decibels(ours)
        lines.append(_row(result.name, *cells, own, "" if theirs is None else f"{theirs:.1f}"))
    if times and noises:
        lines += [
            "",
            f"Off by {100 * statistics.median(times):.1f} % of the time and {statistics.median(noises):.1f} dB at the",
            f"worst output (medians); at most {100 * max(times):.1f} % and {max(noises):.1f} dB.",
        ]
    return lines


def _has_rivals(result: ModelResult) -> bool:
    return any(name in result.forms for name in RIVALS)


def _on_cpu(result: ModelResult) -> str:
    """Return the usable speed-up of the best engine of this processor, and its name."""
    form = result.forms.get(OURS_CPU)
    if form is None:
        return ""
    return f"{form.usable_speedup:.2f} {form.notes.get('engine', '')}" + ("" if form.usable else " (not usable)")


def _details(result: ModelResult) -> list[str]:
    metrics = list(result.forms[FLOAT].metrics)
    lines = [
        _row(
            "form", "speed-up, min", "median", "usable", *metrics, "SQNR, dB", "size", "compile, s", "peak, MiB", "note"
        ),
        "|" + "---|" * (9 + len(metrics)),
    ]
    whole = result.forms[FLOAT].size
    for form, f in result.forms.items():
        note = f.error or ""
        cap = next((x.most_feeds for x in FORMS if x.name == form), None)
        if cap is not None and f.feeds:
            note = f"{f.feeds} calibration feeds" + (f"; {note}" if note else "")
        lines.append(
            _row(
                f"`{form}`",
                _ratio(f.speedup),
                _ratio(f.speedup_median),
                f"{f.usable_speedup:.2f}" + ("" if f.usable else " (no)"),
                *(f"{f.metrics[m]:.4f}" if m in f.metrics else "" for m in metrics),
                _decibels(f) if form != FLOAT else "",
                f"{f.size / whole:.2f}" if f.size and whole else "",
                f"{f.seconds:.1f}" if f.seconds else "",
                f"{f.peak_mib:.0f}" if f.peak_mib else "",
                note.replace("|", "/"),
            )
        )
    return [*lines, "", f"{result.rounds} rounds."]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _decibels(form: FormResult) -> str:
    worst = form.worst_sqnr
    return "" if worst is None else f"{worst:.1f}"
