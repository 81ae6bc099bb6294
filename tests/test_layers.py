"""The import layers of the design, the list of shipped packages, and what importing the package must not load."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

RANKS = {
    "qcompiler.errors": 0,
    "qcompiler.engine": 1,
    "qcompiler.plugins": 1,
    "qcompiler.staging": 1,
    "qcompiler.ir": 2,
    "qcompiler.quant": 3,
    "qcompiler.targets": 4,
    "qcompiler.kernels": 4,
    "qcompiler.patterns": 5,
    "qcompiler.pipeline": 6,
    "qcompiler.passes": 7,
    "qcompiler.calibration": 7,
    "qcompiler.search": 7,
    "qcompiler.recipes": 7,
}
"""Layer of each package; a module imports lower layers and its own package. All others may import everything."""

BESIDE = {("qcompiler.search", "qcompiler.calibration")}
"""Packages of one layer of which the first may import the second."""

ENGINES = {"onnxruntime", "torch", "triton", "tensorrt", "openvino", "tensorrt_rtx"}

FOLDERS = {
    "qcompiler": ROOT / "qcompiler",
    "qcompiler.passes": ROOT / "passes",
    "qcompiler.patterns": ROOT / "patterns",
    "qcompiler.kernels": ROOT / "kernels",
}


def modules() -> Iterator[tuple[str, Path]]:
    """Yield the import name and the file of every module of the package."""
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *(p for p in parts if p != "__init__"))), path


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Yield what a file imports anywhere in it, with the line; a name imported from a package may be a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module or "", node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def package_of(module: str) -> str | None:
    """Return the ranked package that a module belongs to."""
    return next((p for p in RANKS if module == p or module.startswith(p + ".")), None)


def violations(name: str, path: Path) -> list[str]:
    own = package_of(name)
    if own is None:
        return []
    found = []
    for target, line in imports(path):
        if not target.startswith("qcompiler."):
            continue
        other = package_of(target)
        if other is None:
            # A name out of a ranked package is seen with its package; what is left is a driver, or one of its names.
            found.append(f"{path.name}:{line}: {name} imports {target}")
        elif other != own and RANKS[other] >= RANKS[own] and (own, other) not in BESIDE:
            found.append(f"{path.name}:{line}: {name} imports {target}")
    return found


def test_every_module_imports_lower_layers_only() -> None:
    assert [v for name, path in modules() for v in violations(name, path)] == []


def test_a_breach_is_found(tmp_path: Path) -> None:
    file = tmp_path / "graph.py"
    file.write_text("from qcompiler.quant.spec import QuantSpec\nfrom qcompiler.errors import ModelError\n")
    assert [v.split(": ", 1)[1] for v in violations("qcompiler.ir.graph", file)] == [
        "qcompiler.ir.graph imports qcompiler.quant.spec",
        "qcompiler.ir.graph imports qcompiler.quant.spec.QuantSpec",
    ]
    file.write_text("def f():\n    import qcompiler.compiler\n")
    assert len(violations("qcompiler.search.speed", file)) == 1
    file.write_text("from qcompiler.calibration.statistics import Statistics\n")
    assert violations("qcompiler.search.speed", file) == []
    assert len(violations("qcompiler.passes.fuse_qdq", file)) == 2


def test_only_backends_import_an_engine() -> None:
    # The drop-in is an engine's own class with another constructor: it cannot be had without the engine. A kernel's
    # source is Triton's, and so is the compiler that proves it.
    allowed = ("qcompiler.backends.", "qcompiler.dropin.", "qcompiler.ort", "qcompiler.kernels.proof.")
    found = [
        f"{name} imports {target}"
        for name, path in modules()
        if not name.startswith(allowed)
        and not (name.startswith("qcompiler.kernels.") and name.endswith(".triton_kernel"))
        for target, _ in imports(path)
        if target.split(".")[0] in ENGINES
    ]
    assert found == []


def test_kernels_import_formats_and_arithmetic_only() -> None:
    files = sorted((ROOT / "kernels").rglob("*.py"))
    legal = ("qcompiler.kernels", "qcompiler.errors", "qcompiler.engine", "qcompiler.quant")
    own = [(f.name, target) for f in files for target, _ in imports(f) if target.startswith("qcompiler.")]
    assert own
    assert [(name, target) for name, target in own if not target.startswith(legal)] == []


def test_every_folder_with_modules_is_a_shipped_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    there = {name if path.stem == "__init__" else name.rpartition(".")[0] for name, path in modules()}
    assert there == set(settings["packages"])
    for name, path in FOLDERS.items():
        if name != "qcompiler":
            assert settings["package-dir"][name] == path.name


@pytest.mark.parametrize(
    "statement",
    [
        "import qcompiler",
        "import qcompiler.cli",
        "import qcompiler.passes.catalog, qcompiler.patterns.catalog, qcompiler.search.speed",
        "import qcompiler.calibration.readers, qcompiler.pipeline.bisect, qcompiler.pipeline.replay",
        "import qcompiler.kernels.catalog as c; [(c.contract_of(k), c.reference_of(k)) for k in c.kernel_names()]",
    ],
)
def test_importing_loads_no_engine(statement: str, tmp_path: Path) -> None:
    code = f"import sys\n{statement}\nprint(sorted({ENGINES!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "[]\n"


def test_the_package_has_few_public_names() -> None:
    import qcompiler

    assert len(qcompiler.__all__) <= 20
    assert all(getattr(qcompiler, name) is not None for name in qcompiler.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'kompile'"):
        _ = qcompiler.kompile
