import random
from itertools import pairwise

import pytest

from qcompiler.report.viewer_layout import GAP_X, Layout, assign_layers, isotonic, lay_out

Edges = list[tuple[int, int]]


def random_graph(nodes: int, seed: int) -> tuple[list[tuple[float, float]], Edges]:
    """Return boxes of several sizes and edges that a network might have: a chain, branches, a few long skips."""
    source = random.Random(seed)
    sizes = [(source.choice([60.0, 90.0, 140.0]), source.choice([22.0, 34.0])) for _ in range(nodes)]
    edges: Edges = []
    for node in range(1, nodes):
        edges.append((max(0, node - source.choice([1, 1, 1, 2, 5])), node))
        if source.random() < 0.4:
            edges.append((source.randrange(node), node))
    return sizes, list(dict.fromkeys(edges))


def tops_and_bottoms(sizes: list[tuple[float, float]], layout: Layout) -> list[tuple[float, float]]:
    return [(y, y + size[1]) for y, size in zip(layout.y, sizes, strict=True)]


@pytest.mark.parametrize(("nodes", "seed"), [(2, 0), (30, 1), (200, 2), (600, 3)])
def test_nodes_of_a_layer_do_not_overlap_and_edges_point_downwards(nodes: int, seed: int) -> None:
    sizes, edges = random_graph(nodes, seed)
    layout = lay_out(sizes, edges)
    rows: dict[int, list[int]] = {}
    for node, row in enumerate(layout.layer):
        rows.setdefault(row, []).append(node)
    for members in rows.values():
        members.sort(key=lambda node: layout.x[node])
        for first, second in pairwise(members):
            free = layout.x[second] - layout.x[first] - (sizes[first][0] + sizes[second][0]) / 2
            assert free >= GAP_X - 1e-6
    ends = tops_and_bottoms(sizes, layout)
    for source, target in edges:
        assert layout.layer[source] < layout.layer[target]
        assert ends[source][1] < ends[target][0]
    for (source, target), route in zip(edges, layout.routes, strict=True):
        heights = [ends[source][1], *(y for _, y in route), ends[target][0]]
        assert heights == sorted(heights)
    assert min(x - w / 2 for x, (w, _) in zip(layout.x, sizes, strict=True)) == pytest.approx(0)
    assert layout.width == pytest.approx(max(x + w / 2 for x, (w, _) in zip(layout.x, sizes, strict=True)))
    assert layout.height == pytest.approx(max(bottom for _, bottom in ends))


def test_a_layout_is_the_same_every_time() -> None:
    assert lay_out(*random_graph(120, 5)) == lay_out(*random_graph(120, 5))


def test_layers_are_longest_paths_and_sources_stand_above_their_reader() -> None:
    # 0 -> 1 -> 2 -> 3, 0 -> 3; 4 (a weight) -> 3
    assert assign_layers(5, [(0, 1), (1, 2), (2, 3), (0, 3)]) == [0, 1, 2, 3, 0]
    assert assign_layers(5, [(0, 2), (2, 3), (3, 4), (1, 4)]) == [0, 2, 1, 2, 3]


def test_a_chain_is_straight_whatever_weights_are_beside_it() -> None:
    # The data goes 0 -> 1 -> 4 -> 7; the last two steps read two weights of their own.
    edges = [(0, 1), (1, 4), (2, 4), (3, 4), (4, 7), (5, 7), (6, 7)]
    layout = lay_out([(80.0, 34.0)] * 8, edges)
    trunk = [layout.x[node] for node in (0, 1, 4, 7)]
    assert max(trunk) - min(trunk) < 80.0 / 2, "each stands below the other"


def test_branches_that_can_be_drawn_without_crossing_are() -> None:
    # Two chains, whose nodes come in alternating order.
    edges = [(0, 3), (1, 2), (2, 5), (3, 4), (4, 7), (5, 6)]
    layout = lay_out([(50.0, 20.0)] * 8, edges)
    left = [layout.x[a] < layout.x[b] for a, b in ((0, 1), (3, 2), (4, 5), (7, 6))]
    assert len(set(left)) == 1


def test_an_edge_over_several_layers_goes_around_the_nodes_between() -> None:
    sizes, edges = [(100.0, 30.0)] * 4, [(0, 1), (1, 2), (2, 3), (0, 3)]
    layout = lay_out(sizes, edges)
    route = layout.routes[3]
    assert route
    assert layout.routes[0] == ()
    for x, y in route:
        for node in (1, 2):
            inside = abs(x - layout.x[node]) < 50 and layout.y[node] <= y <= layout.y[node] + 30
            assert not inside


def test_what_would_need_too_many_dummies_is_not_routed() -> None:
    count = 1500
    chain = [(i, i + 1) for i in range(count - 1)]
    skips = [(i, count - 1) for i in range(0, count - 400, 7)]
    layout = lay_out([(60.0, 30.0)] * count, chain + skips)
    assert layout.unrouted
    assert all(index >= len(chain) for index in layout.unrouted)
    assert all(layout.routes[index] == () for index in layout.unrouted)


def test_edges_that_lead_backwards_are_drawn_without_a_route() -> None:
    layout = lay_out([(60.0, 30.0)] * 3, [(0, 1), (1, 0), (2, 2), (1, 2)])
    assert layout.unrouted == {1, 2}
    assert layout.layer == (0, 1, 2)


def test_nothing_has_an_empty_layout() -> None:
    assert lay_out([], []) == Layout((), (), (), (), frozenset(), 0.0, 0.0)


def test_isotonic_regression_pools_what_is_out_of_order() -> None:
    assert isotonic([1, 2, 3], [1, 1, 1]) == [1, 2, 3]
    assert isotonic([3, 1], [1, 1]) == [2, 2]
    assert isotonic([4, 1], [1, 2]) == [2, 2]
    assert isotonic([5, 4, 3, 10, 0], [1, 1, 1, 1, 1]) == [4, 4, 4, 5, 5]
