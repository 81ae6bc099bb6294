"""Offer the demo models with their calibration data, evaluation data and metric; needs numpy alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

MODELS = Path(__file__).resolve().parent / "models"

Arrays = Mapping[str, npt.NDArray[Any]]
"""Arrays by the name of a model's input or output."""


@dataclass(frozen=True, eq=False)
class DemoModel:
    """One demo model: float ONNX, what to calibrate and evaluate it with, and how good its outputs are.

    - `digits_resnet`: `image` float32 `[16, 1, 32, 32]` in 0..1 to `logits` float32 `[16, 10]`.
    - `code_lm`: `tokens` int64 `[4, 64]`, bytes, to `logits` float32 `[4, 64, 256]`.
    - `code_lm_cached`: the same, and `past_key_i`, `past_value_i` float32 `[4, 4, 16, 64]` to `present_key_i`,
      `present_value_i` float32 `[4, 4, 80, 64]`, for `i` in 0..3.

    Attributes:
        name: name of the model, `digits_resnet`, `code_lm` or `code_lm_cached`.
        path: the ONNX file; its weights lie beside it.
        calibration: batches to feed for statistics, drawn from the training data.
        evaluation: batches to feed for the metric, held out from training, all of one shape.
        label: wanted classes, int64, `[rows]` or `[rows, time]`, for all rows of `evaluation` in order.
        metric: maps the outputs of the `evaluation` batches, in order, to a figure; higher is better.
        metric_name: what `metric` measures.
    """

    name: str
    path: Path
    calibration: tuple[Arrays, ...]
    evaluation: tuple[Arrays, ...]
    label: npt.NDArray[np.int64]
    metric: Callable[[Sequence[Arrays]], float]
    metric_name: str


def demo_models() -> tuple[DemoModel, ...]:
    """Load the demo models from the folder `models` beside this file."""
    return (
        _demo_model("digits_resnet", batch=16, metric_name="top-1"),
        _demo_model("code_lm", batch=4, metric_name="next-byte top-1"),
        _demo_model("code_lm_cached", batch=4, metric_name="next-byte top-1"),
    )


def top1(label: npt.NDArray[np.int64], outputs: Sequence[Arrays]) -> float:
    """Return the share of positions whose largest logit is that of `label`, in 0..1.

    `label` is int64 `[rows, ...]`; the `logits` of `outputs` are `[batch, ..., classes]` and make up all rows.
    """
    found = _joined_logits(label, outputs).argmax(-1)
    return float(np.mean(found == label))


def bits_per_byte(label: npt.NDArray[np.int64], outputs: Sequence[Arrays]) -> float:
    """Return the mean cross entropy of `label` under the softmax of the logits, in bits; lower is better.

    Shapes are those of `top1`.
    """
    logits = _joined_logits(label, outputs).astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    wanted = np.take_along_axis(shifted, label[..., None], -1)[..., 0]
    return float(np.mean(np.log2(np.exp(shifted).sum(-1)) - wanted / np.log(2.0)))


def _joined_logits(label: npt.NDArray[np.int64], outputs: Sequence[Arrays]) -> npt.NDArray[np.float32]:
    logits: npt.NDArray[np.float32] = np.concatenate([batch["logits"] for batch in outputs])
    if logits.shape[:-1] != label.shape:
        raise ValueError(f"expected logits for labels of shape {label.shape}, found {logits.shape[:-1]}")
    return logits


def _demo_model(name: str, batch: int, metric_name: str) -> DemoModel:
    with np.load(MODELS / f"{name}_calib.npz") as stored:
        calibration = dict(stored)
    with np.load(MODELS / f"{name}_eval.npz") as stored:
        evaluation = dict(stored)
    label: npt.NDArray[np.int64] = evaluation.pop("label")
    return DemoModel(
        name=name,
        path=MODELS / f"{name}.onnx",
        calibration=_batches(calibration, batch),
        evaluation=_batches(evaluation, batch),
        label=label,
        metric=partial(top1, label),
        metric_name=metric_name,
    )


def _batches(arrays: Arrays, batch: int) -> tuple[Arrays, ...]:
    """Cut arrays with equally many rows into batches of `batch` rows; fewer rows at the end stay one batch."""
    (rows,) = {len(array) for array in arrays.values()}
    return tuple({name: array[at : at + batch] for name, array in arrays.items()} for at in range(0, rows, batch))
