"""Ask TensorRT what it makes of a model, in a process of its own: the library can abort, crash or hang."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import onnx
import onnx_ir as ir

from qcompiler.backends.tensorrt.api import RTX, Flavour, find_flavours, require_flavours
from qcompiler.backends.tensorrt.profiles import Dims, settle_profiles
from qcompiler.backends.tensorrt.report import BuildReport, ParserIssue
from qcompiler.backends.tensorrt.worker import Request
from qcompiler.engine import ShapeRange
from qcompiler.errors import ModelError, TargetError
from qcompiler.ir.graph import ORIGIN, all_graphs

TIMEOUT = 600.0
"""Seconds for the builds of one model; those seen took up to 2."""
_QUOTED = re.compile(r"'([^']+)'")


@dataclass
class Prober:
    """Builds models and remembers what came of it, for as long as the object lives.

    Attributes:
        flavours: modules to use, the first that imports; None looks for them at the first probe.
        timeout: seconds for one call.
    """

    flavours: tuple[Flavour, ...] | None = None
    timeout: float = TIMEOUT
    _known: dict[tuple[str, str, int, str], BuildReport] = field(default_factory=dict, repr=False)

    def available(self) -> bool:
        """Return whether anything here can build."""
        return bool(self.flavours if self.flavours is not None else find_flavours())

    def builds(self, sm: int) -> bool:
        """Return whether the flavour in use builds for exactly this compute capability."""
        found = self.flavours if self.flavours is not None else find_flavours()
        return bool(found) and sm in found[0].sms

    def require_target(self, sm: int) -> None:
        """Do nothing where a flavour builds for exactly this compute capability.

        Raises:
            TargetError: none does, or none is installed.
        """
        found = self.flavours if self.flavours is not None else require_flavours()
        if sm not in found[0].sms:
            raise TargetError(_no_target(found[0], sm).issues[0].text)

    def probe(
        self,
        model: bytes | Path,
        sms: Sequence[int],
        profiles: Mapping[str, ShapeRange] | None = None,
        samples: Mapping[str, Sequence[int]] | None = None,
        keep: bool = False,
        values: Sequence[str] = (),
    ) -> dict[int, BuildReport]:
        """Build a model for some compute capabilities, one engine each.

        Args:
            model: an ONNX file, or its contents. External data is found beside the file.
            sms: compute capabilities: 89 is 8.9.
            profiles: shapes of inputs with open axes; see `settle_profiles` for those that are left out.
            samples: shape of a calibration batch per input.
            keep: put the engines in the reports; they are not remembered.
            values: inputs that hold a shape; their profile is of their values.

        Returns:
            A report for each compute capability that was asked for. Its ``sm`` is the one that was built for: the next
            lower one where the flavour has no such target, and a note says so.

        Raises:
            TargetError: no flavour is installed, or profiles do not fit the model.
        """
        flavours = self.flavours if self.flavours is not None else require_flavours()
        self.flavours = flavours
        inputs = _inputs(model)
        listed = {name: shapes for name, shapes in (profiles or {}).items() if name not in values}
        ranges, notes = settle_profiles({n: d for n, d in inputs.items() if n not in values}, listed, samples)
        ranges |= {name: shapes for name, shapes in (profiles or {}).items() if name in values}
        key = (_digest(model), ",".join(f"{f.name} {f.version}" for f in flavours), repr(sorted(ranges.items())))
        targets = {sm: flavours[0].nearest(sm) for sm in sms}
        wanted = [
            t for t in dict.fromkeys(targets.values()) if t and (keep or (key[0], key[1], t, key[2]) not in self._known)
        ]
        fresh = _run(model, flavours, wanted, ranges, tuple(values), keep, self.timeout) if wanted else {}
        for target, report in fresh.items():
            self._known[key[0], key[1], target, key[2]] = replace(report, plan=None)
        found = {}
        for sm, target in targets.items():
            if not target:
                found[sm] = _no_target(flavours[0], sm)
                continue
            report = fresh.get(target) or self._known[key[0], key[1], target, key[2]]
            other = (f"{flavours[0].name} has no target sm{sm}; this is from sm{target}",) if target != sm else ()
            found[sm] = replace(report, notes=(*other, *notes), profiles=ranges)
        return found


def probe(
    model: bytes | Path,
    sm: int,
    profiles: Mapping[str, ShapeRange] | None = None,
    timeout_s: float = TIMEOUT,
    keep: bool = False,
) -> BuildReport:
    """Build a model for one compute capability; see `Prober.probe`."""
    return Prober(timeout=timeout_s).probe(model, [sm], profiles, keep=keep)[sm]


def _no_target(flavour: Flavour, sm: int) -> BuildReport:
    known = ", ".join(f"sm{s}" for s in flavour.sms)
    text = f"{flavour.name} does not build for sm{sm} here; it builds for {known}"
    return BuildReport(flavour.name, flavour.version, sm, (ParserIssue("TARGET", "", "", text),))


def _digest(model: bytes | Path) -> str:
    """Return a digest of a model: of a file with external data, of its path, size and time as well."""
    if isinstance(model, bytes):
        return hashlib.sha256(model).hexdigest()
    made = hashlib.sha256()
    with open(model, "rb") as file:
        while part := file.read(1 << 20):
            made.update(part)
    for beside in sorted(_external_files(model)):
        with suppress(OSError):
            state = beside.stat()
            made.update(f"{beside}:{state.st_size}:{state.st_mtime_ns}".encode())
    return made.hexdigest()


def _external_files(path: Path) -> set[Path]:
    proto = _proto(path)
    if proto is None:
        return set()
    try:
        graphs = list(all_graphs(ir.from_proto(proto)))
    except Exception:  # a model that cannot be read is TensorRT's to refuse
        return set()
    tensors = [value.const_value for graph in graphs for value in graph.initializers.values()]
    return {path.parent / str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}


def _proto(model: bytes | Path) -> onnx.ModelProto | None:
    """Return the model, None if it is none: TensorRT is asked all the same."""
    try:
        if isinstance(model, bytes):
            return onnx.load_from_string(model)
        return onnx.load(model, load_external_data=False)
    except Exception:  # protobuf raises its own types
        return None


def _inputs(model: bytes | Path) -> dict[str, Dims]:
    proto = _proto(model)
    if proto is None:
        return {}
    constants = {tensor.name for tensor in proto.graph.initializer}
    found: dict[str, Dims] = {}
    for value in proto.graph.input:
        if value.name not in constants:
            dims = value.type.tensor_type.shape.dim
            found[value.name] = [
                d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else (d.dim_param or None) for d in dims
            ]
    return found


def _run(
    model: bytes | Path,
    flavours: Sequence[Flavour],
    sms: Sequence[int],
    ranges: Mapping[str, ShapeRange],
    values: tuple[str, ...],
    keep: bool,
    timeout: float,
) -> dict[int, BuildReport]:
    """Start workers until each compute capability has an answer or has ended one."""
    found: dict[int, BuildReport] = {}
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as name:
        folder = Path(name)
        path = model if isinstance(model, Path) else folder / "model.onnx"
        if isinstance(model, bytes):
            path.write_bytes(model)
        shapes = {n: [list(r.least), list(r.best), list(r.most)] for n, r in ranges.items()}
        while left := [sm for sm in sms if sm not in found]:
            names = tuple(flavour.name for flavour in flavours)
            request = Request(names, str(path.resolve()), tuple(left), shapes, values, keep)
            ended = _work(folder, request, timeout)
            for sm in left:
                if (folder / f"sm{sm}.json").exists():
                    found[sm] = _read(folder, sm, model, keep)
            unanswered = [sm for sm in left if sm not in found]
            if unanswered:  # the first of them ended the worker; the others have another one
                base = BuildReport(flavours[0].name, flavours[0].version, unanswered[0])
                found[unanswered[0]] = replace(base, issues=(ended or ParserIssue("DIED", "", "", "no answer"),))
    return found


def _read(folder: Path, sm: int, model: bytes | Path, keep: bool) -> BuildReport:
    report = BuildReport.from_dict(json.loads((folder / f"sm{sm}.json").read_text(encoding="utf-8")))
    plan = folder / f"sm{sm}.plan"
    if keep and plan.exists():
        report = replace(report, plan=plan.read_bytes())
    return replace(report, issues=_located(report.issues, model)) if report.issues else report


def _work(folder: Path, request: Request, timeout: float) -> ParserIssue | None:
    """Run one worker; return what ended it, if it did not end by itself."""
    path = folder / "request.json"
    path.write_text(json.dumps(asdict(request)), encoding="utf-8")
    # The same modules as here, but not those of the working folder: "tensorrt" could be a user's own.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    command = [sys.executable, "-P", "-X", "faulthandler", "-m", "qcompiler.backends.tensorrt.worker", str(path)]
    try:
        ended = subprocess.run(
            command, timeout=timeout, env=environment, capture_output=True, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return ParserIssue("TIMEOUT", "", "", f"tensorrt was still building after {timeout:g} s, and was ended")
    if ended.returncode == 0:
        return None
    said = ended.stderr.decode(errors="replace").strip().splitlines()
    if ended.returncode == 3 and said:
        return ParserIssue("LOAD", "", "", said[-1])
    if ended.returncode < 0:
        name = signal.Signals(-ended.returncode).name
        return ParserIssue("DIED", "", "", f"tensorrt ended its process by {name}{_tail(said)}")
    return ParserIssue("DIED", "", "", f"tensorrt ended its process with status {ended.returncode}{_tail(said)}")


def _tail(said: Sequence[str]) -> str:
    telling = [line for line in said if line.strip() and not line.startswith(("  File", "Extension modules"))]
    return f": {telling[-1].strip()}" if telling else ""


def _located(issues: Sequence[ParserIssue], model: bytes | Path) -> tuple[ParserIssue, ...]:
    """Name the ONNX node of each issue, where the text has one, and what it comes from."""
    proto = _proto(model)
    if proto is None:
        return tuple(issues)
    nodes = {node.name: node for node in proto.graph.node if node.name}
    found = []
    for issue in issues:
        name = issue.node or next((n for n in _QUOTED.findall(issue.text) if n in nodes), "")
        node = nodes.get(name)
        if node is None:
            found.append(issue)
            continue
        text = next((p.value for p in node.metadata_props if p.key == ORIGIN), "")
        origin = tuple(text.split(";")) if text else ()
        found.append(replace(issue, node=name, operator=issue.operator or node.op_type, origin=origin))
    return tuple(found)


def describe_failure(report: BuildReport) -> str:
    """Return the first issue of a failed build in one line, with what to do next."""
    issue = report.issues[0]
    first = str(issue).splitlines()[0]
    more = f" (and {len(report.issues) - 1} more)" if len(report.issues) > 1 else ""
    if issue.code == "TARGET":
        return issue.text
    name = "TensorRT for RTX" if report.flavour == RTX else "TensorRT"
    return f"{name} {report.version} does not build the model for sm{report.sm}: {first}{more}"


def require_built(report: BuildReport) -> BuildReport:
    """Return a report of a build that made an engine.

    Raises:
        ModelError: there is none.
        TargetError: the flavour cannot be used or has no such target.
    """
    if report.built:
        return report
    if report.issues[0].code in ("TARGET", "LOAD"):
        raise TargetError(describe_failure(report))
    raise ModelError(describe_failure(report))
