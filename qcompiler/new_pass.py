"""The files of a new pass or rule, with its test, as text; what ``qcompiler new-pass`` writes."""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
from dataclasses import dataclass
from string import Template

from qcompiler.errors import PassError
from qcompiler.passes.catalog import shipped_passes
from qcompiler.patterns.catalog import all_rules

_NAME = re.compile(r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*")

_PASS = '''"""$name: replace Neg(Neg(x)) by x (an example)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from qcompiler.ir.analysis import open_graphs
from qcompiler.ir.graph import is_op
from qcompiler.ir.phase import Phase
from qcompiler.ir.rewriter import Rewriter
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Contract, Exact
from qcompiler.pipeline.state import CompileState


@dataclass(frozen=True)
class $Class(Pass):
    """Replace Neg(Neg(x)) by x: write your own rewrite here.

    Fields of this class are the pass's options. Its phase says which graphs it works on
    (FLOAT: plain ONNX), its numeric contract how far it may move the numbers.
    """

$pass_name    needs = Phase.FLOAT
    numerics: ClassVar[Contract] = Exact()

    def run(self, state: CompileState) -> int:
        """Rewrite the model in place and return the number of changes."""
        rewriter = Rewriter(state.model)
        for graph in open_graphs(state.model):
            for node in list(graph):
                source = _double_negation(node) if node.graph is graph else None
                # Asking lets `qcompiler opt --bisect` stop the pass half-way.
                if source is not None and state.allow(self.name(), node):
                    state.remark(self.name(), node, "rewritten", done=True)
                    rewriter.replace(node.outputs[0], source)
                    rewriter.erase_dead([node])
        return rewriter.changes


def _double_negation(node: ir.Node) -> ir.Value | None:
    """Return x where the node computes Neg(Neg(x)), else None."""
    inner = node.inputs[0] if is_op(node, "Neg") else None
    producer = inner.producer() if inner is not None else None
    if producer is None or not is_op(producer, "Neg"):
        return None
    return producer.inputs[0]
'''

_RULE = '''"""$name: replace Neg(Neg(x)) by x (an example)."""

from __future__ import annotations

import onnx_ir as ir
from qcompiler.patterns.builder import Builder
from qcompiler.patterns.clauses import replaceable
from qcompiler.patterns.language import Rule, op, rule, var
from qcompiler.patterns.match import Match


def _build(_: Builder, m: Match) -> ir.Value:
    """Return the value that takes the place of the match."""
    return m.x


$NAME: Rule = rule(
    "$name",
    match=op("Neg", op("Neg", var("x"))),
    where=[replaceable("x")],
    build=_build,
    doc="Replace Neg(Neg(x)) by x.",
)
'''

_TEST_HEAD = '''"""$name: what it rewrites, and that the numbers stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
$imports

HEAD = '<ir_version: 10, opset_import: ["" : 21]> g (float[N,4] x) => (float[N,4] y)'


'''

_TEST_BODY = '''

def outputs(model: ir.Model) -> list[np.ndarray]:
    """Run a model on ONNX Runtime, its own optimizations off."""
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    runner = OrtEngine().load(model, EngineOptions(optimize=False))
    return list(runner.run({"x": x}).values())


def operators(model: ir.Model) -> list[str]:
    """Return the operators in program order."""
    return [node.op_type for node in model.graph]


def test_it_rewrites_and_the_numbers_stay() -> None:
    """The graph changes as wanted, is sound, and computes the same."""
    model = import_model(parse_text(f"{HEAD} {{ a = Neg(x) b = Neg(a) y = Relu(b) }}"))
    before = outputs(model)
    assert rewritten(model) > 0
    assert operators(model) == ["Relu"]
    for was, now in zip(before, outputs(model), strict=True):
        np.testing.assert_array_equal(now, was)


def test_a_second_run_changes_nothing() -> None:
    """What it leaves behind, it has nothing more to do on."""
    model = import_model(parse_text(f"{HEAD} {{ a = Neg(x) b = Neg(a) y = Relu(b) }}"))
    assert rewritten(model) > 0
    assert rewritten(model) == 0


def test_other_graphs_stay_as_they_are() -> None:
    """A single negation is no match."""
    model = import_model(parse_text(f"{HEAD} {{ a = Neg(x) y = Relu(a) }}"))
    assert rewritten(model) == 0
    assert operators(model) == ["Neg", "Relu"]
'''

_REWRITTEN_PASS = '''def rewritten(model: ir.Model) -> int:
    """Run the pass in place, verify the graph, and return the number of changes."""
    state = CompileState(model, load_target("ort-generic"))
    (result,) = Pipeline(($Class(),)).run(state, [VerifyInstrument()])
    return result.changes
'''

_REWRITTEN_RULE = '''def rewritten(model: ir.Model) -> int:
    """Apply the rule in place, verify the graph, and return how often it fired."""
    report = apply_rules(model, [$NAME])
    verify(model, Phase.FLOAT)
    return report.changes
'''

_PASS_IMPORTS = """from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.engine import EngineOptions
from qcompiler.ir.importer import import_model
from qcompiler.ir.text import parse_text
from qcompiler.pipeline.instruments.verify import VerifyInstrument
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.state import CompileState
from qcompiler.targets.target import load_target

from $module import $Class"""

_RULE_IMPORTS = """from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.engine import EngineOptions
from qcompiler.ir.importer import import_model
from qcompiler.ir.phase import Phase
from qcompiler.ir.text import parse_text
from qcompiler.ir.verify import verify
from qcompiler.patterns.engine import apply_rules

from $module import $NAME"""

_PYPROJECT = """[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$dist"
version = "0.1.0"
description = "$what for qcompiler."
requires-python = ">=3.11"
dependencies = ["qcompiler"]

# What qcompiler finds once the package is installed; other groups: qcompiler.passes,
# qcompiler.rules (named after the pass that tries them), qcompiler.targets, qcompiler.recipes.
[project.entry-points."$group"]
$offered = "$snake.$file:$object"

[tool.setuptools.packages.find]
where = ["src"]

[tool.setuptools.package-data]
$snake = ["py.typed", "*.toml"]

[tool.pytest.ini_options]
pythonpath = ["src"]

[tool.mypy]
strict = true
mypy_path = "src"
"""

RULES_FOR = "canonicalize"
"""The pass that tries the rules of a new package."""


@dataclass(frozen=True)
class NewPass:
    """What a new pass or rule is called, everywhere.

    Attributes:
        name: kebab-case, as pipelines write it.
        rule: whether it is a pattern rule instead of a pass.
    """

    name: str
    rule: bool = False

    @property
    def snake(self) -> str:
        """Return the name as modules have it."""
        return self.name.replace("-", "_")

    @property
    def object(self) -> str:
        """Return the name of the class, or of the rule."""
        return self.snake.upper() if self.rule else "".join(part.capitalize() for part in self.name.split("-"))

    def files(self) -> dict[str, str]:
        """Return text by file name: the pass (or rule) and its test, beside one another."""
        return {f"{self.snake}.py": self._source(), f"test_{self.snake}.py": self._test(self.snake)}

    def package(self) -> dict[str, str]:
        """Return text by path: a whole package that offers the pass (or rule) to qcompiler once it is installed."""
        module = "rules" if self.rule else "passes"
        what = f"The {'rule' if self.rule else 'pass'} {self.name}"
        root, inside = self.name, f"{self.name}/src/{self.snake}"
        pyproject = Template(_PYPROJECT).substitute(
            dist=self.name,
            what=what,
            group=f"qcompiler.{module}",
            offered=RULES_FOR if self.rule else self.name,
            snake=self.snake,
            file=module,
            object=self.object,
        )
        return {
            f"{root}/pyproject.toml": pyproject,
            f"{inside}/__init__.py": f'"""{what}, for qcompiler."""\n',
            f"{inside}/py.typed": "",
            f"{inside}/{module}.py": self._source(),
            f"{root}/tests/test_{self.snake}.py": self._test(f"{self.snake}.{module}"),
        }

    def _source(self) -> str:
        derived = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", self.object).lower()
        given = "" if derived == self.name else f'    pass_name: ClassVar[str] = "{self.name}"\n'
        return self._fill(_RULE if self.rule else _PASS, pass_name=given)

    def _test(self, module: str) -> str:
        imports = self._fill(_RULE_IMPORTS if self.rule else _PASS_IMPORTS, module=module)
        head = self._fill(_TEST_HEAD, imports=imports)
        return head + self._fill(_REWRITTEN_RULE if self.rule else _REWRITTEN_PASS) + _TEST_BODY

    def _fill(self, text: str, *, module: str = "", imports: str = "", pass_name: str = "") -> str:
        return Template(text).substitute(
            name=self.name, Class=self.object, NAME=self.object, module=module, imports=imports, pass_name=pass_name
        )


def new_pass(name: str, *, rule: bool = False) -> NewPass:
    """Check a name and return what is to be written under it.

    Args:
        name: words of lower-case letters and digits, joined by ``-`` or ``_``.
        rule: make a pattern rule instead of a pass.

    Raises:
        PassError: the name has another form, or is taken.
    """
    if _NAME.fullmatch(name) is None:
        raise PassError(
            f"{name!r} is no name for a {'rule' if rule else 'pass'}: expected words of a-z and 0-9, the first letter "
            "a-z, joined by '-' or '_', like fold-scales"
        )
    made = NewPass(name.replace("_", "-"), rule)
    taken = {r.name for r in all_rules()} if rule else set(shipped_passes().names())
    if made.name in taken:
        raise PassError(f"qcompiler itself has a {'rule' if rule else 'pass'} {made.name}; choose another name")
    if keyword.iskeyword(made.snake) or made.snake in sys.stdlib_module_names:
        raise PassError(
            f"{made.snake} is a word of Python's own: the module could not be imported; choose another name"
        )
    if importlib.util.find_spec(made.snake) is not None:
        raise PassError(f"a module {made.snake} is installed already: the new one would hide it; choose another name")
    return made
