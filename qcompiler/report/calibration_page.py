"""The picture of a calibration as one HTML page: needs no network, can be printed, can be used with the mouse alone."""

from __future__ import annotations

import statistics as stats
from collections.abc import Mapping, Sequence
from html import escape
from xml.sax.saxutils import quoteattr

from qcompiler.calibration.statistics import Statistics
from qcompiler.report.calibration_figures import CHANNEL_FACTOR, MOST_BARS, TAIL, TensorFigure
from qcompiler.report.calibration_svg import COLOURS, channel_strip, histogram, number, share, spark

OUTLYING = 10.0
"""Outlier ratio from which the list marks a tensor."""

_STYLE = """
:root{--ink:#1c2530;--dim:#5b6875;--line:#d9dfe6;--soft:#f4f6f8;--bar:#8fa3b8;--alarm:#c4122f}
*{box-sizing:border-box}
body{margin:0 auto;padding:20px 24px 60px;max-width:1180px;color:var(--ink);background:#fff;
font:14px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:21px;margin:0 0 2px}p{margin:4px 0 10px;color:var(--dim);max-width:90ch}
p.note{color:var(--alarm)}b.alarm,.alarm{color:var(--alarm)}
table.estimators{border-collapse:collapse;margin:10px 0 14px}
.estimators th,.estimators td{padding:2px 14px 2px 0;text-align:right;font-variant-numeric:tabular-nums}
.estimators th{font-weight:500;color:var(--dim)}.estimators th:first-child,.estimators td:first-child{text-align:left}
.swatch{display:inline-block;width:26px;height:9px;margin-right:7px;border-radius:1px}
.bar{display:inline-block;height:9px;background:var(--bar);margin-left:8px;vertical-align:baseline}
.tools{display:flex;gap:18px;align-items:center;margin:8px 0;flex-wrap:wrap}
.tools input[type=search]{font:inherit;padding:4px 8px;width:280px;border:1px solid #b6c0ca;border-radius:4px}
.tools button{font:inherit;padding:3px 10px;border:1px solid #b6c0ca;border-radius:4px;background:#fff;cursor:pointer}
.row,.head{display:grid;gap:10px;align-items:center;
grid-template-columns:minmax(140px,1fr) 180px 62px 74px 74px 74px 62px 66px 72px}
.head{position:sticky;top:0;background:#fff;border-bottom:2px solid var(--ink);z-index:1;padding:4px 8px}
.head button{all:unset;cursor:pointer;text-align:right;font-size:12px;line-height:1.2;color:var(--dim)}
.head button:nth-child(-n+2){text-align:left}.head button[aria-sort]{color:var(--ink);font-weight:600}
.head button[aria-sort=descending]::after{content:" \\25be"}.head button[aria-sort=ascending]::after{content:" \\25b4"}
details{border-bottom:1px solid var(--line);content-visibility:auto;contain-intrinsic-size:auto 41px}
summary{list-style:none;cursor:pointer;padding:4px 8px}summary::-webkit-details-marker{display:none}
summary:hover,details[open]>summary{background:var(--soft)}
.row span{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.row .name{text-align:left;position:relative;padding-left:15px;
overflow-wrap:anywhere;white-space:normal;font-size:13px;line-height:1.25}
.row .name::before{content:"\\25b8";color:var(--dim);position:absolute;left:0}
details[open] .name::before{content:"\\25be"}
.picture{padding:6px 8px 14px}.picture p{margin:2px 0 4px}
svg{display:block}svg.spark{width:180px;height:30px}svg.histogram,svg.channels{width:100%;max-width:1130px;height:auto}
svg text{font-size:11px;fill:var(--ink);font-variant-numeric:tabular-nums}
svg text.label{font-size:11.5px}svg text.best{font-weight:700}
svg .tick{fill:var(--dim);font-size:10px}svg .up{font-size:7.5px}
svg .grid{stroke:#e6eaee}svg .zero{stroke:#9aa7b4}
svg .bars{fill:var(--bar)}svg .channel{fill:#7f97ae}svg rect.outlier,svg text.outlier{fill:var(--alarm)}
svg .bound{stroke:var(--alarm);stroke-dasharray:4 3;opacity:.75}
svg .range{stroke-width:1.4}svg .lane{opacity:.85}
svg line.zeros{stroke:#1c2530;stroke-width:1.4}svg circle.zeros{fill:#fff;stroke:#1c2530;stroke-width:1.4}
@media print{.tools,.head button::after{display:none}.head{position:static}body{max-width:none;padding:0}
details{content-visibility:visible;break-inside:avoid}
svg{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""

_SCRIPT = """
const list=document.getElementById('list'),rows=[...list.children],search=document.getElementById('search'),
only=document.getElementById('only'),shown=document.getElementById('shown');
function filter(){const text=search.value.toLowerCase();let count=0;for(const row of rows){
const hit=row.dataset.name.toLowerCase().includes(text)&&(!only.checked||row.dataset.marked==='1');
row.hidden=!hit;count+=hit;}shown.textContent=count+' of '+rows.length+' tensors';}
search.addEventListener('input',filter);only.addEventListener('change',filter);
document.getElementById('open').addEventListener('click',()=>rows.forEach(row=>row.open=!row.hidden));
document.getElementById('close').addEventListener('click',()=>rows.forEach(row=>row.open=false));
for(const button of document.querySelectorAll('.head button'))button.addEventListener('click',()=>{
const key=button.dataset.key,text=key==='name',now=button.getAttribute('aria-sort'),
down=now?now==='ascending':!text&&key!=='order'&&key!=='min';
document.querySelectorAll('.head button').forEach(other=>other.removeAttribute('aria-sort'));
button.setAttribute('aria-sort',down?'descending':'ascending');
const value=row=>text?row.dataset.name:Number(row.dataset[key]);
rows.sort((a,b)=>{const x=value(a),y=value(b),c=x<y?-1:x>y?1:0;return (down?-c:c)||a.dataset.order-b.dataset.order;});
list.append(...rows);});
"""

_COLUMNS = (
    ("order", "histogram, ranges"),
    ("count", "elements"),
    ("min", "min"),
    ("max", "max"),
    ("std", "std"),
    ("zeros", "zeros"),
    ("ratio", "outlier<br>ratio"),
    ("channels", "outlier<br>channels"),
)


def colours(estimators: Sequence[str]) -> dict[str, str]:
    """Return the colour of each estimator."""
    return {estimator: COLOURS[place % len(COLOURS)] for place, estimator in enumerate(estimators)}


def page(
    found: Sequence[TensorFigure],
    statistics: Statistics,
    estimators: Sequence[str],
    spec_text: str,
    silent: Sequence[str],
) -> str:
    """Return the page.

    Args:
        found: the tensors, in the order to show them in.
        statistics: where they come from.
        estimators: whose ranges are drawn.
        spec_text: what ranges are quantized to, for people.
        silent: tensors that were never executed.
    """
    palette = colours(estimators)
    rows = "\n".join(_row(figure, palette) for figure in found)
    head = '<button data-key="name">tensor</button>' + "".join(
        f'<button data-key="{key}"{_sorted(key)}>{title}</button>' for key, title in _COLUMNS
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>Calibration: {len(found)} tensors</title>\n<style>{_STYLE}</style></head><body>\n"
        f"{_intro(found, statistics, spec_text)}\n{_estimators(found, estimators, palette)}\n{_legend()}\n"
        '<div class="tools"><input id="search" type="search" placeholder="find a tensor" aria-label="find a tensor">'
        '<label><input id="only" type="checkbox"> only with outliers</label>'
        '<button id="open">open all shown</button><button id="close">close all</button>'
        f'<span id="shown">{len(found)} of {len(found)} tensors</span></div>\n'
        f'<div class="head">{head}</div>\n<div id="list">\n{rows}\n</div>\n{_silent(silent)}'
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def marked(figure: TensorFigure) -> bool:
    """Return whether the list marks a tensor: a large outlier ratio, or outlier channels."""
    return figure.outlier_ratio >= OUTLYING or figure.outlier_channels > 0


def _sorted(key: str) -> str:
    return ' aria-sort="descending"' if key == "ratio" else ""


def _intro(found: Sequence[TensorFigure], statistics: Statistics, spec_text: str) -> str:
    tails = sum(f.outlier_ratio >= OUTLYING for f in found)
    channels = sum(f.outlier_channels > 0 for f in found)
    about = statistics.about
    parts = [f"{statistics.feeds} feeds", about.get("engine", ""), f"ranges for {spec_text}"]
    note = f'<p class="note">Synthetic feeds: {escape(statistics.synthetic)}</p>' if statistics.synthetic else ""
    return (
        f"<h1>Calibration: {len(found)} tensors</h1>"
        f"<p>{escape(' · '.join(p for p in parts if p))}</p>{note}"
        f'<p><b class="{"alarm" if tails else ""}">{tails}</b> with an outlier ratio of {OUTLYING:g} or more, '
        f'<b class="{"alarm" if channels else ""}">{channels}</b> with outlier channels.</p>'
    )


def _estimators(found: Sequence[TensorFigure], estimators: Sequence[str], palette: Mapping[str, str]) -> str:
    """Return the table of estimators: how well each does over all tensors."""
    rows = []
    for place, estimator in enumerate(estimators):
        here = [f.ranges[place] for f in found if not f.ranges[place].problem]
        known = [r.sqnr_db for r in here if r.sqnr_db is not None]
        best = sum(f.best is not None and f.best == f.ranges[place] for f in found)
        rows.append(
            f'<tr><td><i class="swatch" style="background:{palette[estimator]}"></i>{escape(estimator)}</td>'
            f"<td>{best}<i class='bar' style='width:{90 * best / len(found):.1f}px'></i></td>"
            f"<td>{f'{stats.median(known):.1f} dB' if known else ''}</td>"
            f"<td>{f'{min(known):.1f} dB' if known else ''}</td>"
            f"<td>{share(stats.fmean(r.clipped for r in here)) if here else ''}</td></tr>"
        )
    return (
        '<table class="estimators"><tr><th>estimator</th><th>best on tensors ★</th><th>median SQNR</th>'
        f"<th>least SQNR</th><th>clipped on average</th></tr>{''.join(rows)}</table>"
    )


def _legend() -> str:
    return (
        "<p>Click a tensor for its picture; what is open is printed. Counts are drawn on a logarithmic scale, in at "
        f"most about {MOST_BARS} bars; the pin is exact zeros, which are in no bar. A range is drawn as two lines "
        "and a bar in its lane; beside it stand its ends, the share of elements it clips, and the SQNR to expect of "
        "the tensor itself (from the histogram). "
        f"<b>Outlier ratio</b>: largest magnitude / the one that {100 * TAIL:g} % of the elements stay below. "
        f"<b>Outlier channel</b>: reaches farther than {CHANNEL_FACTOR:g} × the median of all channels that are not "
        "always zero (dashed red lines).</p>"
    )


def _row(figure: TensorFigure, palette: Mapping[str, str]) -> str:
    tensor = figure.tensor
    keys = {
        "name": figure.name, "order": figure.order, "count": tensor.count, "min": tensor.minimum, "max": tensor.maximum,
        "std": tensor.std, "zeros": figure.zero_share, "ratio": figure.outlier_ratio,
        "channels": figure.outlier_channels, "marked": int(marked(figure)),
    }  # fmt: skip
    data = " ".join(f"data-{key}={quoteattr(str(value))}" for key, value in keys.items())
    channels = "" if figure.channels is None else f"{figure.outlier_channels} / {figure.channels.low.size}"
    cells = (
        (_count(tensor.count), False),
        (number(tensor.minimum), False),
        (number(tensor.maximum), False),
        (number(tensor.std), False),
        (share(figure.zero_share), False),
        (f"{figure.outlier_ratio:.3g}", figure.outlier_ratio >= OUTLYING),
        (channels, figure.outlier_channels > 0),
    )
    spans = "".join(f"<span{' class=alarm' if alarm else ''}>{text}</span>" for text, alarm in cells)
    strip = "" if figure.channels is None else channel_strip(figure.channels)
    return (
        f'<details {data}><summary><div class="row"><span class="name">{escape(figure.name)}</span>'
        f'{spark(figure, palette)}{spans}</div></summary><div class="picture">{_facts(figure)}'
        f"{histogram(figure, palette)}{strip}</div></details>"
    )


def _facts(figure: TensorFigure) -> str:
    tensor = figure.tensor
    facts = [
        f"{tensor.count:,} elements of {tensor.executions} feeds", f"mean {number(tensor.mean)}",
        f"std {number(tensor.std)}", f"{share(figure.zero_share)} zeros",
    ]  # fmt: skip
    if tensor.infinities:
        facts.append(f"{tensor.infinities:,} infinite, left out")
    if tensor.nans:
        facts.append(f'<span class="alarm">{tensor.nans:,} NaN</span>, left out')
    return f"<p>{' · '.join(facts)}</p>"


def _count(count: int) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return str(count)


def _silent(names: Sequence[str]) -> str:
    if not names:
        return ""
    listed = ", ".join(escape(n) for n in names)
    return f"<p>Never executed during calibration, so without ranges ({len(names)}): {listed}</p>\n"
