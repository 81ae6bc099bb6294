import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import ModelError, PassError
from qcompiler.ir.text import parse_text, print_model
from qcompiler.pipeline.instruments.dump import DumpInstrument
from qcompiler.pipeline.instruments.verify import VerifyInstrument
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.quant.plan import GroupChoice, Point, QuantPlan
from qcompiler.quant.spec import QuantSource, QuantSpec
from qcompiler.report.dumps import load_dump
from qcompiler.report.viewer import COLUMNS, embedded, page, write_page
from qcompiler.report.viewer_graph import PRECISIONS, read_graph
from tests.pipeline.sample_passes import REGISTRY, chain_state
from tests.report.viewer_dumps import QUANTIZED, chain_dump, quantized_dump


class Scripts(HTMLParser):
    """Collect the contents of the script elements as a browser would see them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._at: str | None = None
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag == "script":
            self._at = str(named.get("id"))
            self.found[self._at] = ""
        self.links += [str(v) for k, v in attrs if k in ("src", "href") and v != "data:,"]

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._at = None

    def handle_data(self, data: str) -> None:
        if self._at is not None:
            self.found[self._at] += data


def read(text: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the core and the graphs that a page holds."""
    scripts = Scripts()
    scripts.feed(text)
    scripts.close()
    assert scripts.links == [], "the page needs nothing from elsewhere"
    graphs = [json.loads(v) for k, v in scripts.found.items() if k.startswith("data-graph-")]
    return json.loads(scripts.found["data-core"]), graphs


def nodes_of(core: dict[str, Any], graph: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(core["columns"], core["nodes"][index], strict=True)) for index in graph["v"]]


# ---- the page's data ----------------------------------------------------------------------------------------------


def test_the_page_holds_stages_changes_rules_remarks_and_figures(tmp_path: Path) -> None:
    core, graphs = read(page(load_dump(chain_dump(tmp_path / "chain.dump"))))
    assert (core["title"], core["target"], core["columns"]) == ("chain", "sample", list(COLUMNS))
    assert [(s["title"], s["changed"], s["graph"], s["delta"]) for s in core["stages"]] == [
        ("input", True, 0, None),
        ("drop-identity", True, 1, [0, 2, 2]),
        ("many", False, 1, None),
        ("scale-factors", True, 2, [0, 1, 0]),
        ("plan-nothing", False, 2, None),
    ]
    assert [s["seconds"] for s in core["stages"]] == [None, 0.001, 0.001, 0.001, 0.001]
    assert [r["node"] for r in core["remarks"]["1"]] == ["Identity_1", "Identity_5"]
    assert [r["rule"] for r in core["rules"]["3"]] == ["scale-factor"] * 3
    assert core["rules"]["3"][1] == {"rule": "scale-factor", "node": "Mul_4", "origins": ["Mul_4"]}
    assert core["figures"]["3"]["e"]["sqnr_db"] == pytest.approx(6.02, abs=0.01), "half the signal is wrong: 20 log10 2"
    assert core["figures"]["1"]["c"]["sqnr_db"] == "inf"
    assert core["stages"][3]["broken"] is True
    names = [n["name"] for n in nodes_of(core, graphs[1])]
    assert names == ["x", "MatMul_0", "Mul_2", "Relu_3", "Mul_4", "Sigmoid_6", "Mul_7", "y"]
    relu = nodes_of(core, graphs[0])[4]
    assert relu["text"] == "Relu_3: %d: f32 Nx4 = Relu(%c)"
    assert (relu["inputs"], relu["outputs"], relu["types"], relu["origins"]) == (["c"], ["d"], ["f32 Nx4"], ["Relu_3"])
    assert [e[:2] for e in graphs[1]["e"]] == [[i, i + 1] for i in range(7)]
    assert len(core["nodes"]) == 10 + 2 + 1, "a node that a pass leaves alone is stored once"


def test_the_same_dump_gives_the_same_page(tmp_path: Path) -> None:
    first, second = (page(load_dump(chain_dump(tmp_path / part / "d"))) for part in "ab")
    assert first == second
    assert str(tmp_path) not in first


def test_names_that_look_like_html_stay_text(tmp_path: Path) -> None:
    state = chain_state()
    nasty = '</script><script>alert("1")</script><!-- \u2028 & \' \\'
    node = next(iter(state.model.graph))
    node.name = nasty
    node.outputs[0].name = "%v: 1 = "
    Pipeline.parse("drop-identity", REGISTRY).run(state, (DumpInstrument(tmp_path / '"<b>.dump'),))
    text = page(load_dump(tmp_path / '"<b>.dump'))
    core, graphs = read(text)
    named = nodes_of(core, graphs[1])[1]
    assert (named["name"], named["outputs"]) == (nasty, ["%v: 1 = "])
    assert named["text"].startswith(nasty + ": %")
    assert core["title"] == '"<b>'
    assert "<b>" not in text
    assert text.count("</script>") == text.count("<script")


