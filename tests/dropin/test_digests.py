"""Names of entries: another one whenever something that matters differs, the same one otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qcompiler.dropin import digests
from qcompiler.dropin.digests import canonical, entry_key, model_digest
from qcompiler.recipes.recipe import Override, Recipe
from tests.dropin.conftest import small_net


def test_weights_in_another_file_count(tmp_path: Path) -> None:
    inline = tmp_path / "inline.onnx"
    onnx.save(small_net(), inline)
    path = tmp_path / "net.onnx"
    onnx.save(small_net(), path, save_as_external_data=True, location="net.weights", size_threshold=0)
    first = model_digest(path)
    assert first != model_digest(inline)
    assert model_digest(inline) == model_digest(inline.read_bytes())
    weights = tmp_path / "net.weights"
    data = bytearray(weights.read_bytes())
    data[100] ^= 1
    weights.write_bytes(data)
    assert model_digest(path) != first
    weights.unlink()
    with pytest.raises(FileNotFoundError):
        model_digest(path)


def test_weights_of_bodies_count(tmp_path: Path) -> None:
    tensor = onnx.numpy_helper.from_array(np.ones(4, np.float32), "inner")
    body = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["inner"], ["out"])], "body", [], [], [tensor])
    node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
    graph = onnx.helper.make_graph([node], "g", [], [])
    model = onnx.helper.make_model(graph)
    onnx.external_data_helper.set_external_data(
        model.graph.node[0].attribute[0].g.initializer[0], location="inner.weights"
    )
    model.graph.node[0].attribute[0].g.initializer[0].ClearField("raw_data")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "inner.weights").write_bytes(bytes(16))
    first = model_digest(tmp_path / "m.onnx")
    (tmp_path / "inner.weights").write_bytes(bytes(15) + b"\1")
    assert model_digest(tmp_path / "m.onnx") != first


def test_what_is_no_model_is_refused_where_it_must_be_parsed() -> None:
    with pytest.raises(ValueError, match="not an ONNX model"):
        model_digest(b"\xff\xfflocation")


@pytest.mark.parametrize(
    ("what", "value"), [("__version__", "9"), ("_KEY_VERSION", 99), ("tables_digest", lambda: "x"),
                        ("processor_identity", lambda: "x"), ("_installed", lambda name: "9")],
)  # fmt: skip
def test_release_engine_processor_and_tables_count(what: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = entry_key("m", {"recipe": "int8"})
    assert before == entry_key("m", {"recipe": "int8"})
    monkeypatch.setattr(digests, what, value)
    assert entry_key("m", {"recipe": "int8"}) != before


def test_model_and_options_count() -> None:
    keys = {
        entry_key("m", {"recipe": "int8"}),
        entry_key("n", {"recipe": "int8"}),
        entry_key("m", {"recipe": "int8-static"}),
        entry_key("m", {"recipe": "int8", "budget": ["sqnr>=30"]}),
        entry_key("m", {"recipe": Recipe("int8")}),
        entry_key("m", {"recipe": Recipe("int8", overrides=(Override("*", "float"),))}),
    }
    assert len(keys) == 6
    assert {len(key) for key in keys} == {40}


def metric_a(outputs: Any, feeds: Any) -> float:
    return 0.0


def metric_b(outputs: Any, feeds: Any) -> float:
    return 1.0


def test_values_become_what_tells_them_apart(tmp_path: Path) -> None:
    file = tmp_path / "over.toml"
    file.write_text("a")
    first = canonical(file)
    file.write_text("b")
    assert canonical(file) != first
    assert canonical(tmp_path / "absent") == {"missing": str(tmp_path / "absent")}
    assert canonical([{"x": np.zeros(3, np.float32)}]) != canonical([{"x": np.zeros(3, np.int32)}])
    assert canonical([{"x": np.zeros(3)}]) == canonical([{"x": np.zeros(3)}])
    assert canonical(np.array(["a", "b"], object)) != canonical(np.array(["a", "c"], object))
    assert canonical(metric_a) != canonical(metric_b)
    assert canonical({"b", "a"}) == canonical({"a", "b"})
    assert canonical(None) is None


def test_a_key_is_the_same_in_every_process() -> None:
    code = "from qcompiler.dropin.digests import *\nprint(entry_key('m', {'s': {'a', 'b', 'c', 'd'}, 'k': 1.5}))"
    seen = {
        subprocess.run(
            [sys.executable, "-P", "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True,
            text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(seen) == 1
