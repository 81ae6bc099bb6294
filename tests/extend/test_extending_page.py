"""docs/extending.md: every block is run, in order, in one folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import onnx
import pytest

from qcompiler.new_pass import new_pass
from tests.extend.conftest import Call, Installer
from tests.extend.packages import RULES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str]]:
    """Return (language, text) of every fenced block."""
    return [(found[1], found[2]) for found in BLOCK.finditer(PAGE.read_text(encoding="utf-8"))]


def install_package(installed: Installer) -> None:
    """Install the package that the page describes: its table, its recipe and its entry points."""
    target, recipe, points = (text for language, text in blocks() if language == "toml")
    files = {
        "edge_tools/__init__.py": "",
        "edge_tools/passes.py": new_pass("cancel-negations").files()["cancel_negations.py"],
        "edge_tools/rules.py": RULES.replace("TWICE_ABS", "ABS_OF_ABS"),
        "edge_tools/edge-box.toml": target,
        "edge_tools/edge-int8.toml": recipe,
    }
    installed("edge-tools", files, tomllib.loads(points)["project"]["entry-points"])


def test_every_block_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call, installed: Installer
) -> None:
    counts = {language: sum(kind == language for kind, _ in blocks()) for language in ("bash", "python", "toml")}
    assert counts == {"bash": 3, "python": 5, "toml": 3}
    assert sum(counts.values()) == len(blocks())
    ready = False
    work = tmp_path / "work"
    work.mkdir()
    tools = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    # A block goes on where the one before it left off, as a reader would.
    reader = types.ModuleType("reader")
    monkeypatch.setitem(sys.modules, "reader", reader)
    monkeypatch.chdir(work)
    for language, text in blocks():
        if language == "python":
            exec(compile(text, PAGE.name, "exec"), vars(reader))
        elif language == "bash":
            for line in text.splitlines():
                if not ready and line.startswith("qcompiler passes"):
                    install_package(installed)
                    ready = True
                check_line(line, call, {"PATH": tools})
    assert [n.op_type for n in onnx.load(work / "shorter.onnx").graph.node] == ["Abs", "Abs", "Relu"]
    assert (work / "small.int8.onnx").is_file()
    assert (work / "small.qdq.onnx").is_file()


def check_line(line: str, call: Call, environment: dict[str, str]) -> None:
    """Run a command; ours in this process, which starts faster."""
    command, *arguments = shlex.split(line)
    if command == "qcompiler":
        done = call(*arguments)
        assert done.code == 0, f"{line}\n{done.stderr}"
        if arguments[0] in ("passes", "patterns", "targets", "recipes"):
            assert "from edge-tools 1.0" in done.stdout
        return
    ran = subprocess.run(
        ["bash", "-ec", line], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "3 passed" in ran.stdout


@pytest.mark.parametrize("name", ["qcompiler.passes", "qcompiler.rules", "qcompiler.targets", "qcompiler.recipes"])
def test_the_page_names_every_group(name: str) -> None:
    from qcompiler.plugins import GROUPS

    assert set(GROUPS) == {"qcompiler.passes", "qcompiler.rules", "qcompiler.targets", "qcompiler.recipes"}
    assert f"| `{name}` |" in PAGE.read_text(encoding="utf-8")
