from __future__ import annotations

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.ir.analysis import captures, convex_regions, dataflow, holders, is_convex, macs, open_graphs, repeated_at
from qcompiler.ir.text import parse_text

HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'


def test_dataflow_sees_captures() -> None:
    model = parse_text(
        f"""{HEAD} g (float[2] x, bool c) => (float[2] y) {{
          [a] h = Relu(x) [b] k = Neg(x) [u] unused = Exp(h)
          [i] y = If (c) <then_branch = t () => (float[2] p) {{ [p1] p = Add(h, h) }},
                          else_branch = e () => (float[2] q) {{ [q1] q = If (c) <
                              then_branch = t2 () => (float[2] r) {{ [r1] r = Neg(k) }},
                              else_branch = e2 () => (float[2] s) {{ [s1] s = Neg(x) }}> }}> }}"""
    )
    view = dataflow(model.graph)
    assert list(view.nodes) == ["a", "b", "u", "i"]
    assert sorted(view.edges(data="values")) == [("a", "i", ("h",)), ("a", "u", ("h",)), ("b", "i", ("k",))]
    node = model.graph.node("i")
    assert {v.name for v in captures(node)} == {"h", "k", "x", "c"}


NESTED = f"""{HEAD} g (float[2] x, bool c, int64 k) => (float[2] y) {{
  [i] u = If (c) <then_branch = then () => (float[2] p) {{
        [l] p = Loop (k, , x) <body = loop (int64 n, bool go, float[2] v) => (bool again, float[2] w) {{
              [again] again = Identity(go)
              [j] w = If (c) <then_branch = deep () => (float[2] q) {{ [q1] q = Add(v, x) }},
                              else_branch = flat () => (float[2] r) {{ [r1] r = Neg(v) }}> }}> }},
      else_branch = no () => (float[2] s) {{ [s1] s = Neg(x) }}>
  [m] t = SequenceConstruct(u)
  [f] z = SequenceMap(t) <body = each (float[2] a) => (float[2] b) {{ [b1] b = Neg(a) }}>
  [y] y = ConcatFromSequence<axis=0>(z) }}"""


def test_open_graphs_are_all_but_the_bodies_of_sequence_map() -> None:
    model = parse_text(NESTED)
    assert [g.name for g in open_graphs(model)] == ["g", "then", "loop", "deep", "flat", "no"]
    held = holders(model)
    assert {str(g.name): str(n.name) for g, n in held.items()} == {
        "then": "i", "no": "i", "loop": "l", "deep": "j", "flat": "j", "each": "f",
    }  # fmt: skip


def test_a_value_repeats_below_the_outermost_loop_between_it_and_its_reader() -> None:
    model = parse_text(NESTED)
    graphs, held = {str(g.name): g for g in open_graphs(model)}, holders(model)

    def loop(inner: str, outer: str) -> str | None:
        node = repeated_at(graphs[inner], graphs[outer], held)
        return None if node is None else str(node.name)

    assert [loop(name, "g") for name in ("g", "then", "no", "loop", "deep")] == [None, None, None, "l", "l"]
    assert loop("deep", "loop") is None  # made anew in each iteration
    assert loop("deep", "then") == "l"


def test_a_path_that_leaves_and_returns_splits_a_region() -> None:
    view = nx.DiGraph([("a", "b"), ("b", "c"), ("a", "out"), ("out", "c")])
    assert not is_convex(view, {"a", "b", "c"})
    assert convex_regions(view, ["a", "b", "c"]) == [["a", "b"], ["c"]]
    assert convex_regions(view, ["a", "b", "c", "out"]) == [["a", "b", "out", "c"]]
    assert convex_regions(view, ["b", "out"]) == [["b"], ["out"]]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_regions_are_convex_connected_and_cover_the_members(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    names = [f"n{i}" for i in range(count)]
    view = nx.DiGraph()
    view.add_nodes_from(names)
    pairs = [(names[i], names[j]) for i in range(count) for j in range(i + 1, count)]
    if pairs:
        view.add_edges_from(data.draw(st.lists(st.sampled_from(pairs), max_size=25)))
    members = data.draw(st.lists(st.sampled_from(names), unique=True))
    regions = convex_regions(view, members)
    assert sorted(name for region in regions for name in region) == sorted(members)
    for region in regions:
        assert is_convex(view, region)
        assert nx.is_weakly_connected(view.subgraph(region))


@pytest.mark.parametrize(
    ("inputs", "body", "expected"),
    [
        ("float[N,3,8,8] x", "y = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w4)", 8 * 8 * 6 * 3 * 9),
        ("float[1,6,4,4] x", "y = Conv<group = 6>(x, dw)", 6 * 4 * 4),
        ("float[1,6,4,4] x", "y = ConvTranspose<strides = [2, 2]>(x, tw)", 6 * 16 * 2 * 4),
        ("float[B,5,4] x", "y = MatMul(x, m)", 5 * 4 * 7),
        ("float[4] x", "y = MatMul(x, m)", 4 * 7),
        ("float[4,3] x", "y = Gemm<transA = 1>(x, m)", 3 * 4 * 7),
        ("float[3,4] x", "y = Gemm<transB = 1>(x, mt)", 3 * 4 * 7),
        ("float[9,2,4] x", "y, h, c = LSTM<hidden_size = 2>(x, lw, lr)", 9 * 2 * (8 * 4 + 8 * 2)),
        ("float[3,4] x", "y = com.microsoft.DynamicQuantizeMatMul(x, m, sc)", 3 * 4 * 7),
        ("float[3,4] x", "y = Relu(x)", None),
    ],
)
def test_multiply_adds(inputs: str, body: str, expected: int | None) -> None:
    def weight(name: str, *shape: int) -> str:
        size = 1
        for d in shape:
            size *= d
        return f"float[{','.join(map(str, shape))}] {name} = {{{','.join(['1'] * size)}}}"

    weights = ", ".join(
        [
            weight("w4", 6, 3, 3, 3), weight("dw", 6, 1, 4, 1), weight("tw", 6, 2, 2, 2), weight("m", 4, 7),
            weight("mt", 7, 4), weight("lw", 1, 8, 4), weight("lr", 1, 8, 2), weight("sc", 1),
        ]
    )  # fmt: skip
    model = parse_text(f"{HEAD} g ({inputs}) => (int64[R] z) <{weights}> {{ {body} z = Shape(y) }}")
    assert macs(model.graph[0]) == expected


def test_a_symbolic_batch_scales_the_count() -> None:
    model = parse_text(
        f"{HEAD} g (float[N,4] x) => (float[N,2] y) <float[4,2] w = {{1,2,3,4,5,6,7,8}}> {{ y = MatMul(x, w) }}"
    )
    assert (macs(model.graph[0]), macs(model.graph[0], 10)) == (8, 80)
