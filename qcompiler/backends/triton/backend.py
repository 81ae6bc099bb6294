"""Triton as the compiler needs it: lower, prove by the steps, write the artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from qcompiler.backends.backend import RunsLowered, Written
from qcompiler.backends.readback import Miss, Planned, Proof
from qcompiler.backends.tensorrt.backend import PlainOrtEngine
from qcompiler.backends.triton.kernel_calls import has_kernel
from qcompiler.engine import Engine, EngineOptions, ShapeRange
from qcompiler.errors import TargetError
from qcompiler.ir.graph import all_nodes
from qcompiler.passes.kernel_nodes import FOLDED, KERNEL_DOMAIN, is_kernel
from qcompiler.pipeline.base import Pass

SUFFIX = ".qc"
_MOVERS = frozenset(
    {
        "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather", "Expand", "Tile", "DepthToSpace",
        "SpaceToDepth", "Split", "MaxPool", "Resize", "Concat",
    }
)  # fmt: skip


@dataclass(frozen=True)
class TritonBackend(RunsLowered):
    """The project's own kernels; ONNX Runtime computes what accuracy is measured on.

    Attributes:
        sm: compute capability to compile for.
        profiles: ranges of shapes of inputs with open axes.
        samples: shape of one calibration batch per input.
        engine: computes the twin of the emitted model.
    """

    sm: int = 80
    profiles: Mapping[str, ShapeRange] = field(default_factory=dict)
    samples: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    engine: Engine = field(default_factory=PlainOrtEngine)
    emits_operators: bool = False
    measures: bool = False
    files: tuple[str, ...] = ("qc",)

    @property
    def version(self) -> str:
        """Return Triton's version, empty where it is not installed."""
        from importlib import metadata

        try:
            return f"triton {metadata.version('triton')}"
        except metadata.PackageNotFoundError:
            return ""

    def lowering(self, emit: str) -> tuple[Pass, ...]:
        """Return the passes from FUSED to LOWERED.

        Raises:
            TargetError: a form of ONNX operators is asked for.
        """
        if emit != "auto":
            raise TargetError(f"emit is {emit!r}, but the target's steps are kernels; leave --emit away")
        from qcompiler.passes.assign_channels_last import AssignChannelsLast
        from qcompiler.passes.fuse_epilogues import FuseEpilogues
        from qcompiler.passes.fuse_norms import FuseNorms
        from qcompiler.passes.lower_triton import LowerTriton
        from qcompiler.passes.prepack_weights import PrepackWeights

        return LowerTriton(), AssignChannelsLast(), FuseEpilogues(), FuseNorms(), PrepackWeights()

    def twin(self, model: ir.Model) -> tuple[Pass, ...]:
        """Return passes that write the same numbers as Q/DQ, where the model has kernels."""
        from qcompiler.passes.lower_triton import LowerTriton

        own = any(node.domain == KERNEL_DOMAIN for node in all_nodes(model))
        return (LowerTriton(standard=True),) if own else ()

    def draft(self) -> tuple[Pass, ...]:
        """Return passes to a model that ONNX Runtime runs, with nearly the same numbers."""
        from qcompiler.passes.lower_triton import LowerTriton

        return (LowerTriton(standard=True),)

    def prove(self, planned: Sequence[Planned], model: ir.Model, options: EngineOptions) -> Proof:
        """Match every planned fusion with the step that executes it; the plan is what runs, so nothing is loaded."""
        return prove_steps(planned, model)

    def save(self, model: ir.Model, path: Path) -> Written:
        """Write the artifact, a folder.

        Raises:
            TargetError: the suffix is another one.
            ModelError: an operator has no step, or the path cannot be written.
        """
        if path.suffix != SUFFIX:
            raise TargetError(f"{path}: a model for Triton kernels is a folder; give a path that ends in {SUFFIX}")
        from qcompiler.backends.triton.artifact import save_artifact

        return Written((path,), save_artifact(model, path, self.sm, self.profiles, self.samples))


def prove_steps(planned: Sequence[Planned], model: ir.Model) -> Proof:
    """Return which planned fusion is executed by which step of a lowered model.

    One that a kernel of the project executes is fused, and so is one that only moves or selects stored numbers, by
    torch. Everything else is a miss: torch functions in place of kernels, too.
    """
    by_group: dict[str, list[ir.Node]] = {}
    for node in all_nodes(model):
        by_group.setdefault(str(node.name), []).append(node)
    kernels = _kernels_by_origin(model)
    fused: dict[str, str] = {}
    missed = []
    for plan in planned:
        nodes = by_group.get(plan.group, [])
        found = next((n for n in nodes if n.domain == KERNEL_DOMAIN), None) or kernels.get(plan.group)
        if found is not None and has_kernel(found.op_type):
            fused[plan.group] = _shown(found, plan)
            continue
        mover = next((n for n in nodes if (n.op_type in _MOVERS and _integers(n)) or _selects(n)), None)
        if mover is not None or (plan.kind in _MOVERS and not nodes):
            fused[plan.group] = f"{plan.kind} of bytes"
            continue
        missed.append(Miss(plan.group, plan.kind, "no-kernel", _why(found, nodes)))
    return Proof(len(planned), fused, tuple(missed), "from the plan's own steps; nothing was timed")


def _why(found: ir.Node | None, nodes: Sequence[ir.Node]) -> str:
    """Return why no kernel executes a group."""
    if found is None:
        executed = nodes[0].op_type if nodes else "nothing"
        return f"runs as the torch function {executed} on floats, between Q/DQ steps"
    if found.op_type == "int8_pool":
        return (
            "runs as torch functions on integers: averages have a kernel where their lengths are fixed, the channels "
            "lie behind, and every window counts as many elements"
        )
    return f"runs as torch functions on integers: there is no kernel {found.op_type}"


def _selects(node: ir.Node) -> bool:
    """Return whether a node selects stored numbers."""
    return is_kernel(node, "int8_pool") and node.attributes["op"].as_string() == "max"


def _kernels_by_origin(model: ir.Model) -> dict[str, ir.Node]:
    """Return kernels by the groups that fusing has folded into them."""
    found: dict[str, ir.Node] = {}
    for node in all_nodes(model):
        if node.domain == KERNEL_DOMAIN:
            for name in node.metadata_props.get(FOLDED, "").split("\n"):
                if name:
                    found[name] = node
    return found


def _shown(node: ir.Node, plan: Planned) -> str:
    return node.op_type if node.name == plan.group else f"{node.op_type} {node.name}"


def _integers(node: ir.Node) -> bool:
    first = node.inputs[0]
    return first is not None and first.dtype in (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.FLOAT8E4M3FN)
