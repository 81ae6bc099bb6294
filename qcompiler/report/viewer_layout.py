"""Lay out a directed graph in layers, top down, for pages that draw thousands of nodes.

The method is that of Sugiyama, Tagawa and Toda (1981): layers by longest path, dummy vertices where an edge passes a
layer, barycenter sweeps against crossings. Positions are the least squares fit to the neighbours' under the order and
the distances in a layer, which is an isotonic regression (pool adjacent violators). All edges of one node that pass a
layer share a dummy, so a value read all over a deep graph costs one line, not hundreds.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

GAP_X = 18.0
GAP_Y = 26.0

_SWEEPS = 8
_ROUNDS = 12
_STRAIGHT = 8.0
"""Weight of an edge between two dummies against one between nodes: long lines are to be straight."""
_ASIDE = 0.05
_DUMMY_WIDTH = 4.0
_BUDGET = 5
"""Dummies per node above which the longest edges are drawn without a route."""


@dataclass(frozen=True)
class Layout:
    """Where everything is; x grows to the right, y downwards.

    Attributes:
        x: centre of each node.
        y: top of each node.
        layer: layer of each node, from 0; an edge leads to a higher one.
        routes: for each edge the points between its ends, none for a direct line.
        unrouted: indices of edges that are too long for a route, or lead backwards.
        width: extent of all nodes.
        height: extent of all nodes.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    layer: tuple[int, ...]
    routes: tuple[tuple[tuple[float, float], ...], ...]
    unrouted: frozenset[int]
    width: float
    height: float


def lay_out(sizes: Sequence[tuple[float, float]], edges: Sequence[tuple[int, int]]) -> Layout:
    """Return a layout of nodes of the given sizes.

    Args:
        sizes: (width, height) per node, in program order.
        edges: (from, to); one that leads to an earlier node, or to itself, has no influence on the layout.
    """
    if not sizes:
        return Layout((), (), (), (), frozenset(), 0.0, 0.0)
    forward = [(s, t) for s, t in edges if s < t]
    layer = assign_layers(len(sizes), forward)
    drawing = _Drawing(sizes, layer, forward)
    drawing.order()
    drawing.place()
    return drawing.layout(edges)


