"""The artifact: one folder with the steps, the weights and the sources of the kernels.

``plan.json``: version, target, steps, types of the weights, digests of the other files. ``weights.safetensors``: every
constant. ``plan.txt``: the plan to read, for the shapes it was compiled with. ``kernels/``: sources and configurations.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from qcompiler.backends.triton.kernel_calls import kernels_of
from qcompiler.backends.triton.program import Port, Program, Step, build_program
from qcompiler.backends.triton.rendering import render_plan
from qcompiler.backends.triton.shapes import dtype_of_array
from qcompiler.engine import Array, ShapeRange
from qcompiler.errors import ModelError
from qcompiler.staging import Staging

FORMAT = 1
"""Version of the artifact's form."""
PLAN, TEXT, WEIGHTS, KERNELS = "plan.json", "plan.txt", "weights.safetensors", "kernels"
_PLAIN = frozenset(
    {"bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64"}
)
_NARROW = {
    "bfloat16": ml_dtypes.bfloat16, "float8e4m3fn": ml_dtypes.float8_e4m3fn, "float8e5m2": ml_dtypes.float8_e5m2,
    "float8e4m3fnuz": ml_dtypes.float8_e4m3fnuz, "float8e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "float8e8m0": ml_dtypes.float8_e8m0fnu, "int4": ml_dtypes.int4, "uint4": ml_dtypes.uint4,
}  # fmt: skip


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact.

    Attributes:
        program: what to run.
        sm: compute capability that it was compiled for.
        header: all else in ``plan.json``.
    """

    program: Program
    sm: int
    header: Mapping[str, Any]


def save_artifact(
    model: ir.Model,
    path: Path,
    sm: int,
    profiles: Mapping[str, ShapeRange],
    samples: Mapping[str, tuple[int, ...]],
) -> str:
    """Write a lowered model as a folder, under a temporary name first.

    Args:
        model: LOWERED.
        path: of the folder; one that is there is replaced if it is an artifact.
        sm: compute capability.
        profiles: ranges of shapes; the plan's text is for their ``best``.
        samples: shapes of a calibration batch, where no range is given.

    Returns:
        what to tell the user.

    Raises:
        ModelError: an operator has no step, or the path cannot be written.
    """
    program = build_program(model)
    text = render_plan(program, sm, plan_shapes(program, profiles, samples))
    if path.exists() and not (path / PLAN).is_file():
        raise ModelError(f"cannot write {path}: it is there and is no artifact; give another path, or remove it")
    try:
        with Staging() as staging:
            folder = staging.stage(path)
            folder.mkdir(parents=True)
            _write(program, folder, sm, text, profiles)
            staging.commit()
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error.strerror or error}") from error
    return text.splitlines()[-1] if text else ""


def plan_shapes(
    program: Program, profiles: Mapping[str, ShapeRange], samples: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes that a plan's text is made for: the ranges' best, the calibration's, or 1 for open axes."""
    found = {}
    for port in program.inputs:
        if port.name in profiles:
            found[port.name] = profiles[port.name].best
        elif port.name in samples:
            found[port.name] = samples[port.name]
        else:
            found[port.name] = tuple(d if isinstance(d, int) else 1 for d in port.shape or ())
    return found


