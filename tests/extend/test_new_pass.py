"""qcompiler new-pass: what it writes passes its own test and the linters, and nothing is overwritten."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qcompiler.new_pass import new_pass
from tests.extend.conftest import Call
from tests.extend.packages import install

ROOT = Path(__file__).resolve().parents[2]
STRICT = "E,F,W,I,UP,B,SIM,RUF,D1,C4,PT,N"


def run(command: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("options", [(), ("--rule",), ("--package",), ("--rule", "--package")])
def test_what_is_written_passes_its_own_test_and_the_linters(
    options: tuple[str, ...], call: Call, tmp_path: Path
) -> None:
    done = call("new-pass", "cancel-2-negations", *options, "-o", tmp_path)
    assert done.code == 0, done.stderr
    folder = tmp_path / "cancel-2-negations" if "--package" in options else tmp_path
    written = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    module = "rules.py" if "--rule" in options else "passes.py"
    if "--package" in options:
        inside = {f"src/cancel_2_negations/{name}" for name in ("__init__.py", "py.typed", module)}
        assert set(written) == {"pyproject.toml", "tests/test_cancel_2_negations.py"} | inside
    else:
        assert written == ["cancel_2_negations.py", "test_cancel_2_negations.py"]
    assert "3 passed" in run(["pytest", "-q", "-W", "error", "-p", "no:cacheprovider"], folder)
    if installed("ruff"):
        run(["ruff", "check", "--isolated", "--no-cache", "--select", STRICT, "."], folder)
        run(["ruff", "format", "--isolated", "--no-cache", "--check", "."], folder)


def test_types_are_strict(tmp_path: Path) -> None:
    if not installed("mypy"):
        pytest.skip("mypy is not installed")
    for name, rule in (("cancel-negations", False), ("neg-of-neg", True)):
        for file, text in new_pass(name, rule=rule).files().items():
            (tmp_path / file).write_text(text)
    # An editable install is invisible to type checkers: lay the package out as a wheel would.
    package = tmp_path / "wheel" / "qcompiler"
    package.mkdir(parents=True)
    for entry in (*(ROOT / "qcompiler").iterdir(), ROOT / "passes", ROOT / "patterns"):
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    files = sorted(p.name for p in tmp_path.glob("*.py"))
    output = run(
        ["mypy", "--strict", "--follow-imports=silent", "--cache-dir", str(tmp_path / "cache"), *files], tmp_path,
        MYPYPATH=str(tmp_path / "wheel"),
    )  # fmt: skip
    assert output == "Success: no issues found in 4 source files\n"


@pytest.mark.parametrize("rule", [False, True])
def test_an_installed_package_is_listed(rule: bool, tmp_path: Path) -> None:
    made = new_pass("cancel-negations", rule=rule)
    files = made.package()
    points = tomllib.loads(files["cancel-negations/pyproject.toml"])["project"]["entry-points"]
    inside = {path.removeprefix("cancel-negations/src/"): text for path, text in files.items() if "/src/" in path}
    site = install(tmp_path / "site", "cancel-negations", inside, points, "0.1.0")
    code = (
        "import json\nfrom qcompiler.passes.catalog import shipped_passes\n"
        "from qcompiler.patterns.catalog import offered_rules\nregistry = shipped_passes().with_entry_points()\n"
        "print(json.dumps([registry.owner('cancel-negations'), [r.name for r in offered_rules('canonicalize')],\n"
        "                  [str(e) for e in registry.errors()]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(site)})  # fmt: skip
    wanted = ["", ["cancel-negations"], []] if rule else ["cancel-negations 0.1.0", [], []]
    assert json.loads(done.stdout) == wanted


def test_snake_case_is_the_same_name() -> None:
    assert new_pass("cancel_negations") == new_pass("cancel-negations")
    assert new_pass("cancel-negations").object == "CancelNegations"
    assert new_pass("cancel-negations", rule=True).object == "CANCEL_NEGATIONS"


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("Fold", (), "'Fold' is no name for a pass: expected words of a-z and 0-9, the first letter a-z"),
        ("2-fold", (), "'2-fold' is no name for a pass"),
        ("fold--it", (), "'fold--it' is no name for a pass"),
        ("fold it", ("--rule",), "'fold it' is no name for a rule"),
        ("../fold", (), "'../fold' is no name for a pass"),
        ("fold-casts", (), "qcompiler itself has a pass fold-casts; choose another name"),
        ("fold_casts", ("--package",), "qcompiler itself has a pass fold-casts"),
        ("pad-by-nothing", ("--rule",), "qcompiler itself has a rule pad-by-nothing"),
        ("class", (), "class is a word of Python's own"),
        ("json", (), "json is a word of Python's own"),
        ("numpy", (), "a module numpy is installed already"),
    ],
)
def test_a_bad_name_is_refused(name: str, options: tuple[str, ...], error: str, call: Call, tmp_path: Path) -> None:
    done = call("new-pass", name, *options, "-o", tmp_path)
    assert done.code == 2
    assert done.stderr.startswith(f"error: {error}")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(call: Call, tmp_path: Path) -> None:
    test = tmp_path / "test_my_fold.py"
    test.write_text("mine")
    done = call("new-pass", "my-fold", "-o", tmp_path)
    assert done.code == 2
    assert f"{test} is there already, nothing was written" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["test_my_fold.py"]
    assert test.read_text() == "mine"
    blocked = call("new-pass", "my-fold", "-o", test)
    assert (blocked.code, "is a file" in blocked.stderr) == (2, True)
