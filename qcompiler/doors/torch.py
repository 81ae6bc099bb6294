"""From a ``torch.nn.Module`` to a compiled model in one call, without a file in between."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from qcompiler.compiled import CompiledModel
from qcompiler.compiler import compile_model
from qcompiler.errors import ModelError
from qcompiler.options import Calibration, Options


def compile_module(
    module: Any,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    calibration: Calibration | None = None,
    options: Options | None = None,
    *,
    input_names: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
    opset: int | None = None,
) -> CompiledModel:
    """Export a module with ``torch.onnx`` and compile what comes out.

    It is exported as for inference (``eval``, no gradients) and left as it was, each of its modules in its own mode.
    Other arguments of the exporter: call ``torch.onnx.export(..., dynamo=True)`` and give its result to
    `qcompiler.compile`.

    Args:
        module: a ``torch.nn.Module``.
        example_inputs: tensors in the order of ``forward``, or by the names of its parameters; one tensor alone is the
            first.
        calibration: a ``torch.utils.data.DataLoader`` or any iterable of tensors, tuples in the order of the inputs
            (labels behind them are left out) or dicts, or whatever `qcompiler.compile` takes.
        options: everything else about the compilation; its ``calibration`` counts where none is given here.
        input_names: names of the model's inputs; by default those of ``forward``'s parameters.
        dynamic_shapes: which axes stay open, as ``torch.onnx.export`` takes it: by default none, and the batches of the
            calibration data must then be as long as the example's.
        opset: operator set to export in; by default the exporter's.

    Raises:
        ModelError: not a module, onnxscript is not installed, or the exporter fails; with its reason.
        QCompilerError: what `qcompiler.compile` refuses.
    """
    torch = sys.modules.get("torch")  # it is loaded if the module is one of its own
    if torch is None or not isinstance(module, torch.nn.Module):
        raise ModelError(f"cannot export a {type(module).__name__}: expected a torch.nn.Module")
    chosen = options or Options()
    if calibration is not None:
        chosen = replace(chosen, calibration=calibration)
    by_name = isinstance(example_inputs, Mapping)
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)  # else its rows would be the inputs
    try:
        with _evaluating(module), torch.no_grad():
            program = torch.onnx.export(
                module, () if by_name else tuple(example_inputs), kwargs=dict(example_inputs) if by_name else None,
                input_names=input_names, dynamic_shapes=dynamic_shapes, opset_version=opset, dynamo=True, verbose=False,
            )  # fmt: skip
    except ImportError as error:
        raise ModelError(f'torch.onnx needs more packages: pip install "qcompiler[torch]" ({error})') from error
    except Exception as error:  # the exporter raises whatever the module's code does
        raise ModelError(f"torch.onnx cannot export {type(module).__name__}: {_reason(error)}") from error
    return compile_model(program, chosen)


@contextmanager
def _evaluating(module: Any) -> Iterator[None]:
    """Put a module into ``eval``; behind it each of its modules is in its own mode again (some may be frozen)."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def _reason(error: BaseException) -> str:
    """Return why the exporter failed in one line.

    Its own errors tell of its stages, in colours and over many lines; the one that they began with says what is wrong.
    """
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    lines = (line.strip() for found in reversed(seen) for line in _COLOURS.sub("", str(found)).splitlines())
    return f"{type(seen[-1]).__name__}: {next(filter(None, lines), 'no reason is given')}"
