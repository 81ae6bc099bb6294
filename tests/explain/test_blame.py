"""Blame: the planted layer comes first, its kind is named, and overrides restore what was lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.compiler import compile_model
from qcompiler.engine import Array, EngineOptions, Feeds
from qcompiler.explaining.blame import escaped
from qcompiler.explaining.blame_run import Accused, accuse, measure, mend, overrides_toml, suggestion
from qcompiler.explaining.evidence import ExplainError
from qcompiler.explaining.stored_values import ranges_of
from qcompiler.options import Options
from qcompiler.recipes.recipe import parse_recipe
from tests.explain.nets import Plant, options, plant, random_net

SEEDS = range(20)
FACTORS = {0: (8.0, "too-wide"), 1: (0.25, "clipped")}


def responsible(accused: Accused, value: str) -> set[str]:
    """Return who stores a value with that range: its writer, or where that writes floats those who read it."""
    assert accused.decisions is not None
    forms = accused.decisions.forms
    writers = {g.name for g in accused.groups if forms.get(g.name) == "static" and value in [v.name for v in g.results]}
    return writers or {g.name for g in accused.groups if g.name in forms and value in [v.name for v in g.data]}


def test_the_planted_layer_is_first_in_19_of_20(tmp_path: Path) -> None:
    missed, kinds = [], []
    for seed in SEEDS:
        factor, kind = FACTORS[seed % 2]
        made = plant(seed, tmp_path, factor)
        accused = accuse(made.source, made.path, list(made.feeds), feeds=3)
        result = measure(accused)
        first = result.faults[0]
        if first.unit.name not in responsible(accused, made.value):
            missed.append((seed, made.value, [f.unit.name for f in result.faults[:3]]))
        elif first.kind != kind:
            kinds.append((seed, made.value, first.kind))
        assert result.unaligned == ()
    assert len(missed) <= 1, missed
    assert len(kinds) <= 1, kinds


def teacher(source: bytes, feeds: Sequence[Feeds]) -> list[Array]:
    runner = OrtEngine().load(source, EngineOptions(optimize=False))
    return [runner.run(f)["y"].argmax(-1) for f in feeds]


def score_for(source: bytes, feeds: Sequence[Feeds]):
    """Return the share of rows with the class that the float model gives them."""
    labels = teacher(source, feeds)

    def score(outputs: Sequence[Mapping[str, Array]], given: Sequence[Feeds]) -> float:
        return float(np.mean([o["y"].argmax(-1) == t for o, t in zip(outputs, labels, strict=True)]))

    return score


@pytest.mark.parametrize(
    ("seed", "anew"),
    [(3, False), (4, False), (8, False), (4, True), (6, True)],
    ids=lambda v: ("ranges found anew" if v else "ranges kept") if isinstance(v, bool) else str(v),
)
def test_apply_restores_the_metric(seed: int, anew: bool, tmp_path: Path) -> None:
    made = plant(seed, tmp_path, 0.05)
    feeds = list(made.feeds)
    score = score_for(made.source, feeds)
    before = score([OrtEngine().load(made.path).run(f) for f in feeds], feeds)
    assert before < 0.9
    given = Options(metric=score, budget="drop<=5pt", min_sqnr=15.0)
    accused = accuse(made.source, made.path, feeds, calibration=feeds if anew else None, options=given)
    mended = mend(accused, measure(accused))
    assert mended.met
    assert mended.before.metric == pytest.approx(before)
    after = score([OrtEngine().load(mended.compiled.model).run(f) for f in feeds], feeds)
    assert after >= 0.95
    assert mended.compiled.report.quality is not None
    assert mended.compiled.report.quality.metric == pytest.approx(after)
    # What is not to blame stays on integers.
    assert mended.compiled.decisions.forms


def test_a_rebuild_from_the_scales_of_a_model_is_the_same_model() -> None:
    source, feeds = random_net(4)
    good = compile_model(source, options(list(feeds)))
    again = compile_model(source, options(ranges_of(good.model, good.target), good.decisions))
    assert again.to_bytes() == good.to_bytes()


def test_a_good_build_blames_nothing_for_much(tmp_path: Path) -> None:
    source, feeds = random_net(1)
    good = compile_model(source, options(list(feeds)))
    path = tmp_path / "good.onnx"
    good.save(path)
    result = measure(accuse(source, path, list(feeds)))
    assert result.worst_db > 28
    assert all(f.output_db > 30 for f in result.faults)
    assert {f.kind for f in result.faults} <= {"inside", "rounded"}


def corrupted(made: Plant, folder: Path) -> tuple[Path, str]:
    """Return a build in which half of the weights of one convolution are zero, and its name."""
    model = onnx.load_model_from_string(made.good.to_bytes())
    node = next(n for n in model.graph.node if n.op_type == "Conv" and n.name == "conv1")
    dequantize = next(n for n in model.graph.node if node.input[1] in n.output)
    for tensor in model.graph.initializer:
        if tensor.name == dequantize.input[0]:
            array = numpy_helper.to_array(tensor).copy()
            array[::2] = 0
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    path = folder / "weights.onnx"
    onnx.save(model, path)
    path.with_suffix(".decisions.json").write_text(made.good.decisions.to_json())
    return path, node.name


def test_damaged_weights_are_found_inside(tmp_path: Path) -> None:
    made = plant(1, tmp_path, 1.0)
    path, name = corrupted(made, tmp_path)
    result = measure(accuse(made.source, path, list(made.feeds)))
    assert (result.faults[0].unit.name, result.faults[0].kind) == (name, "inside")
    assert result.faults[0].share > 0.8


def test_a_foreign_model_is_compared_by_name(tmp_path: Path) -> None:
    made = plant(1, tmp_path, 1.0)
    path, name = corrupted(made, tmp_path)
    path.with_suffix(".decisions.json").unlink()
    accused = accuse(made.source, path, list(made.feeds))
    result = measure(accused)
    assert accused.decisions is None
    assert result.faults[0].unit.name == name
    assert any("no decisions record" in n for n in result.notes)
    with pytest.raises(ExplainError, match="without a decisions record"):
        mend(accused, result)


def test_the_suggestion_is_an_override_that_reads_back(tmp_path: Path) -> None:
    made = plant(5, tmp_path, 0.25)
    accused = accuse(made.source, made.path, list(made.feeds))
    rows = suggestion(accused, measure(accused).faults[0])
    overrides = parse_recipe(overrides_toml(rows), "o").overrides
    assert [o.form for o in overrides] == ["float"] * len(rows)
    anew = accuse(made.source, made.path, list(made.feeds), calibration=list(made.feeds))
    (row,) = suggestion(anew, measure(anew).faults[0])
    assert row["estimator"] == "min-max"


def test_a_name_is_escaped_for_a_glob_and_for_toml() -> None:
    name = 'a[0]*"q"\\?\n'
    (override,) = parse_recipe(overrides_toml([{"match": escaped(name), "form": "float"}]), "o").overrides
    pinned, _ = parse_recipe(overrides_toml([{"match": escaped(name), "form": "float"}]), "o").pinned(
        {name: (), "a0bqc": ()}
    )
    assert override.match == escaped(name)
    assert pinned == {name: "float"}
