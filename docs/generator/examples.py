"""What the rules and passes do to a small graph, run when the site is built.

``graphs/rules/RULE.txt`` is a model in ONNX's text syntax on which the rule fires; ``graphs/passes/PASS.txt`` the
same for a pass without rules. The passes around quantization share one model, ``graphs/passes/chain.txt``.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import onnx_ir as ir

from qcompiler.ir.serialize import save_model
from qcompiler.ir.text import parse_text, print_model
from qcompiler.passes.catalog import shipped_passes
from qcompiler.patterns.engine import apply_rules
from qcompiler.patterns.language import Rule
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.state import CompileState
from qcompiler.targets.target import Target

FOLDER = Path(__file__).parent / "graphs"

_QUANTIZE = "plan-quantization{matmul=static-float},insert-qdq,fold-scales,fuse-qdq"
_CHAINS = (("ort-x86", "lower-onnxruntime"), ("openvino", "lower-openvino"), ("tensorrt-sm89", "lower-tensorrt"))


@dataclass(frozen=True)
class BeforeAfter:
    """Two graphs, and both as text; without graphs where only the text is known."""

    before: str
    after: str
    graphs: tuple[ir.Graph, ir.Graph] | None = None
    note: str = ""


def rule_example(rule: Rule) -> BeforeAfter | None:
    """Apply a rule to its example; None if it has none.

    Raises:
        ValueError: the rule does not fire on its example.
    """
    path = FOLDER / "rules" / f"{rule.name}.txt"
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8")
    before, after = parse_text(text), parse_text(text)
    report = apply_rules(after, [rule])
    if not any(remark.done for remark in report.remarks):
        raise ValueError(f"{path.name}: {rule.name} does not fire: {[str(r) for r in report.remarks]}")
    return BeforeAfter(print_model(before), print_model(after), (before.graph, after.graph))


def pass_example(name: str) -> BeforeAfter | None:
    """Run a pass on its example; None if it has none.

    Raises:
        ValueError: the pass changes nothing.
    """
    if name in (chained := _chained()):
        return chained[name]
    path = FOLDER / "passes" / f"{name}.txt"
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8")
    before = parse_text(text)
    state = CompileState(parse_text(text), Target("example", "onnxruntime"))
    Pipeline.parse(name, shipped_passes()).run(state)
    made = BeforeAfter(print_model(before), print_model(state.model), (before.graph, state.model.graph))
    if made.before == made.after:
        raise ValueError(f"{path.name}: {name} changes nothing")
    return made


@functools.cache
def _chained() -> dict[str, BeforeAfter]:
    """Return the examples of the passes around quantization, from dumps of three pipelines."""
    made: dict[str, BeforeAfter] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "chain.onnx"
        save_model(parse_text((FOLDER / "passes" / "chain.txt").read_text(encoding="utf-8")), model)
        for target, lowering in _CHAINS:
            dump = Path(folder) / target
            command = [
                sys.executable, "-m", "qcompiler", "opt", str(model), "--target", target, "--passes",
                f"{_QUANTIZE},{lowering}", "--random-calibration", "4", "--dump", str(dump),
            ]  # fmt: skip
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            stages = sorted(dump.glob("*.ir"))
            for earlier, later in pairwise(stages):
                name = later.stem.partition("-")[2].partition("{")[0]
                texts = (earlier.read_text(encoding="utf-8"), later.read_text(encoding="utf-8"))
                made.setdefault(name, BeforeAfter(*texts, note=f"For target `{target}`:"))
    return made