def test_data_in_a_script_cannot_end_it() -> None:
    text = embedded({"a": "</script><!--&\u2028\u2029", "b": [1.5, None]})
    assert not re.search(r"[<>&\u2028\u2029]", text)
    assert json.loads(text) == {"a": "</script><!--&\u2028\u2029", "b": [1.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        embedded(float("nan"))


def test_points_carry_scale_zero_point_and_provenance(tmp_path: Path) -> None:
    core, graphs = read(page(load_dump(quantized_dump(tmp_path / "q"))))
    titles = [s["title"] for s in core["stages"]]
    assert titles[1:] == QUANTIZED.split(",")
    plan = core["plans"][str(titles.index("plan-quantization"))]
    assert plan["choices"]["up"][0] == "static-float"
    low, high = core["statistics"]["x"]["minimum"], core["statistics"]["x"]["maximum"]
    point = plan["points"]["x"]
    assert (point["format"], point["kind"], point["range"]) == ("uint8", "observed", pytest.approx([low, high]))
    assert point["scale"] == pytest.approx((high - low) / 255, rel=1e-6)
    assert point["zero_point"] == round(-low / point["scale"])
    assert plan["points"]["up#1"]["kind"] == "weight"
    # A uniform error of a step, against the power of the signal.
    spread = core["statistics"]["x"]["std"] ** 2 + core["statistics"]["x"]["mean"] ** 2
    assert point["expected_db"] == pytest.approx(10 * np.log10(12 * spread / point["scale"] ** 2), abs=0.1)
    lowered = {n["name"]: n for n in nodes_of(core, graphs[-1])}
    found = {name: PRECISIONS[lowered[name]["precision"]] for name in ("x", "up", "up/Relu", "down", "y")}
    assert found == {"x": "float", "up": "int8", "up/Relu": "int8", "down": "int8", "y": "float"}
    quantize = next(n for n in nodes_of(core, graphs[-1]) if n["op"] == "QuantizeLinear" and n["inputs"][0] == "x")
    assert quantize["conversion"] == 1
    assert float(quantize["numbers"]["1"]) == pytest.approx(point["scale"], rel=1e-5)


def test_the_histogram_holds_every_element(tmp_path: Path) -> None:
    core, _ = read(page(load_dump(quantized_dump(tmp_path / "q"))))
    for name, count in (("x", 4 * 8 * 64), ("y", 4 * 8 * 8)):
        seen = core["statistics"][name]
        assert sum(seen["bins"]) == seen["count"] == count
        assert len(seen["bins"]) <= 64
        assert seen["low"] <= seen["minimum"] < seen["low"] + seen["step"]
        assert seen["low"] + seen["step"] * len(seen["bins"]) >= seen["maximum"]


def test_a_dump_of_old_opens_with_less(tmp_path: Path) -> None:
    folder = quantized_dump(tmp_path / "q")
    for path in folder.iterdir():
        if path.name.endswith((".points.json", ".rules.json", ".figures.json")) or path.name == "statistics.json":
            path.unlink()
    core, graphs = read(page(load_dump(folder)))
    assert (core["statistics"], core["rules"], core["figures"]) == ({}, {}, {})
    number = next(n for n, s in enumerate(core["stages"]) if s["title"] == "plan-quantization")
    assert core["plans"][str(number)]["points"]["x"] == {"format": "uint8", "kind": "observed", "points": []}
    assert len(graphs) >= 4


def test_a_dump_without_models_says_why_there_is_no_graph(tmp_path: Path) -> None:
    core, graphs = read(page(load_dump(chain_dump(tmp_path / "d", models=False))))
    assert graphs == []
    assert core["stages"][0]["problem"] == "the dump holds no 000-input.onnx, so there is no graph to draw"
    assert [s["nodes"] for s in core["stages"]] == [8, 6, 6, 6, 6]


def test_a_failed_pass_is_on_the_page(tmp_path: Path) -> None:
    with pytest.raises(PassError):
        Pipeline.parse("drop-identity,break-graph", REGISTRY).run(
            chain_state(), (DumpInstrument(tmp_path), VerifyInstrument())
        )
    core, _ = read(page(load_dump(tmp_path)))
    assert "MatMul_0" in core["stages"][2]["error"]
    assert core["stages"][1]["error"] == ""


def test_a_page_that_cannot_be_written_is_a_model_error(tmp_path: Path) -> None:
    dump = load_dump(chain_dump(tmp_path / "d"))
    assert write_page(dump, tmp_path / "made" / "page.html").read_text(encoding="utf-8") == page(dump)
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"cannot write .*page\.html: "):
        write_page(dump, tmp_path / "file" / "page.html")


# ---- graphs -------------------------------------------------------------------------------------------------------


def graph_of(text: str, plan: QuantPlan | None = None) -> dict[str, Any]:
    model = parse_text(text)
    return {n.name: n for n in read_graph(model, print_model(model), plan).nodes}


HEAD = '<ir_version: 10, opset_import: ["" : 21]> g '
PAIR = (
    HEAD + "(float[2,2] x, float[2,2] r) => (float[2,2] y) <float s = {0.5}, uint8 z = {3}, float[2,2] w = {1,2,3,4}> "
    "{ [q] a = QuantizeLinear (x, s, z) [dq] b = DequantizeLinear (a, s, z) [m] c = MatMul (b, w) [s] y = Add (c, r) }"
)


def test_a_node_between_quantized_values_counts_as_quantized() -> None:
    nodes = graph_of(PAIR)
    assert {n: (v.precision, v.conversion) for n, v in nodes.items() if n in ("q", "dq", "m", "s")} == {
        "q": ("int8", True), "dq": ("int8", True), "m": ("int8", False), "s": ("float", False)
    }  # fmt: skip
    assert nodes["q"].numbers == {1: "0.5", 2: "3"}
    assert graph_of(PAIR, QuantPlan({"m": GroupChoice("float")}))["m"].precision == "float", "the plan knows better"


def test_a_plan_alone_shows_what_will_be_quantized() -> None:
    text = HEAD + "(float[2,2] x) => (float[2,2] y) <float[2,2] w = {1,2,3,4}> { [m] y = MatMul (x, w) }"
    spec = QuantSpec("int4", axis=0, block=2, symmetric=True)
    plan = QuantPlan({"m": GroupChoice("weight-only")}, {"m#1": Point(spec, QuantSource("weight"))})
    assert graph_of(text)["m"].precision == "float"
    assert graph_of(text, plan)["m"].precision == "int4"


def test_types_decide_where_nothing_is_quantized() -> None:
    nodes = graph_of(HEAD + "(float16[2] x) => (int64[1] y, float16[2] z) { [s] y = Shape (x) [r] z = Relu (x) }")
    assert (nodes["r"].precision, nodes["x"].precision, nodes["y"].precision) == ("half", "half", "other")


def test_a_body_is_drawn_inside_the_node_that_holds_it() -> None:
    text = HEAD + (
        "(bool c, float[2] x) => (float[2] y) { [pre] h = Relu (x) "
        "[if] y = If (c) <then_branch = t () => (float[2] p) { [a] i = Neg (h) [b] p = Abs (i) }, "
        "else_branch = e () => (float[2] q) { [d] q = Identity (h) }> }"
    )
    model = parse_text(text)
    graph = read_graph(model, print_model(model))
    place = {n.name: i for i, n in enumerate(graph.nodes)}
    assert [graph.nodes[place[n]].parent for n in ("pre", "if", "a", "b", "d")] == [-1, -1, *[place["if"]] * 3]
    left, top, width, height = graph.frames[place["if"]]
    for name in "abd":
        x, y, w, h = graph.frames[place[name]]
        assert left < x < x + w < left + width
        assert top < y < y + h < top + height
    joined = {(graph.nodes[s].name, graph.nodes[t].name, v) for s, t, v in graph.edges}
    assert ("pre", "if", "h") in joined, "what a body captures is an edge to the node that holds it"
    assert ("a", "b", "i") in joined
    assert graph.nodes[place["b"]].text.startswith("b: %p: ")


def test_a_graph_of_the_same_boxes_takes_the_layout_over() -> None:
    model = parse_text(PAIR)
    first = read_graph(model, print_model(model))
    again = read_graph(model, print_model(model), QuantPlan({"m": GroupChoice("float")}), before=first)
    assert again.frames is first.frames
    assert again.nodes != first.nodes


def test_local_functions_do_not_lend_their_lines_to_nodes(tmp_path: Path) -> None:
    dump = load_dump(quantized_dump(tmp_path / "q", numerics=False))
    stage = next(s for s in dump.stages if s.text is not None and s.name.endswith("fuse-qdq"))
    model = ir.load(dump.model_path(stage.number))
    graph = read_graph(model, dump.text(stage.number))
    up = next(n for n in graph.nodes if n.name == "up")
    assert up.op.startswith("qcompiler::")
    assert f" = {up.op}(" in up.text