def _write(program: Program, folder: Path, sm: int, text: str, profiles: Mapping[str, ShapeRange]) -> None:
    weights: dict[str, Array] = {}
    _gather(program, weights)
    types = {name: [dtype_of_array(array), list(array.shape)] for name, array in weights.items()}
    (folder / WEIGHTS).write_bytes(save({name: _stored(array) for name, array in weights.items()}))
    (folder / TEXT).write_text(text, encoding="utf-8")
    for kernel in sorted({k for s in program.all_steps() if s.kind == "kernel" for k in kernels_of(s.operator)}):
        _copy_sources(resources.files("qcompiler.kernels").joinpath(kernel), folder / KERNELS / kernel)
    digests = {str(p.relative_to(folder).as_posix()): _digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    body = {
        "format": FORMAT, "qcompiler": metadata.version("qcompiler"), "sm": sm, "weights": types, "files": digests,
        "ranges": {n: [list(r.least), list(r.best), list(r.most)] for n, r in profiles.items()},
        "program": _to_json(program),
    }  # fmt: skip
    body["digest"] = _digest_of(body)
    (folder / PLAN).write_text(json.dumps(body, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _copy_sources(kernel: Traversable, folder: Path) -> None:
    folder.mkdir(parents=True)
    for source in kernel.iterdir():
        if source.name.endswith((".py", ".json")):
            (folder / source.name).write_bytes(source.read_bytes())
        elif source.is_dir() and source.joinpath("__init__.py").is_file():
            _copy_sources(source, folder / source.name)


def _gather(program: Program, weights: dict[str, Array]) -> None:
    weights.update(program.weights)
    for step in program.steps:
        for body in step.bodies.values():
            _gather(body, weights)


def _stored(array: Array) -> Array:
    """Return an array in a type that safetensors stores: bytes for those that NumPy lacks."""
    array = np.array(array, order="C")
    if dtype_of_array(array) in _PLAIN:
        return array
    return np.frombuffer(array.tobytes(), np.uint8).copy()


def _restored(array: Array, dtype: str, shape: list[int]) -> Array:
    if dtype in _PLAIN:
        return array
    if dtype not in _NARROW:
        raise ModelError(f"the artifact has a weight of unknown type {dtype}")
    return np.frombuffer(array.tobytes(), _NARROW[dtype]).reshape(shape)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_plan_text(folder: Path) -> str:
    """Return the plan in an artifact as text, for the shapes it was compiled with.

    Raises:
        ModelError: the folder holds none.
    """
    try:
        return (folder / TEXT).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{folder} is no model compiled for Triton: {error}; compile it with --target triton-sm90"
        ) from error


def load_artifact(path: Path) -> Artifact:
    """Read an artifact.

    Raises:
        ModelError: it is of another version, lacks a file, or a file is not the one that was written.
    """
    try:
        body = json.loads((path / PLAN).read_text(encoding="utf-8"))
        digest = body.pop("digest")
        form = body["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"cannot load {path}: its {PLAN} is missing or damaged ({error}); compile it again") from error
    if form != FORMAT:
        raise ModelError(
            f"cannot load {path}: its form has version {form}, this qcompiler reads {FORMAT}; compile again"
        )
    if _digest_of(body) != digest:
        raise ModelError(f"cannot load {path}: {PLAN} was changed after it was written; compile it again")
    for name, wanted in body["files"].items():
        file = path / name
        if not file.is_file() or _digest(file) != wanted:
            raise ModelError(f"cannot load {path}: {name} is missing or was changed; copy the whole folder again")
    try:
        stored = load_file(path / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot load {path}: {WEIGHTS} cannot be read ({error})") from error
    weights = {name: _restored(array, *body["weights"][name]) for name, array in stored.items()}
    return Artifact(_from_json(body["program"], weights), int(body["sm"]), body)


def _to_json(program: Program) -> dict[str, Any]:
    return {
        "inputs": [_port_json(p) for p in program.inputs],
        "outputs": [_port_json(p) for p in program.outputs],
        "weights": sorted(program.weights),
        "opset": program.opset,
        "steps": [
            {
                "name": s.name, "kind": s.kind, "operator": s.operator, "inputs": list(s.inputs),
                "outputs": list(s.outputs), "arguments": list(s.arguments), "attributes": dict(s.attributes),
                "bodies": {k: _to_json(b) for k, b in s.bodies.items()}, "origins": list(s.origins),
            }
            for s in program.steps
        ],
    }  # fmt: skip


def _port_json(port: Port) -> list[Any]:
    return [port.name, port.dtype, None if port.shape is None else list(port.shape)]


def _from_json(body: Mapping[str, Any], weights: Mapping[str, Array]) -> Program:
    steps = tuple(
        Step(
            s["name"], s["kind"], s["operator"], tuple(s["inputs"]), tuple(s["outputs"]), tuple(s["arguments"]),
            s["attributes"], {k: _from_json(b, weights) for k, b in s["bodies"].items()}, tuple(s["origins"]),
        )
        for s in body["steps"]
    )  # fmt: skip
    inputs, outputs = (
        tuple(Port(n, d, None if shape is None else tuple(shape)) for n, d, shape in body[key])
        for key in ("inputs", "outputs")
    )
    return Program(inputs, outputs, steps, {n: weights[n] for n in body["weights"]}, int(body["opset"]))