def assign_layers(count: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """Return the layer of each node: the longest path from a source, sources and fans pulled down to their readers.

    Args:
        count: number of nodes.
        edges: (from, to), all from a lower number to a higher one.
    """
    before: list[list[int]] = [[] for _ in range(count)]
    behind: list[list[int]] = [[] for _ in range(count)]
    for source, target in dict.fromkeys(edges):
        before[target].append(source)
        behind[source].append(target)
    layer = [0] * count
    for node in range(count):
        layer[node] = max((layer[s] + 1 for s in before[node]), default=0)
    for node in reversed(range(count)):
        if len(behind[node]) > len(before[node]):
            layer[node] = min(layer[t] for t in behind[node]) - 1
    return layer


class _Drawing:
    """Nodes and dummies in layers; numbers below ``count`` are nodes."""

    def __init__(
        self, sizes: Sequence[tuple[float, float]], layer: Sequence[int], edges: Sequence[tuple[int, int]]
    ) -> None:
        self.sizes, self.count = sizes, len(sizes)
        self.layer = list(layer)
        self.widths = [w for w, _ in sizes]
        self.up: list[list[int]] = [[] for _ in sizes]
        self.down: list[list[int]] = [[] for _ in sizes]
        self.limit = _longest_routed(edges, layer, _BUDGET * len(sizes) + 2000)
        self.chains: dict[int, list[int]] = {}
        for source, target in dict.fromkeys(edges):
            if layer[target] - layer[source] <= self.limit:
                self._connect(source, target)
        self.rows: list[list[int]] = [[] for _ in range(max(self.layer) + 1)]
        for vertex, row in enumerate(self.layer):
            self.rows[row].append(vertex)
        self.x = [0.0] * len(self.layer)

    def _connect(self, source: int, target: int) -> None:
        """Link two nodes through dummies, those that the source has already first."""
        chain = self.chains.setdefault(source, [])
        for index in range(self.layer[target] - self.layer[source] - 1):
            if index == len(chain):
                chain.append(len(self.layer))
                self.layer.append(self.layer[source] + index + 1)
                self.widths.append(_DUMMY_WIDTH)
                self.up.append([])
                self.down.append([])
                self._link(chain[index - 1] if index else source, chain[index])
        span = self.layer[target] - self.layer[source]
        self._link(chain[span - 2] if span > 1 else source, target)

    def _link(self, upper: int, lower: int) -> None:
        self.down[upper].append(lower)
        self.up[lower].append(upper)

    # ---- order in a layer --------------------------------------------------------------------------------------

    def order(self) -> None:
        """Sort every layer so that few edges cross; the best of several sweeps is kept."""
        best, least = [list(row) for row in self.rows], self._crossings()
        for sweep in range(_SWEEPS):
            downwards = sweep % 2 == 0
            rows = self.rows if downwards else self.rows[::-1]
            beside = self.up if downwards else self.down
            for fixed, row in pairwise(rows):
                place = {vertex: index for index, vertex in enumerate(fixed)}
                key = {}
                for index, vertex in enumerate(row):
                    near = beside[vertex]
                    # Without a neighbour a vertex stays about where it is.
                    scaled = index * len(fixed) / len(row)
                    key[vertex] = sum(place[n] for n in near) / len(near) if near else scaled
                row.sort(key=key.__getitem__)
            crossings = self._crossings()
            if crossings < least:
                best, least = [list(row) for row in self.rows], crossings
            if least == 0:
                break
        self.rows = best

    def _crossings(self) -> int:
        total = 0
        for upper, lower in pairwise(self.rows):
            place = {vertex: index for index, vertex in enumerate(lower)}
            seen: list[int] = []
            for vertex in upper:
                ends = sorted(place[n] for n in self.down[vertex])
                total += sum(len(seen) - bisect_right(seen, end) for end in ends)
                for end in ends:
                    insort(seen, end)
        return total

    # ---- positions ---------------------------------------------------------------------------------------------

    def place(self) -> None:
        """Give every vertex an x: near its neighbours, in the order of its layer, without overlap."""
        gaps = [self._gaps(row) for row in self.rows]
        for row, gap in zip(self.rows, gaps, strict=True):
            for vertex, offset in zip(row, gap, strict=True):
                self.x[vertex] = offset - gap[-1] / 2
        for number in range(_ROUNDS):
            both = number >= _ROUNDS - 2
            upwards = number % 2 == 1
            rows = range(len(self.rows) - 1, -1, -1) if upwards else range(len(self.rows))
            for index in rows:
                self._fit(self.rows[index], gaps[index], both or not upwards, both or upwards)
        left = min(self.x[v] - self.widths[v] / 2 for v in range(self.count))
        self.x = [x - left for x in self.x]

    def _gaps(self, row: Sequence[int]) -> list[float]:
        """Return the least distances from the first vertex of a layer."""
        offsets = [0.0]
        for first, second in pairwise(row):
            offsets.append(offsets[-1] + (self.widths[first] + self.widths[second]) / 2 + GAP_X)
        return offsets

    def _fit(self, row: Sequence[int], offsets: Sequence[float], above: bool, below: bool) -> None:
        wanted, weights = [], []
        for vertex, offset in zip(row, offsets, strict=True):
            total = weight = 0.0
            for near in (*(self.up[vertex] if above else ()), *(self.down[vertex] if below else ())):
                share = self._pull(vertex, near)
                total += share * self.x[near]
                weight += share
            # A vertex without neighbours keeps its place, but yields to all others.
            wanted.append((total / weight if weight else self.x[vertex]) - offset)
            weights.append(weight or 0.01)
        fitted = isotonic(wanted, weights)
        for vertex, offset, value in zip(row, offsets, fitted, strict=True):
            self.x[vertex] = value + offset

    def _pull(self, vertex: int, near: int) -> float:
        if vertex >= self.count and near >= self.count:
            return _STRAIGHT
        # What nothing leads to (a dequantized weight) stands aside, so that the way of the data is straight.
        upper = near if self.layer[near] < self.layer[vertex] else vertex
        return 1.0 if self.up[upper] else _ASIDE

    # ---- result ------------------------------------------------------------------------------------------------

    def layout(self, edges: Sequence[tuple[int, int]]) -> Layout:
        """Return positions of the nodes and routes of the edges."""
        heights = [max((self.sizes[v][1] for v in row if v < self.count), default=0.0) for row in self.rows]
        tops, y = [], 0.0
        for height in heights:
            tops.append(y)
            y += height + GAP_Y
        middle = [top + height / 2 for top, height in zip(tops, heights, strict=True)]
        node_y = [tops[self.layer[v]] + (heights[self.layer[v]] - self.sizes[v][1]) / 2 for v in range(self.count)]
        routes: list[tuple[tuple[float, float], ...]] = []
        unrouted = set()
        for index, (source, target) in enumerate(edges):
            span = self.layer[target] - self.layer[source]
            if source >= target or span > self.limit:
                unrouted.add(index)
                routes.append(())
                continue
            chain = self.chains[source][: span - 1]
            routes.append(tuple(_bends([(self.x[v], middle[self.layer[v]]) for v in chain])))
        width = max(self.x[v] + self.widths[v] / 2 for v in range(self.count))
        layers = tuple(self.layer[: self.count])
        return Layout(
            tuple(self.x[: self.count]), tuple(node_y), layers, tuple(routes), frozenset(unrouted), width, y - GAP_Y
        )


def _longest_routed(edges: Sequence[tuple[int, int]], layer: Sequence[int], budget: int) -> int:
    """Return the largest span that edges may have so that no more than ``budget`` dummies are needed."""
    spans: dict[int, list[int]] = {}
    for source, target in edges:
        spans.setdefault(source, []).append(layer[target] - layer[source])
    limit = max((max(each) for each in spans.values()), default=1)
    while limit > 2 and sum(max((s for s in each if s <= limit), default=1) - 1 for each in spans.values()) > budget:
        limit = limit * 3 // 4
    return limit


def isotonic(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Return the nondecreasing numbers of least weighted squared distance to ``values`` (pool adjacent violators)."""
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        mean, total, count = value, weight, 1
        while blocks and blocks[-1][0] > mean:
            other, other_weight, other_count = blocks.pop()
            mean = (mean * total + other * other_weight) / (total + other_weight)
            total += other_weight
            count += other_count
        blocks.append((mean, total, count))
    return [mean for mean, _, count in blocks for _ in range(count)]


def _bends(points: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Yield the first, the last, and those points at which a line leaves the straight."""
    for index, point in enumerate(points):
        if 0 < index < len(points) - 1:
            (x0, y0), (x1, y1) = points[index - 1], points[index + 1]
            straight = x0 + (x1 - x0) * (point[1] - y0) / (y1 - y0)
            if abs(straight - point[0]) < 0.5:
                continue
        yield point
