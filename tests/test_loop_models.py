"""Models that compute in loops, compiled from end to end: quantized inside, or said why not, node by node."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx
import pytest

import qcompiler
from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.compiled import CompiledModel
from qcompiler.engine import Array
from tests import loops
from tests.families import COVERED

ENGINE = OrtEngine()
RECIPES = pytest.mark.parametrize("recipe", ["int8", "int8-static"])


@dataclass(frozen=True)
class Subject:
    make: Callable[[], onnx.ModelProto]
    feeds: Sequence[Mapping[str, Array]]
    fused: frozenset[str]
    """Groups that run on integers by recipe."""
    least_db: float = 30.0
    """Ranges of 4 to 5 standard deviations in 256 steps leave 35 to 40 dB per product."""


CELL = {"cell_b/Gemm", "cell_h"}
SUBJECTS = {
    "loop": Subject(loops.recurrent_loop, loops.loop_feeds(), frozenset({*CELL, "out"})),
    "scan": Subject(loops.recurrent_scan, loops.scan_feeds(), frozenset({*CELL, "out"})),
    "nested": Subject(
        loops.nested_loops,
        [f for pair in zip(loops.nested_feeds(6), loops.nested_feeds(6, deep=False), strict=True) for f in pair],
        frozenset({*CELL, "single", "mix"}),
    ),
    "conv": Subject(loops.convolution_loop, loops.image_feeds(), frozenset({"front", "conv1", "conv2"})),
}
EVERY = pytest.mark.parametrize("name", list(SUBJECTS))


@cache
def compiled(name: str, recipe: str) -> CompiledModel:
    subject = SUBJECTS[name]
    return qcompiler.compile(
        subject.make().SerializeToString(), calibration=subject.feeds, recipe=recipe, guard=False
    )  # fmt: skip


@COVERED
@EVERY
@RECIPES
def test_bodies_are_quantized_proven_and_close_to_float(name: str, recipe: str) -> None:
    report = compiled(name, recipe).report.to_dict()
    assert set(report["proof"]["kernels"]) == SUBJECTS[name].fused
    assert report["proof"]["missed"] == []
    assert report["integer_share"] == 1.0
    assert min(report["sqnr_db"].values()) >= SUBJECTS[name].least_db
    assert all(g["why"] for g in report["groups"])


@EVERY
@RECIPES
def test_a_second_build_and_a_replay_are_the_same_bytes(name: str, recipe: str) -> None:
    subject, first = SUBJECTS[name], compiled(name, recipe)
    source = subject.make().SerializeToString()
    again = qcompiler.compile(source, calibration=subject.feeds, recipe=recipe, guard=False)
    assert again.to_bytes() == first.to_bytes()
    replayed = qcompiler.compile(source, calibration=subject.feeds, recipe=recipe, decisions=first.decisions)
    assert replayed.to_bytes() == first.to_bytes()


@EVERY
def test_the_interface_is_kept_and_any_number_of_iterations_runs(name: str) -> None:
    source = SUBJECTS[name].make()
    given, made = ENGINE.load(source.SerializeToString()), ENGINE.load(compiled(name, "int8").model)
    assert made.inputs == given.inputs
    assert made.outputs == given.outputs
    feed = dict(SUBJECTS[name].feeds[0])
    for steps in (0, 1, 9) if "steps" in feed else (1, 9):
        if "steps" in feed:
            feed["steps"] = np.asarray(steps)
        else:
            feed["xs"] = np.repeat(feed["xs"][:1], steps, axis=0)
        wanted, found = given.run(feed), made.run(feed)
        assert {n: a.shape for n, a in found.items()} == {n: a.shape for n, a in wanted.items()}


def test_with_the_guard_every_group_has_its_reason() -> None:
    subject = SUBJECTS["loop"]
    made = qcompiler.compile(subject.make().SerializeToString(), calibration=subject.feeds)
    groups = {g["group"]: g for g in made.report.to_dict()["groups"]}
    assert set(groups) == {*CELL, "cell_sum", "out"}
    assert all(g["why"].startswith(g["form"]) for g in groups.values())
    assert min(made.report.to_dict()["sqnr_db"].values()) >= 18.0  # the recipe's own bound


def test_a_branch_that_calibration_never_took_stays_float_with_its_reason() -> None:
    feeds = loops.nested_feeds(6)
    source = loops.nested_loops().SerializeToString()
    made = qcompiler.compile(source, calibration=feeds, recipe="int8-static", guard=False)
    assert {r.node for r in made.remarks if r.reason == "never-observed"} == {"single"}
    groups = {g["group"]: g for g in made.report.to_dict()["groups"]}
    assert groups["single"]["form"] == "float"
    assert groups["single"]["why"].startswith("float: never-observed: ")
    assert all(groups[name]["form"] == "static-float" for name in (*CELL, "mix"))
    # The branch is there all the same.
    feed = loops.nested_feeds(1, deep=False)[0]
    wanted = ENGINE.load(source).run(feed)["y"]
    assert ENGINE.load(made.model).run(feed)["y"].shape == wanted.shape


@COVERED
def test_a_loop_in_front_of_which_nothing_is_constant_needs_no_calibration() -> None:
    made = qcompiler.compile(loops.recurrent_loop().SerializeToString(), guard=False)
    assert set(made.report.to_dict()["proof"]["kernels"]) == SUBJECTS["loop"].fused
    assert set(made.decisions.forms.values()) == {"dynamic"}
