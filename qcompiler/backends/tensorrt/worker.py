"""The process that touches TensorRT to build: it may abort, crash or hang, and then only it is gone.

Usage: ``python -m qcompiler.backends.tensorrt.worker REQUEST.json``. For each compute capability asked for, an answer
``sm89.json`` (a `BuildReport`) and, if wanted, the engine ``sm89.plan`` are written beside the request.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from qcompiler.backends.tensorrt.api import RTX, enum_member, import_flavour
from qcompiler.backends.tensorrt.layers import HEADER, Layer, parse_layers
from qcompiler.backends.tensorrt.report import BuildReport, ParserIssue
from qcompiler.errors import TargetError

_NOISE = ("[checkMacros", "cudaError 35")
"""Parts of lines that only say that there is no driver."""


@dataclass(frozen=True)
class Request:
    """What the worker is asked.

    Attributes:
        flavours: modules to import, the first that can be.
        model: path of the ONNX file.
        sms: compute capabilities to build for, one engine each.
        profiles: per input the least, the best and the largest shape.
        values: inputs whose profile is of their values, since they are shapes themselves.
        keep: write the engines.
    """

    flavours: tuple[str, ...]
    model: str
    sms: tuple[int, ...]
    profiles: Mapping[str, Sequence[Sequence[int]]]
    values: tuple[str, ...] = ()
    keep: bool = False


class BuildError(Exception):
    """A build that came to nothing."""

    def __init__(self, issues: Sequence[ParserIssue]) -> None:
        super().__init__("; ".join(map(str, issues)))
        self.issues = tuple(issues)


def make_log(trt: ModuleType) -> Any:
    """Return a logger that keeps error lines and the list of layers; it must outlive what is made with it."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            if message.startswith(HEADER):
                self.layers = message
            elif severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(_plain(message))

    return Log()


def _plain(text: str) -> str:
    """Return a message without the lines that only say that no driver is there."""
    lines = [line for line in text.splitlines() if not any(part in line for part in _NOISE)]
    return "\n".join(lines) or text


def build(trt: ModuleType, request: Request, sm: int, log: Any) -> tuple[tuple[Layer, ...], Any]:
    """Parse and build for one compute capability; return the layers and the engine in TensorRT's memory.

    Raises:
        BuildError: the model is not taken.
    """
    builder = trt.Builder(log)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(request.model):
        raise BuildError([_issue(parser.get_error(index)) for index in range(parser.num_errors)] or _last(log, "PARSE"))
    if network.num_layers == 0:
        raise BuildError([ParserIssue("EMPTY", "", "", "nothing was parsed: the file is no ONNX model, or is empty")])
    config = builder.create_builder_config()
    config.profiling_verbosity = enum_member(trt.ProfilingVerbosity, "DETAILED")
    if trt.__name__ == RTX:
        config.num_compute_capabilities = 1
        config.set_compute_capability(enum_member(trt.ComputeCapability, f"SM{sm}"), 0)
    _add_profile(builder, config, network, request)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BuildError(_last(log, "BUILD"))
    return parse_layers(log.layers), engine


def _network_flags(trt: ModuleType) -> int:
    """Return the flag for strong typing, which 11 has by itself and takes no notice of."""
    flag = getattr(getattr(trt, "NetworkDefinitionCreationFlag", None), "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _add_profile(builder: Any, config: Any, network: Any, request: Request) -> None:
    if not request.profiles:
        return
    profile = builder.create_optimization_profile()
    shaping = {t.name for t in map(network.get_input, range(network.num_inputs)) if t.is_shape_tensor}
    for name, (least, best, most) in request.profiles.items():
        if name in request.values and name in shaping:
            profile.set_shape_input(name, list(least), list(best), list(most))
        elif name not in request.values:
            profile.set_shape(name, list(least), list(best), list(most))
    if config.add_optimization_profile(profile) < 0:
        raise BuildError([ParserIssue("PROFILE", "", "", f"the shapes are not taken: {dict(request.profiles)}")])


def _issue(error: Any) -> ParserIssue:
    name = str(error.node_name()) if hasattr(error, "node_name") else ""
    return ParserIssue(error.code().name, name, str(error.node_operator()), _plain(str(error.desc())))


def _last(log: Any, code: str) -> list[ParserIssue]:
    return [ParserIssue(code, "", "", log.errors[0] if log.errors else "no reason was given")]


def answer(trt: ModuleType, request: Request, sm: int, folder: Path) -> BuildReport:
    """Build for one compute capability, and write the engine if it is wanted."""
    log = make_log(trt)
    report = BuildReport(trt.__name__, str(trt.__version__), sm)
    try:
        layers, engine = build(trt, request, sm, log)
    except BuildError as failure:
        return replace(report, issues=failure.issues, errors=tuple(log.errors))
    except TargetError as error:
        return replace(report, issues=(ParserIssue("TARGET", "", "", str(error)),), errors=tuple(log.errors))
    except (RuntimeError, TypeError, ValueError) as error:  # what the binding raises of its own
        return replace(report, issues=(ParserIssue("API", "", "", str(error)),), errors=tuple(log.errors))
    if request.keep:
        (folder / f"sm{sm}.plan").write_bytes(memoryview(engine))
    return replace(report, layers=layers, errors=tuple(log.errors))


def main(path: Path) -> int:
    """Answer a request."""
    data = json.loads(path.read_text(encoding="utf-8"))
    request = Request(**{**data, **{key: tuple(data[key]) for key in ("flavours", "sms", "values")}})
    try:
        trt = import_flavour(request.flavours)
    except TargetError as error:
        print(error, file=sys.stderr)
        return 3
    for sm in request.sms:
        report = answer(trt, request, sm, path.parent)
        made = path.parent / f"sm{sm}.json.part"
        made.write_text(json.dumps(report.to_dict()), encoding="utf-8")
        made.replace(path.parent / f"sm{sm}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
