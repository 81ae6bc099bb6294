"""Small drawings of graphs for the pages of rules and passes."""

from __future__ import annotations

from collections.abc import Set
from html import escape

import onnx_ir as ir

from qcompiler.report.viewer_layout import lay_out

_HEIGHT, _MARGIN, _LETTER = 26.0, 6.0, 7.4
_MOST_NODES = 14


def drawings(before: ir.Graph, after: ir.Graph) -> str:
    """Return two graphs side by side as SVG, what vanishes and what is new framed; empty if they are too large."""
    if max(len(before), len(after)) > _MOST_NODES:
        return ""
    old, new = ({_key(node) for node in graph} for graph in (before, after))
    return f'<div class="before-after">\n{_svg(before, old - new, "gone")}\n{_svg(after, new - old, "new")}\n</div>'


def _key(node: ir.Node) -> tuple[str, ...]:
    return (node.op_type, *(str(v.name) for v in node.inputs if v is not None), *(str(v.name) for v in node.outputs))


def _svg(graph: ir.Graph, marked: Set[tuple[str, ...]], mark: str) -> str:
    nodes = list(graph)
    place: dict[ir.Value, int] = {value: index for index, value in enumerate(graph.inputs)}
    labels = [str(value.name) for value in graph.inputs]
    kinds = ["value"] * len(labels)
    edges: list[tuple[int, int]] = []
    for node in nodes:
        here = len(labels)
        labels.append(_label(node))
        kinds.append(f"node {mark}" if _key(node) in marked else "node")
        edges += [(place[value], here) for value in node.inputs if value is not None and value in place]
        place |= dict.fromkeys(node.outputs, here)
    for value in graph.outputs:
        if value in place:
            edges.append((place[value], len(labels)))
        labels.append(str(value.name))
        kinds.append("value")
    sizes = [(len(label) * _LETTER + 14, _HEIGHT) for label in labels]
    layout = lay_out(sizes, edges)
    left = min((x - width / 2 for x, (width, _) in zip(layout.x, sizes, strict=True)), default=0.0) - _MARGIN
    right = max((x + width / 2 for x, (width, _) in zip(layout.x, sizes, strict=True)), default=0.0) + _MARGIN
    high = max(layout.y, default=0.0) + _HEIGHT + 2 * _MARGIN
    width = right - left
    parts = [
        f'<svg class="graph" role="img" aria-label="{"before" if mark == "gone" else "after"}" '
        f'width="{width:.0f}" height="{high:.0f}" viewBox="{left:.0f} {-_MARGIN:.0f} {width:.0f} {high:.0f}">'
    ]
    for (start, end), route in zip(edges, layout.routes, strict=True):
        points = [(layout.x[start], layout.y[start] + _HEIGHT), *route, (layout.x[end], layout.y[end])]
        path = " ".join(f"{x:.0f},{y:.0f}" for x, y in points)
        parts.append(f'<polyline class="edge" points="{path}"/>')
    for label, kind, x, y, (wide, _) in zip(labels, kinds, layout.x, layout.y, sizes, strict=True):
        parts.append(
            f'<rect class="{kind}" x="{x - wide / 2:.0f}" y="{y:.0f}" width="{wide:.0f}" height="{_HEIGHT:.0f}" '
            f'rx="4"/>'
            f'<text x="{x:.0f}" y="{y + 17:.0f}">{escape(label)}</text>'
        )
    return "".join([*parts, "</svg>"])


def _label(node: ir.Node) -> str:
    """Return the operator, with its constant operands of one element."""
    numbers = []
    for value in node.inputs:
        if value is not None and value.const_value is not None and value.const_value.size == 1:
            numbers.append(f"{value.const_value.numpy().item():.4g}")
    return f"{node.op_type}({', '.join(numbers)})" if numbers else node.op_type
