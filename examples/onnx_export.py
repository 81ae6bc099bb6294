"""Export a torch module to a bare ONNX file: readable names, no stack traces, paths or other metadata."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import torch
from onnx import TensorProto
from torch import nn

OPSET = 20
IR_VERSION = 9
EXTERNAL_AT_LEAST = 1024
ALIGNMENT = 64


def export_clean(
    module: nn.Module,
    arguments: tuple[object, ...],
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic_axes: Mapping[str, Mapping[int, str]],
    name: str,
) -> onnx.ModelProto:
    """Export `module`, put into evaluation mode, with its batch normalizations kept as operators.

    `dynamic_axes` names the free axes of each input and output. The TorchScript exporter is used on purpose: the
    newer one folds BatchNormalization into Conv and spells the average pool as ReduceMean and Reshape.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            arguments,
            buffer,
            dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={key: dict(axes) for key, axes in dynamic_axes.items()},
            opset_version=OPSET,
        )
    return onnx.load_from_string(buffer.getvalue())
