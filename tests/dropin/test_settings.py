"""Options of the drop-in: code before environment before default, and nothing misspelt passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcompiler.dropin.settings import DropinOptions, default_cache, read_options
from qcompiler.errors import PassError


def test_defaults() -> None:
    made = DropinOptions().resolved({"XDG_CACHE_HOME": "/somewhere", "LOCALAPPDATA": "/somewhere"})
    assert (made.enabled, made.recipe, made.requests, made.wait, made.guard, made.swap) == (
        True, "int8", 32, 120.0, True, True,
    )  # fmt: skip
    assert made.sample_bytes == 256 * 1024 * 1024
    assert made.calibration is None


def test_variables_fill_what_code_leaves_open() -> None:
    env = {
        "QCOMPILER_RECIPE": "int8-dynamic",
        "QCOMPILER_REQUESTS": "7",
        "QCOMPILER_WAIT": "0.5",
        "QCOMPILER_BUDGET": "sqnr>=30; drop<=1%",
        "QCOMPILER_GUARD": "off",
        "QCOMPILER_SWAP": "No",
        "QCOMPILER_CALIBRATION": "feeds.npz",
        "QCOMPILER_CACHE": "/a/folder",
        "QCOMPILER_SAMPLE_BYTES": "1000",
    }
    made = DropinOptions().resolved(env)
    assert made.recipe == "int8-dynamic"
    assert (made.requests, made.wait, made.sample_bytes) == (7, 0.5, 1000)
    assert made.budget == ["sqnr>=30", "drop<=1%"]
    assert (made.guard, made.swap, made.calibration, made.cache) == (False, False, "feeds.npz", Path("/a/folder"))
    given = DropinOptions(recipe="int8", requests=3, wait=9, guard=True, swap=True, cache="b", budget="sqnr>=1")
    over = given.resolved(env)
    assert (over.recipe, over.requests, over.wait, over.guard, over.swap) == ("int8", 3, 9, True, True)
    assert (over.cache, over.budget) == (Path("b"), "sqnr>=1")


@pytest.mark.parametrize(("word", "on"), [("off", False), ("0", False), ("FALSE", False), ("on", True), ("", True)])
def test_everything_can_be_turned_off(word: str, on: bool) -> None:
    assert DropinOptions().resolved({"QCOMPILER_ORT": word}).enabled is on
    assert DropinOptions(enabled=True).resolved({"QCOMPILER_ORT": word}).enabled is on  # the variable always wins
    assert DropinOptions(enabled=False).resolved({"QCOMPILER_ORT": word}).enabled is False


@pytest.mark.parametrize(
    ("env", "text"),
    [
        ({"QCOMPILER_ORT": "maybe"}, "QCOMPILER_ORT is 'maybe'; expected on or off"),
        ({"QCOMPILER_WAIT": "long"}, "QCOMPILER_WAIT is 'long'; expected a number"),
        ({"QCOMPILER_WAIT": "-1"}, "QCOMPILER_WAIT is '-1'; expected a number of at least 0"),
        ({"QCOMPILER_REQUESTS": "0"}, "requests is 0; expected at least 1"),
    ],
)
def test_a_bad_variable_is_named(env: dict[str, str], text: str) -> None:
    with pytest.raises(PassError, match=text):
        DropinOptions().resolved(env)


def test_options_are_read_from_a_mapping() -> None:
    assert read_options(None) == DropinOptions()
    assert read_options({"recipe": "int8", "requests": 4}) == DropinOptions(recipe="int8", requests=4)
    assert read_options(DropinOptions(tag="a")) == DropinOptions(tag="a")
    with pytest.raises(PassError, match="unknown qcompiler option 'recpie'; expected one of: enabled, recipe"):
        read_options({"recpie": "int8"})
    with pytest.raises(PassError, match="is a str; expected a dict or DropinOptions"):
        read_options("int8")  # type: ignore[arg-type]


def test_the_cache_is_where_the_system_keeps_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    assert default_cache({"XDG_CACHE_HOME": "/x"}) == Path("/x/qcompiler")
    assert default_cache({}) == Path.home() / ".cache" / "qcompiler"
    monkeypatch.setattr("sys.platform", "darwin")
    assert default_cache({}) == Path.home() / "Library" / "Caches" / "qcompiler"
    assert default_cache({"QCOMPILER_CACHE": "/y"}) == Path("/y")
